"""Each path that only a GPU takes, once: ``pytest -m cuda`` where there is one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
import domains
import pruners
from benchmarks.runtimes import PRECISIONS, make
from domains.measuring import timing
from domains.measuring.op_timing import time_ops
from domains.measuring.training_timing import compare_training
from pruners.calibration import measured_latency

DEVICE = "cuda"
BARS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 8e-2}
"""How far logits may be off, as a part of the largest."""

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def small_model(**arguments: object) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **size, **arguments).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(8), torch.arange(8, device=DEVICE) % 4)]


@pytest.fixture
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, nn.Module]:
    """A model and its cut, on the GPU; the cut was made there."""
    model = small_model().to(DEVICE)
    small, _ = pruners.prune(model, images(1), "l2", 0.5)
    return model, small


def test_a_cut_on_the_gpu_is_the_cut_on_the_cpu(exact_products: None) -> None:
    model = small_model()
    here, plan = pruners.prune(model, images(1).cpu(), "l2", 0.5)
    there, other = pruners.prune(model.to(DEVICE), images(1), "l2", 0.5)
    assert other.to_json() == plan.to_json()
    assert all(p.device.type == DEVICE for p in there.parameters())
    torch.testing.assert_close(there(images()).cpu(), here(images().cpu()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", ["taylor", "hessian", "fisher", "obs", "wanda", "hutchinson"])
def test_scores_on_the_gpu_are_those_of_the_cpu(metric: str, exact_products: None) -> None:
    model = small_model()
    graph = depgraph.trace(model, images(1).cpu())
    on_cpu = [(x.cpu(), y.cpu()) for x, y in batches()]
    expected = pruners.score(model, graph, metric, on_cpu)
    found = pruners.score(model.to(DEVICE), graph, metric, batches())
    for name, scores in expected.items():
        torch.testing.assert_close(found[name].cpu(), scores, rtol=2e-2, atol=1e-4, msg=name)


def test_compensation_on_the_gpu_brings_the_outputs_nearer() -> None:
    model = small_model().to(DEVICE)
    said = {"target": {"macs": 0.6}, "kinds": "auto", "batches": batches()}
    refit, _ = pruners.prune(model, images(1), "obs", **said)
    bare, _ = pruners.prune(model, images(1), "obs", **said, compensate=False)
    inputs = batches()[0][0]
    with torch.no_grad():
        off = [float((m(inputs) - model(inputs)).norm()) for m in (refit, bare)]
    assert off[0] < off[1]


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("compile", "bf16"), *itertools.product(("eager", "cudagraph"), PRECISIONS)],
)
def test_runtimes_give_the_logits_of_the_model(
    runtime: str, precision: str, pruned: tuple[nn.Module, nn.Module], exact_products: None
) -> None:
    small = pruned[1]
    inputs = images().to(PRECISIONS[precision])
    with torch.no_grad():
        expected = small(images())
        cast = copy.deepcopy(small).to(PRECISIONS[precision])
        found = make(runtime, cast, inputs)(inputs)
    logits = found[0] if isinstance(found, tuple) else found
    assert isinstance(logits, Tensor)
    off = float((logits.float() - expected).abs().max() / expected.abs().max())
    assert off < BARS[precision]


def test_models_are_timed_with_events_and_their_memory_counted(
    pruned: tuple[nn.Module, nn.Module],
) -> None:
    settings = timing.TimingSettings(4, DEVICE, seconds=0.0, min_rounds=3, dtype="float16")
    times = timing.compare(
        dict(zip(("dense", "pruned"), pruned, strict=True)), (3, 32, 32), settings
    )
    assert times["dense"].device.startswith("cuda")
    assert times["pruned"].peak_memory_bytes < times["dense"].peak_memory_bytes


def test_training_is_timed_in_bfloat16(pruned: tuple[nn.Module, nn.Module]) -> None:
    settings = timing.TimingSettings(4, DEVICE, seconds=0.0, min_rounds=3, amp="bf16")
    times = compare_training(dict(zip("ab", pruned, strict=True)), (3, 32, 32), settings)
    assert times["b"].peak_memory_bytes < times["a"].peak_memory_bytes


def test_a_latency_table_is_measured_and_rounds_a_cut(tmp_path: Path) -> None:
    model = small_model().to(DEVICE)
    graph = depgraph.trace(model, images(1))
    file = tmp_path / "table.json"
    latency = measured_latency(graph, model=model, device=DEVICE, dtype="float16", file=file)
    assert latency.dense_ms > 0 and file.exists()
    small, _ = pruners.prune(
        model, images(1), "l2", target={"latency": 0.9}, round_to="auto", latency=latency
    )
    assert small(images()).shape == (4, 4)


def test_single_ops_are_timed() -> None:
    job = ("linear", "", (64, 32, 32))
    assert time_ops([job], device=DEVICE, dtype="bfloat16", passes=1, progress=False)[job] > 0


@pytest.mark.parametrize("amp", [False, True])
def test_training_and_evaluation_run_on_the_gpu(tmp_path: Path, amp: bool) -> None:
    pytest.importorskip("sklearn")
    root = domains.write_digits(tmp_path / "digits", per_class=2)
    split = domains.leave_one_out(domains.load_domains(root), "scan", seed=0, split_by="stem")
    model = domains.digits_model(seed=0)
    settings = dataclasses.replace(
        domains.DIGITS_RECIPE, epochs=1, warmup_epochs=0.2, device=DEVICE, amp=amp
    )
    domains.finetune(model, split, settings, tmp_path / "training", progress=False)
    accuracy = domains.evaluate(model, split, device=DEVICE, amp=amp)
    assert set(accuracy) == {"scan", *split.sources}


def test_a_model_pruned_on_the_gpu_is_saved_and_loaded(
    tmp_path: Path, pruned: tuple[nn.Module, nn.Module]
) -> None:
    small = pruned[1]
    depgraph.save(small, tmp_path / "small")
    loaded = depgraph.load(tmp_path / "small").eval().to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images()), small(images()))
