"""Tiny models of transformers' newest, from configurations written here: nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Make = Callable[[int, int], Inputs]
"""Inputs of a batch and a size, whatever the size of this model's inputs is."""


@dataclass(frozen=True)
class Newest:
    """A model to prune.

    Attributes
    ----------
    name : str
        Its class.
    build : callable
        Gives it, with random weights.
    inputs : callable
        Inputs for a batch and a size.
    sizes : tuple of int
        That of the trace, then others.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Make
    sizes: tuple[int, ...]


def newest() -> Iterator[Newest]:
    """The models, in the order of the table."""
    for table, inputs, sizes in (
        (_images(), _image, (64, 96, 128)),
        (_detectors(), _image, (64, 96, 128)),
        (_texts(), _tokens, (12, 7, 16)),
    ):
        for name, config, options in table:
            yield Newest(name, _builder(name, config, options), inputs, sizes)
    yield from _others()


def _builder(name: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = {key: value() if callable(value) else value for key, value in options.items()}
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**made))
        return model

    return build


def _config(name: str, **options: Any) -> Callable[[], Any]:
    """A configuration within another, made when the model is built."""

    def make() -> Any:
        import transformers

        made = {key: value() if callable(value) else value for key, value in options.items()}
        return getattr(transformers, name)(**made)

    return make


WIDTH: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = {**WIDTH, "intermediate_size": 96}
VISION = {**LAYERS, "image_size": 64, "patch_size": 16}
PLAIN = {**WIDTH, "image_size": 64, "patch_size": 16}
STAGES: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [16, 32, 48, 64]}
WINDOWS: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
MIXED = {**STAGES, "num_attention_heads": [1, 2, 3, 4]}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4}
FEATURES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}

Table = list[tuple[str, str, dict[str, Any]]]


def _images() -> Table:
    deep = {**PLAIN, "num_hidden_layers": 4}
    backbone = _config("Dinov2Config", **deep, **FEATURES, reshape_hidden_states=False)
    depth = {"neck_hidden_sizes": [8, 12, 16, 16], "fusion_hidden_size": 16}
    swin = {**WINDOWS, "depths": [1] * 4, "num_heads": [2] * 4}
    beit = _config("BeitConfig", **{**deep, "intermediate_size": 96}, **FEATURES,
                   reshape_hidden_states=False)  # fmt: skip
    return [
        ("DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "num_register_tokens": 2}),
        ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", STAGES),
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", PLAIN),
        ("Aimv2VisionModel", "Aimv2VisionConfig", VISION),
        ("InternVLVisionModel", "InternVLVisionConfig", VISION),
        ("JanusVisionModel", "JanusVisionConfig", {**PLAIN, "mlp_ratio": 2.0}),
        ("Llama4VisionModel", "Llama4VisionConfig", {
            **VISION, "intermediate_size": 192, "vision_output_dim": 32,
            "projector_input_dim": 32, "projector_output_dim": 32}),
        ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VISION, "projection_dim": 32}),
        ("SwinForImageClassification", "SwinConfig", WINDOWS),
        ("Swinv2ForImageClassification", "Swinv2Config", WINDOWS),
        ("SegformerForSemanticSegmentation", "SegformerConfig", {
            **MIXED, "decoder_hidden_size": 32}),
        ("HieraForImageClassification", "HieraConfig", {
            "image_size": [64, 64], "embed_dim": 16, "depths": [1] * 4,
            "num_heads": [1, 2, 2, 4], "mlp_ratio": 2.0}),
        ("PvtV2ForImageClassification", "PvtV2Config", {
            **MIXED, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]}),
        ("MobileViTForImageClassification", "MobileViTConfig", {
            "image_size": 64, "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48]}),
        ("MobileViTV2ForImageClassification", "MobileViTV2Config", {
            "image_size": 64, "width_multiplier": 0.25}),
        ("VitPoseForPoseEstimation", "VitPoseConfig", {
            "backbone_config": _config(
                "VitPoseBackboneConfig", **WIDTH, image_size=[64, 64], patch_size=[16, 16],
                mlp_ratio=2, out_features=["stage2"]), "num_labels": 5}),
        ("Sam2VisionModel", "Sam2VisionConfig", {
            "backbone_config": _config(
                "Sam2HieraDetConfig", hidden_size=16, image_size=[64, 64],
                blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[16, 24, 32, 48],
                num_attention_heads_per_stage=[1, 2, 2, 4], window_size_per_stage=[4, 4, 2, 2],
                global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4]),
            "backbone_channel_list": [48, 32, 24, 16], "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}),
        ("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {
            **depth, "backbone_config": backbone, "patch_size": 16,
            "reassemble_hidden_size": 48, "head_hidden_size": 8}),
        ("DPTForDepthEstimation", "DPTConfig", {
            **deep, **depth, "intermediate_size": 96, "backbone_out_indices": [0, 1, 2, 3],
            "is_hybrid": False}),
        ("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {
            **depth, "backbone_config": beit, "bottleneck_features": 16, "bin_embedding_dim": 8,
            "num_relative_features": 8, "bin_configurations": [
                {"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}]}),
        ("UperNetForSemanticSegmentation", "UperNetConfig", {
            "backbone_config": _config("SwinConfig", **swin, **FEATURES), "hidden_size": 16,
            "pool_scales": [1, 2], "auxiliary_channels": 16, "auxiliary_in_channels": 96}),
    ]  # fmt: skip


def _detectors() -> Table:
    resnet = _config("RTDetrResNetConfig", **RESNET, layer_type="basic",
                     out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    hgnet = _config(
        "HGNetV2Config", embedding_size=8, stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 48], stage_num_blocks=[1] * 4, stage_numb_of_layers=[2] * 4,
        hidden_sizes=[16, 24, 32, 48], depths=[1] * 4,
        out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    hybrid = {
        "encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 48], "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "d_model": 32, "num_queries": 6,
        "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 48, "decoder_layers": 2,
        "decoder_attention_heads": 4, "num_denoising": 0, "num_labels": 3}  # fmt: skip
    detr = {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": _config(
            "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
            layer_type="basic", out_features=["stage2"]),
        "d_model": 32, "num_queries": 6, "num_labels": 3, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48}  # fmt: skip
    swin = _config("SwinConfig", **{**WINDOWS, "depths": [1] * 4, "num_heads": [2] * 4},
                   **FEATURES)  # fmt: skip
    return [
        ("DetrForObjectDetection", "DetrConfig", detr),
        ("RTDetrForObjectDetection", "RTDetrConfig", {**hybrid, "backbone_config": resnet}),
        ("RTDetrV2ForObjectDetection", "RTDetrV2Config", {**hybrid, "backbone_config": resnet}),
        ("DFineForObjectDetection", "DFineConfig", {**hybrid, "backbone_config": hgnet}),
        ("Deimv2ForObjectDetection", "Deimv2Config", {**hybrid, "backbone_config": hgnet}),
        ("Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", {
            "backbone_config": swin, "feature_size": 32, "mask_feature_size": 32,
            "hidden_dim": 32, "encoder_feedforward_dim": 48, "encoder_layers": 1,
            "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 48,
            "num_queries": 6, "num_labels": 3}),
        ("EomtForUniversalSegmentation", "EomtConfig", {
            **PLAIN, "num_hidden_layers": 3, "num_blocks": 1, "num_queries": 6, "mlp_ratio": 2,
            "num_labels": 3, "num_upscale_blocks": 1}),
    ]  # fmt: skip


def _texts() -> Table:
    small = {**LAYERS, "vocab_size": 100}
    grouped = {**small, "num_key_value_heads": 2, "use_cache": False, "head_dim": 12}
    experts = {
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return [
        ("BertForSequenceClassification", "BertConfig", small),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config", {
            **small, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False}),
        ("ModernBertForSequenceClassification", "ModernBertConfig", {
            **small, **special, "cls_token_id": 3, "sep_token_id": 4}),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**grouped, **special}),
        ("Qwen3ForCausalLM", "Qwen3Config", grouped),
        ("MixtralForCausalLM", "MixtralConfig", {**grouped, **experts}),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**grouped, **experts}),
        ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
            **small, "num_key_value_heads": 4, "use_cache": False, "moe_intermediate_size": 32,
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}),
        ("Mamba2ForCausalLM", "Mamba2Config", {
            **special, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100,
            "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8,
            "use_cache": False}),
        ("FalconForCausalLM", "FalconConfig", {
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 100, "use_cache": False}),
    ]  # fmt: skip


def _others() -> Iterator[Newest]:
    """Models whose inputs have a layout of their own."""

    def model(name: str, config: str, make: Make, sizes: tuple[int, ...], **options: Any) -> Newest:
        return Newest(name, _builder(name, config, options), make, sizes)

    yield model("Siglip2VisionModel", "Siglip2VisionConfig", _patches, (4, 6, 3), **LAYERS,
                patch_size=8, num_patches=16)  # fmt: skip
    yield model("PixtralVisionModel", "PixtralVisionConfig", _image, (64, 96, 128), **VISION)
    grid = {"depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4,
            "patch_size": 8, "temporal_patch_size": 2, "out_hidden_size": 32}  # fmt: skip
    yield Newest(
        "Qwen2_5_VisionTransformerPretrainedModel",
        _tower("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig",
               {**grid, "window_size": 32, "fullatt_block_indexes": [1]}),
        _grid, (4, 8, 6))  # fmt: skip
    yield Newest(
        "Qwen3VLVisionModel",
        _tower("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig",
               {**grid, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}),
        _grid, (4, 8, 6))  # fmt: skip
    yield model("VJEPA2Model", "VJEPA2Config", _video, (32, 48, 64), **WIDTH, crop_size=32,
                patch_size=8, frames_per_clip=4, mlp_ratio=2.0, pred_hidden_size=32,
                pred_num_attention_heads=4, pred_num_hidden_layers=1,
                num_pooler_layers=1)  # fmt: skip
    yield Newest(
        "WhisperEncoder",
        _tower("whisper", "WhisperEncoder", "WhisperConfig", {
            "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 96, "num_mel_bins": 16, "max_source_positions": 16}),
        _mel, (32,))  # fmt: skip
    convolutions = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
    yield model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _wave, (400, 600, 800),
                **LAYERS, **convolutions, num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4, num_labels=3, classifier_proj_size=16,
                layerdrop=0.0, attention_dropout=0.0, apply_spec_augment=False)  # fmt: skip


def _tower(
    package: str, name: str, config: str, options: dict[str, Any]
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from importlib import import_module

        home = f"transformers.models.{package}"
        made = getattr(import_module(f"{home}.configuration_{package}"), config)(**options)
        made._attn_implementation = "sdpa"
        model: nn.Module = getattr(import_module(f"{home}.modeling_{package}"), name)(made)
        return model

    return build


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _image(batch: int, size: int) -> Inputs:
    return {"pixel_values": _normal(batch, 3, size, size)}


def _tokens(batch: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(5, 90, (batch, size), generator=generator)}


def _patches(batch: int, size: int) -> Inputs:
    shapes = torch.tensor([[size, 4]] * batch)
    mask = torch.ones(batch, 4 * size, dtype=torch.long)
    pixels = _normal(batch, 4 * size, 3 * 8 * 8)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _grid(batch: int, size: int) -> Inputs:
    """As many images laid one after another as the batch says."""
    pixels = _normal(batch * size * 4, 3 * 2 * 8 * 8)
    return {"hidden_states": pixels, "grid_thw": torch.tensor([[1, size, 4]] * batch)}


def _video(batch: int, size: int) -> Inputs:
    return {"pixel_values_videos": _normal(batch, 4, 3, size, size)}


def _mel(batch: int, size: int) -> Inputs:
    return {"input_features": _normal(batch, 16, size)}


def _wave(batch: int, size: int) -> Inputs:
    return {"input_values": _normal(batch, size)}
