from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import depgraph
import pruners
from depgraph import DepgraphError
from depgraph.costing.work import Job
from domains.measuring import op_timing
from domains.measuring.timing import TimingSettings
from domains.measuring.turns import time_in_turns
from pruners import LatencyModel, LatencyTable
from pruners.calibration import measured_latency
from pruners.speed.context import fit_factors
from pruners.speed.latency import missing_grids, probes, spread, with_times
from pruners.speed.table import Device, Grid, alignment
from tests.depgraph.models import images, tiny

HERE = Device("cpu", "synthetic", 1, "float32", "2.6")
GRAPH = depgraph.trace(tiny(embed_dim=192), images())


def milliseconds(job: Job) -> float:
    """A device that is slow at sizes that are no multiples of 8."""
    kind, _, sizes = job
    if kind in ("call", "module"):
        return 0.001
    odd = math.prod(1.2 if alignment(n) < 8 and n > 8 else 1.0 for n in sizes[1:])
    return (0.001 + 1e-6 * math.prod(sizes)) * odd


def synthetic(graph: depgraph.DependencyGraph, batch_size: int = 1) -> LatencyTable:
    table = LatencyTable(HERE)
    missing = missing_grids(graph, table, batch_size)
    jobs = [job for grid in missing for job in grid.jobs]
    jobs += [job for grid in missing for found in probes(grid).values() for job in found]
    return table.with_grids(with_times(g, {j: milliseconds(j) for j in jobs}) for g in missing)


LATENCY = LatencyModel(GRAPH, synthetic(GRAPH))


def scores(graph: depgraph.DependencyGraph = GRAPH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.rand(g.size, generator=generator) for g in graph.prunable}


def share(kept: dict[str, torch.Tensor]) -> float:
    return LATENCY.share({name: len(units) for name, units in kept.items()})


def test_time_between_points_is_interpolated_and_beyond_them_goes_on() -> None:
    grid = Grid("linear", "", ((4,), (8, 16), (8, 16)), (1.0, 2.0, 2.0, 4.0))
    assert grid.at((4, 12, 12)) == pytest.approx(2.25)
    assert grid.at((4, 8, 4)) == pytest.approx(0.5)
    assert grid.at((4, 1, 1)) > 0


def test_a_size_that_is_badly_aligned_costs_its_factor() -> None:
    grid = Grid("copy", "", ((8, 16),), (1.0, 2.0), ({1: 1.5},))
    assert grid.at((12,)) == pytest.approx(1.5)
    assert grid.at((11,)) == pytest.approx(1.375 * 1.5)


def test_a_table_predicts_what_was_measured_at_its_points() -> None:
    table = synthetic(GRAPH)
    for grid in table.grids:
        assert [table.ms(job) for job in grid.jobs] == pytest.approx(
            [milliseconds(job) for job in grid.jobs]
        )


def test_points_end_at_the_largest_size() -> None:
    assert spread(3072)[-1] == 3072 and all(n % 64 == 0 for n in spread(3072))
    assert spread(12)[-1] == 12
    assert spread(1) == (1, 2)


def test_the_prediction_of_a_plan_is_that_of_the_sliced_model() -> None:
    model = tiny(embed_dim=192)
    sizes = {"embed": 128, "blocks.0.attn.heads": 2, "blocks.1.mlp.hidden": 384}
    small = depgraph.trace(
        GRAPH.plan({name: range(n) for name, n in sizes.items()}).apply(model), images()
    )
    own = LatencyModel(small, synthetic(small))
    assert LATENCY.ms(sizes) == pytest.approx(own.ms({}), rel=0.02)


def test_the_batch_counts() -> None:
    assert LatencyModel(GRAPH, synthetic(GRAPH, 4), 4).dense_ms > 3 * LATENCY.dense_ms


@pytest.mark.parametrize("wanted", [0.7, 0.4, 0.2])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"round_to": "auto"},
        {"per": "latency"},
        {"per": "latency", "round_to": "auto"},
        {"scope": "isomorphic"},
        {"kinds": "auto"},
    ],
)
def test_a_target_of_latency_is_met_within_a_percent(
    wanted: float, choices: dict[str, Any]
) -> None:
    kept = pruners.allocate(
        GRAPH, scores(), target={"latency": wanted}, latency=LATENCY, floor=0.0, **choices
    )
    assert share(kept) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("choices", [{"ratio": 0.37}, {"target": {"macs": 0.43}}])
@pytest.mark.parametrize("per", ["unit", "macs"])
def test_auto_never_takes_fewer_units_where_more_are_as_fast(
    choices: dict[str, Any], per: str
) -> None:
    kept = pruners.allocate(GRAPH, scores(), round_to="auto", latency=LATENCY, per=per, **choices)
    sizes = {name: len(units) for name, units in kept.items()}
    for name, size in sizes.items():
        for more in range(size + 1, min(size + 64, GRAPH.group(name).size) + 1):
            assert LATENCY.ms({**sizes, name: more}) > LATENCY.ms(sizes)
    assert any(size < GRAPH.group(name).size for name, size in sizes.items())


def test_fast_sizes_are_the_well_aligned_ones() -> None:
    sizes = LATENCY.fast_sizes(GRAPH.group("embed"))
    assert sizes[-1] == 192
    assert all(n % 8 == 0 for n in sizes if n > 96)
    factors = LATENCY.multiples(GRAPH.group("embed"))
    assert factors[1] > 1.1 and factors[8] == pytest.approx(1.0)


def test_a_latency_without_a_table_is_refused() -> None:
    for choices in ({"target": {"latency": 0.5}}, {"ratio": 0.5, "round_to": "auto"}):
        with pytest.raises(DepgraphError, match=r"measured: pass latency=pruners\.measured"):
            pruners.allocate(GRAPH, scores(), **choices)


def test_what_a_table_lacks_is_said() -> None:
    with pytest.raises(DepgraphError, match="the latency table has no conv of sizes"):
        LatencyModel(GRAPH, LatencyTable(HERE))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times ops by the synthetic device; how many each time."""
    calls: list[int] = []

    def time_ops(jobs: list[Job], **_: object) -> dict[Job, float]:
        calls.append(len(jobs))
        return {job: milliseconds(job) for job in jobs}

    monkeypatch.setattr(op_timing, "time_ops", time_ops)
    return calls


def test_a_device_is_measured_once_and_a_larger_model_adds_to_it(
    clock: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "tables" / "cpu.json"
    first = measured_latency(GRAPH, file=file)
    again = measured_latency(GRAPH, file=file)
    assert len(clock) == 1 and again.dense_ms == pytest.approx(first.dense_ms)
    measured_latency(GRAPH, file=file, batch_size=2)
    assert len(clock) == 2
    assert measured_latency(GRAPH, file=file).dense_ms == pytest.approx(first.dense_ms)


def test_factors_of_kinds_are_found_in_the_times_of_whole_models() -> None:
    draw, factors = random.Random(0), {"linear": 1.1, "attention": 1.6, "rows": 1.0, "copy": 4.0}
    predicted, measured = [], []
    for _ in range(8):
        size = draw.uniform(0.2, 1.0)
        attention = draw.uniform(0.2, 1.0)
        times = {"linear": 100 * size**2, "attention": 15 * attention, "rows": 5 * size}
        predicted.append({**times, "copy": 0.5})
        exact = sum(factors[kind] * ms for kind, ms in predicted[-1].items())
        measured.append(exact * draw.gauss(1, 0.01))
    fitted = fit_factors(predicted, measured)
    assert fitted["linear"] == pytest.approx(1.1, abs=0.03)
    assert fitted["attention"] == pytest.approx(1.6, abs=0.2)
    for times, ms in zip(predicted, measured, strict=True):
        assert sum(fitted[kind] * t for kind, t in times.items()) == pytest.approx(ms, rel=0.03)


def test_whole_models_are_timed_once_and_what_they_tell_is_kept(
    clock: list[int], tmp_path: Path
) -> None:
    file, model = tmp_path / "cpu.json", tiny(embed_dim=192)
    alone = measured_latency(GRAPH, file=file)
    fitted = measured_latency(GRAPH, model=model, file=file)
    again = measured_latency(GRAPH, file=file)
    assert fitted.is_fitted and again.is_fitted and not alone.is_fitted
    assert again.dense_ms == fitted.dense_ms != alone.dense_ms
    assert len(clock) == 1
    other = measured_latency(GRAPH, file=file, batch_size=2)
    assert not other.is_fitted  # another batch size is another matter


def test_models_of_any_inputs_are_timed_in_turns() -> None:
    class Pair(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            assert tokens.shape == (5, 3) and scale.shape == (5,)
            return tokens * scale[:, None]

    example = ((torch.ones(2, 3, dtype=torch.long),), {"scale": torch.ones(2, device="meta")})
    settings = TimingSettings(5, seconds=0.0, min_rounds=2)
    times = time_in_turns([Pair(), Pair()], example, settings, batch=2)
    assert times.shape == (2, 2) and (times > 0).all()


def test_the_default_place_is_the_users_cache(
    clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small, plan = pruners.prune(
        tiny(), images(1), "l2", target={"latency": 0.5}, latency={"batch_size": 4}
    )
    (file,) = (tmp_path / "depgraph-prune").iterdir()
    table = LatencyTable.from_json(file.read_text())
    graph = depgraph.trace(tiny(), images(1))
    sizes = {name: len(units) for name, units in plan.kept_units.items()}
    assert LatencyModel(graph, table, 4).share(sizes) == pytest.approx(0.5, rel=0.01)
    assert small(images(3)).shape == (3, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no latency table"),
        ('{"format": 2}', "this is no latency table"),
        ('{"format": 9}', "format 9, not 2"),
        (LatencyTable(HERE).to_json(), "was measured with name synthetic"),
    ],
)
def test_a_file_that_is_no_table_of_this_device_is_refused(
    text: str, message: str, clock: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(DepgraphError, match=message):
        measured_latency(GRAPH, file=file)
    assert file.read_text() == text and not clock
