"""Int8 and 2:4 sparsity after pruning, by torchao's and onnxruntime's own quantisers.

``depgraph-prune demo --out demo``, then ``python -m benchmarks.quantised demo/RUN --data
demo/digits``: accuracy on each domain and latency of the dense and the pruned model, as they are
and quantised. What is not to be had here is listed with its reason.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import depgraph
import domains
from benchmarks.runtimes import NotHere
from domains.measuring import timing


@dataclass(frozen=True)
class Session:
    """An ONNX model in a runtime, called like a module."""

    session: Any
    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        return torch.from_numpy(self.session.run(None, {self.name: images.cpu().numpy()})[0])


Forward = Callable[[Tensor], Any]


def _plain(model: nn.Module, images: Tensor) -> Forward:
    return model


def _torchao(model: nn.Module, images: Tensor) -> Forward:
    if not find_spec("torchao"):
        raise NotHere("torchao is not installed; pip install -e '.[quantize]'")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = copy.deepcopy(model)
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made


def _semi_structured(model: nn.Module, images: Tensor) -> Forward:
    if not images.is_cuda or torch.cuda.get_device_capability(images.device) < (8, 0):
        raise NotHere("2:4 sparsity needs a CUDA device of compute capability 8.0 or later")
    from torch.sparse import to_sparse_semi_structured

    made = copy.deepcopy(model).half()
    cut = 0
    for module in made.modules():
        if isinstance(module, nn.Linear) and not any(n % 64 for n in module.weight.shape):
            # the two larger of each four weights stay
            weight = module.weight.detach()
            fours = weight.view(-1, 4)
            mask = torch.zeros_like(fours).scatter_(1, fours.abs().topk(2).indices, 1)
            sparse = to_sparse_semi_structured(weight * mask.view_as(weight))
            module.weight = nn.Parameter(sparse, requires_grad=False)
            cut += 1
    if not cut:
        raise NotHere("2:4 sparsity needs layers of multiples of 64; prune with --round-to 64")
    return lambda x: made(x.half()).float()


def _exported(model: nn.Module, images: Tensor, folder: str) -> Path:
    if not all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        raise NotHere("onnxruntime is not installed; pip install -e '.[export]'")
    path = Path(folder) / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    two = images[:2].cpu()
    torch.onnx.export(
        model.cpu(),
        (two,),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch},),
        external_data=False,  # one file, which onnxruntime's quantiser can copy
    )
    return path


def _session(path: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Session(session, session.get_inputs()[0].name)


def _onnx(model: nn.Module, images: Tensor) -> Forward:
    with tempfile.TemporaryDirectory() as folder:
        return _session(_exported(model, images, folder))


def _onnx_int8(model: nn.Module, images: Tensor) -> Forward:
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(model, images, folder)
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready, small = path.with_name("ready.onnx"), path.with_name("int8.onnx")
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        # By channel, as torchao does: the rows of turned queries and keys are of unlike sizes.
        quantize_dynamic(ready, small, weight_type=QuantType.QInt8, per_channel=True)
        return _session(small)


FORMS: dict[str, Callable[[nn.Module, Tensor], Forward]] = {
    "torch fp32": _plain,
    "torchao int8": _torchao,
    "onnxruntime fp32": _onnx,
    "onnxruntime int8": _onnx_int8,
    "2:4 fp16": _semi_structured,
}


class _Module(nn.Module):
    """A function of images as a module, for `domains.evaluate`."""

    def __init__(self, run: Forward, like: nn.Module) -> None:
        super().__init__()
        self.pretrained_cfg = getattr(like, "pretrained_cfg", {})
        self.num_classes = getattr(like, "num_classes", None)
        self.patch_embed = getattr(like, "patch_embed", None)
        self.run = (run,)  # hidden, so that no copy of it is made or moved

    def forward(self, images: Tensor) -> Tensor:
        return self.run[0](images)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--batch-size", default=16, show_default=True)
@click.option("--seconds", default=5.0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(run: Path, data: Path, batch_size: int, seconds: float, device: str) -> None:
    """Print one JSON object: accuracy by domain and latency of each form of each model."""
    found = domains.load_domains(data)
    target = json.loads((run / "result.json").read_text(encoding="utf-8"))["target_domain"]
    split = domains.leave_one_out(found, target, seed=0, split_by="stem")
    models = {name: depgraph.load(run / name).eval().to(device) for name in ("dense", "pruned")}
    size = domains.image_size(models["dense"], None)
    images = torch.randn(batch_size, 3, *size, device=device)
    runs: dict[str, Forward] = {}
    result: dict[str, Any] = {"run": str(run), "batch_size": batch_size, "skipped": {}}
    for name, model in models.items():
        for form, make in FORMS.items():
            try:
                with torch.no_grad():
                    made = make(model, images)
                    made(images)
                runs[f"{name}, {form}"] = made
            except NotHere as reason:
                result["skipped"][f"{name}, {form}"] = str(reason)
    settings = timing.TimingSettings(batch_size, device, seconds=seconds)
    with torch.no_grad():
        times = timing.in_turns(list(runs.values()), images, settings)
    for i, (name, made) in enumerate(runs.items()):
        like = models[name.partition(",")[0]]
        accuracy = domains.evaluate(_Module(made, like), split, device=device, progress=False)
        sources = [value for domain, value in accuracy.items() if domain != target]
        result[name] = {
            "latency_ms": float(np.median(times[:, i])) * 1e3,
            "speedup": float(np.median(times[:, 0] / times[:, i])),
            "sources": sum(sources) / len(sources),
            "unseen": accuracy[target],
        }
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
