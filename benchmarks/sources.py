"""Small models of each source that the engine has to prune: timm families and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Source:
    """A model to prune.

    Attributes
    ----------
    library, name : str
        Where it is from, and what it is called there.
    build : callable
        Gives the model with random weights and example inputs at batch 2.
    """

    library: str
    name: str
    build: Build


def timm_family(family: str) -> Source | None:
    """The model with the fewest parameters of a timm family; None where the family has none."""
    sizes = []
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        sizes.append((sum(p.numel() for p in model.parameters()), name))
    if not sizes:
        return None
    name = min(sizes)[1]

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        model: Any = timm.create_model(name)
        return model, (torch.randn(2, *model.pretrained_cfg["input_size"]),)

    return Source("timm", name, build)


def other_sources() -> Iterator[Source]:
    """Models of transformers and torchvision, where installed, and torch's own transformer."""
    if find_spec("transformers"):
        yield from _transformers()
    if find_spec("torchvision"):
        yield from _torchvision()
    if find_spec("vit_pytorch"):
        yield from _vit_pytorch()
    if find_spec("einops"):
        yield Source("einops", "Rearrange, Reduce, EinMix", _einops)
    for first in (True, False):
        yield Source("torch", f"TransformerEncoder, norm first: {first}", _encoder(first))


def _transformers() -> Iterator[Source]:
    import transformers as hf

    width = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    vision = {**width, "image_size": 64, "patch_size": 16}
    dino = {key: value for key, value in vision.items() if key != "intermediate_size"}
    windows = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    stages = {"depths": [1] * 4, "hidden_sizes": [16, 32, 48, 64]}
    mixed = {**stages, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32}
    grouped = {**width, "num_key_value_heads": 2, "vocab_size": 100, "use_cache": False}
    beit = {**vision, "use_relative_position_bias": True}
    images: list[tuple[str, str, dict[str, Any]]] = [
        ("ViTForImageClassification", "ViTConfig", vision),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig", vision),
        ("BeitForImageClassification", "BeitConfig", beit),
        ("Dinov2ForImageClassification", "Dinov2Config", dino),
        ("SwinForImageClassification", "SwinConfig", windows),
        ("Swinv2ForImageClassification", "Swinv2Config", windows),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**vision, "projection_dim": 32}),
        ("SiglipVisionModel", "SiglipVisionConfig", vision),
        ("SegformerForImageClassification", "SegformerConfig", mixed),
        ("SegformerForSemanticSegmentation", "SegformerConfig", mixed),
        ("ConvNextForImageClassification", "ConvNextConfig", stages),
    ]
    texts: list[tuple[str, str, dict[str, Any]]] = [
        ("BertForSequenceClassification", "BertConfig", {**width, "vocab_size": 100}),
        ("LlamaForCausalLM", "LlamaConfig", grouped),
        ("MistralForCausalLM", "MistralConfig", grouped),
    ]
    for inputs, table in ((_image(64), images), (_tokens(), texts)):
        for model, config, options in table:

            def build(
                inputs: Tensor = inputs,
                model: str = model,
                config: str = config,
                options: dict[str, Any] = options,
            ) -> tuple[nn.Module, tuple[Tensor, ...]]:
                return getattr(hf, model)(getattr(hf, config)(**options)), (inputs,)

            yield Source("transformers", model, build)


def _torchvision() -> Iterator[Source]:
    import torchvision

    names = ("vit_b_16", "swin_t", "swin_v2_t", "resnet50", "convnext_tiny", "densenet121",
             "efficientnet_b0", "maxvit_t", "shufflenet_v2_x0_5", "regnet_y_400mf")  # fmt: skip
    for name in names:

        def build(name: str = name) -> tuple[nn.Module, tuple[Tensor, ...]]:
            return getattr(torchvision.models, name)(weights=None), (_image(224),)

        yield Source("torchvision", name, build)


def _vit_pytorch() -> Iterator[Source]:
    size = {"image_size": 64, "num_classes": 10}
    plain = {**size, "patch_size": 16, "dim": 48, "depth": 2, "heads": 4, "mlp_dim": 96}
    small = {f"sm_{key}": value for key, value in _ENCODER.items()}
    large = {f"lg_{key}": 2 * value for key, value in _ENCODER.items()}
    table: list[tuple[str, str, dict[str, Any]]] = [
        ("vit", "ViT", plain),
        ("simple_vit", "SimpleViT", plain),
        ("deepvit", "DeepViT", plain),
        ("cait", "CaiT", {**plain, "cls_depth": 1}),
        ("xcit", "XCiT", {**plain, "cls_depth": 1}),
        ("rvt", "RvT", plain),
        ("pit", "PiT", {**plain, "depth": (1, 1)}),
        ("cross_vit", "CrossViT", {**size, "depth": 1, **small, **large}),
        (
            "cvt",
            "CvT",
            {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 48},
        ),
        (
            "max_vit",
            "MaxViT",
            {"num_classes": 10, "dim": 32, "dim_head": 16, "depth": (1, 1), "window_size": 4},
        ),
        (
            "nest",
            "NesT",
            {**size, "patch_size": 4, "dim": 32, "heads": 2, "num_hierarchies": 2}
            | {"block_repeats": (1, 1)},
        ),
        (
            "levit",
            "LeViT",
            {**size, "stages": 2, "dim": (32, 48), "depth": 1, "heads": (2, 3), "mlp_mult": 2},
        ),
    ]
    for module, name, options in table:

        def build(
            module: str = module, name: str = name, options: dict[str, Any] = options
        ) -> tuple[nn.Module, tuple[Tensor, ...]]:
            cls = getattr(import_module(f"vit_pytorch.{module}"), name)
            return cls(**options), (_image(64),)

        yield Source("vit-pytorch", name, build)


_ENCODER = {"dim": 48, "patch_size": 16, "enc_depth": 1, "enc_heads": 4, "enc_mlp_dim": 96}


def _einops() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from einops.layers.torch import EinMix, Rearrange, Reduce

    tower = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        Rearrange("b (g c) h w -> b (h w) (c g)", g=4),
        nn.Linear(16, 32),
        nn.GELU(),
        EinMix("b n c -> b n o", weight_shape="c o", bias_shape="o", c=32, o=24),
        Reduce("b n c -> b c", "mean"),
        nn.Linear(24, 5),
    )
    return tower, (_image(64),)


def _encoder(norm_first: bool) -> Build:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        tower = nn.Sequential(nn.Linear(20, 48), encoder, nn.Linear(48, 5))
        return tower, (torch.randn(2, 10, 20),)

    return build


def _image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size)


def _tokens() -> Tensor:
    return torch.randint(0, 90, (2, 12))
