"""Timing: what is measured, in which order, and that everything is put back."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import domains.measuring.timing as timing
from depgraph import DepgraphError
from domains.measuring.paired import paired
from domains.measuring.timing import TimingSettings, compare

QUICK = TimingSettings(seconds=0, min_rounds=2, warmup_rounds=1)


class Clock:
    """Stands in for the `time` module: time passes only when a model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Probe(nn.Module):
    """Takes the given times in turn and notes what it finds at each call."""

    def __init__(self, name: str = "probe", clock: Clock | None = None, *costs: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = nn.Dropout()
        self.name, self.clock, self.costs, self.calls = name, clock, costs, 0
        self.log: list[str] = []
        self.seen: dict[str, object] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        if self.clock:
            self.clock.now += self.costs[self.calls % len(self.costs)]
        self.calls += 1
        y = self.linear(x)
        self.seen = {
            "training": self.training or self.inner.training,
            "inference": torch.is_inference_mode_enabled(),
            "threads": torch.get_num_threads(),
            "shape": tuple(x.shape),
            "dtype": x.dtype,
            "out": y.dtype,
            "nhwc": x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last),
        }
        return y


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_latency_throughput_and_speedup_are_those_of_the_clock(clock):
    models = {"dense": Probe("dense", clock, 0.4), "pruned": Probe("pruned", clock, 0.1)}
    result = compare(models, (4,), dataclasses.replace(QUICK, batch_size=2))
    assert result["dense"].latency_ms == pytest.approx(400)
    assert result["pruned"].latency_ms == pytest.approx(100)
    assert result["pruned"].throughput == pytest.approx(20)
    assert result["dense"].speedup == 1
    assert result["pruned"].speedup == pytest.approx(4)


def test_median_spread_and_extremes_are_of_the_measured_rounds_only(clock):
    # Three calls before the measured ones: the first run, the memory run and one warm-up round.
    costs = (9, 9, 9, 0.1, 0.2, 0.3, 0.4, 1.5)
    result = compare(
        {"m": Probe("m", clock, *costs)}, (4,), dataclasses.replace(QUICK, min_rounds=5)
    )["m"]
    low, median, high = np.percentile(costs[3:], [25, 50, 75]) * 1e3
    assert result.rounds == 5
    assert result.latency_ms == pytest.approx(median)
    assert result.latency_iqr_ms == pytest.approx(high - low)
    assert (result.latency_min_ms, result.latency_max_ms) == pytest.approx((100, 1500))


def test_speedup_is_taken_within_rounds_so_that_a_slow_phase_cancels(clock):
    slow_phase = (1, 1, 1, 1, 10, 10, 1, 10)
    models = {
        "dense": Probe("dense", clock, *(2 * cost for cost in slow_phase)),
        "pruned": Probe("pruned", clock, *slow_phase),
    }
    result = compare(models, (4,), dataclasses.replace(QUICK, min_rounds=5))
    assert result["pruned"].speedup == pytest.approx(2)
    assert result["pruned"].speedup_interval == pytest.approx((2, 2))


def test_latency_and_speedup_agree_where_the_noise_met_the_models_in_other_rounds(clock):
    models = {
        "dense": Probe("dense", clock, 2, 2, 2, 2, 4, 4, 8, 8, 8),
        "pruned": Probe("pruned", clock, 1, 1, 1, 1, 2, 3, 5, 5, 7),
    }
    result = compare(models, (4,), dataclasses.replace(QUICK, min_rounds=6))
    dense, pruned = result["dense"], result["pruned"]
    assert dense.latency_ms / pruned.latency_ms == pytest.approx(pruned.speedup)
    assert dense.latency_ms == dense.median_ms and pruned.latency_ms != pruned.median_ms
    assert pruned.throughput == pytest.approx(1e3 / pruned.latency_ms)
    low, high = pruned.speedup_interval
    assert low < pruned.speedup < high


@pytest.mark.parametrize(("rounds", "low"), [(5, 0), (6, 0), (10, 1), (20, 5), (50, 17)])
def test_the_interval_is_that_of_the_order_statistics(rounds: int, low: int):
    times = np.ones((rounds, 2))
    times[:, 0] = np.arange(rounds)[::-1] + 1
    assert paired(times, 1)[2] == (low + 1, rounds - low)


def test_models_take_turns_and_each_round_starts_with_another(clock):
    first, second = Probe("a", clock, 1), Probe("b", clock, 1)
    second.log = first.log
    compare({"a": first, "b": second}, (4,), dataclasses.replace(QUICK, min_rounds=3))
    assert "".join(first.log[-6:]) == "abbaab"


def test_rounds_go_on_until_the_time_is_spent(clock):
    models = {"a": Probe("a", clock, 0.1), "b": Probe("b", clock, 0.15)}
    result = compare(models, (4,), dataclasses.replace(QUICK, seconds=0.9))
    assert result["a"].rounds == 4


def test_the_least_number_of_rounds_is_kept_when_time_is_short(clock):
    result = compare({"a": Probe("a", clock, 50)}, (4,), dataclasses.replace(QUICK, min_rounds=7))
    assert result["a"].rounds == 7


def test_models_run_in_eval_and_inference_mode_on_a_batch_of_the_size_asked_for():
    probe = Probe()
    compare({"m": probe}, (3, 4), dataclasses.replace(QUICK, batch_size=5))
    assert probe.seen["training"] is False
    assert probe.seen["inference"] is True
    assert probe.seen["shape"] == (5, 3, 4)


def test_train_mode_is_put_back_module_by_module():
    probe = Probe().train()
    probe.linear.eval()
    compare({"m": probe, "again": probe}, (4,), QUICK)
    assert (probe.training, probe.linear.training, probe.inner.training) == (True, False, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_train_mode_and_threads_are_put_back_after_an_interrupt(error):
    class Broken(Probe):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    probe, threads = Probe().train(), torch.get_num_threads()
    with pytest.raises((error, DepgraphError)):
        settings = dataclasses.replace(QUICK, threads=threads + 1)
        compare({"m": probe, "bad": Broken()}, (4,), settings)
    assert probe.training
    assert torch.get_num_threads() == threads


def test_chosen_threads_are_in_force_then_put_back():
    before, probe = torch.get_num_threads(), Probe()
    result = compare({"m": probe}, (4,), dataclasses.replace(QUICK, threads=before + 1))["m"]
    assert probe.seen["threads"] == result.threads == before + 1
    assert torch.get_num_threads() == before


def test_conversion_to_half_precision_is_done_on_a_copy():
    probe = Probe()
    probe.seen = seen = {}
    probe.register_forward_pre_hook(lambda module, args: seen.update(dtype=args[0].dtype))
    seen_weights = []
    probe.linear.register_forward_pre_hook(lambda m, _: seen_weights.append(m.weight.dtype))
    before = probe.linear.weight.clone()
    result = compare({"m": probe}, (4,), dataclasses.replace(QUICK, dtype="bfloat16"))["m"]
    assert set(seen_weights) == {torch.bfloat16}
    assert probe.linear.weight.dtype == torch.float32
    assert torch.equal(probe.linear.weight, before)
    assert result.dtype == "bfloat16"


def test_autocast_leaves_the_weights_and_computes_in_half_precision():
    probe = Probe()
    result = compare({"m": probe}, (4,), dataclasses.replace(QUICK, amp="bf16"))["m"]
    assert (probe.seen["dtype"], probe.seen["out"]) == (torch.float32, torch.bfloat16)
    assert result.dtype == "amp-bf16"


def test_channels_last_reaches_images_and_a_copy_of_the_weights():
    seen = []
    model = nn.Conv2d(3, 4, 2)
    model.register_forward_pre_hook(
        lambda m, args: seen.append(
            args[0].is_contiguous(memory_format=torch.channels_last)
            and m.weight.is_contiguous(memory_format=torch.channels_last)
        )
    )
    compare({"m": model}, (3, 6, 6), dataclasses.replace(QUICK, channels_last=True))
    assert all(seen)
    assert not model.weight.is_contiguous(memory_format=torch.channels_last)


def test_peak_memory_is_the_weights_and_the_most_that_was_held_at_once():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(100))
            self.tied = self.weight
            self.register_buffer("table", torch.zeros(50, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.new_zeros(10_000), x.new_zeros(20_000)
            del first, second
            return x.new_zeros(25_000)

    result = compare({"m": Holder()}, (4,), QUICK)["m"]
    assert result.weights_bytes == 100 * 4 + 50 * 8
    assert result.peak_memory_bytes == result.weights_bytes + 30_000 * 4


def test_more_models_than_the_limit_of_dynamo_are_all_compiled(monkeypatch):
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compile_(model, backend=counter, **options)
    )
    models = {str(size): nn.Linear(4, size) for size in (1, 2, 3, 5)}
    with torch._dynamo.config.patch(recompile_limit=2):
        result = compare(models, (4,), dataclasses.replace(QUICK, compile=True))
    assert counter.frame_count == len(models)
    assert result["1"].compiled


def test_a_timing_goes_to_json_and_says_where_it_was_measured():
    result = compare({"m": Probe()}, (4,), QUICK)["m"]
    row = json.loads(json.dumps(dataclasses.asdict(result)))
    assert row["device"] == "cpu"
    assert row["device_name"]
    assert row["torch_version"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_a_clear_error():
    with pytest.raises(DepgraphError, match=r"'cuda' is not there \(no CUDA device found\).*cpu"):
        compare({"m": Probe()}, (4,), dataclasses.replace(QUICK, device="cuda"))


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(DepgraphError, match=f"'{device}'.*choose cpu, cuda"):
        compare({"m": Probe()}, (4,), dataclasses.replace(QUICK, device=device))


def test_a_model_without_weights_is_refused_by_name():
    with pytest.raises(DepgraphError, match="'ghost' is on the meta device"):
        compare({"ghost": nn.Linear(4, 4, device="meta")}, (4,), QUICK)


def test_an_input_that_does_not_fit_is_an_error_that_names_the_model():
    with pytest.raises(DepgraphError, match=r"'m' does not run on a batch of shape \(1, 5\)"):
        compare({"m": nn.Linear(4, 4)}, (5,), QUICK)


def test_no_model_is_an_error():
    with pytest.raises(DepgraphError, match="no model to time"):
        compare({}, (4,), QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"min_rounds": 0}, "min_rounds is 0"),
        ({"warmup_rounds": 0}, "warmup_rounds is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose one of float32"),
        ({"amp": "fp8"}, "unknown amp 'fp8'; choose one of fp16, bf16"),
        ({"amp": "fp16", "dtype": "float16"}, "amp 'fp16' needs dtype 'float32'"),
    ],
)
def test_settings_that_cannot_be_timed_are_refused(change, message):
    with pytest.raises(DepgraphError, match=message):
        TimingSettings(**change)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_copy_is_timed_and_its_memory_counted():
    model = nn.Linear(256, 512)
    result = compare({"m": model}, (256,), dataclasses.replace(QUICK, device="cuda"))["m"]
    assert model.weight.device.type == "cpu"
    assert result.weights_bytes == (256 + 1) * 512 * 4
    assert result.peak_memory_bytes >= result.weights_bytes + 512 * 4
    assert result.device.startswith("cuda:")
