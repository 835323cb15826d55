"""Work without end is stopped, and nothing is left behind of what stopped it."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import timm
import torch

import depgraph
from depgraph.rescaling.masks import _reshaped
from depgraph.storing import bounded as _bounded
from depgraph.storing import store
from depgraph.storing.bounded import bounded


def endless() -> None:
    for _ in count():
        with suppress(Exception):  # as a library may
            sum(range(1000))


@pytest.mark.parametrize("where", ["MAX_SECONDS", "MAX_BYTES"])
def test_work_without_end_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bounded, where, -1 if where == "MAX_BYTES" else 0.5)
    with pytest.raises(depgraph.DepgraphError, match=r"than (0|300) s of CPU time"):
        bounded(endless)
    monkeypatch.undo()
    assert bounded(lambda: sum(range(10**6))) == sum(range(10**6))


def test_other_threads_are_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bounded, "MAX_SECONDS", 0.5)
    refused = []

    def work() -> None:
        try:
            bounded(endless)
        except depgraph.DepgraphError as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        sum(range(1000))
    assert len(refused) == 1


def test_what_is_raised_comes_through() -> None:
    with pytest.raises(KeyError):
        bounded(lambda: {}["x"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    graph = depgraph.trace(model, torch.zeros(1, 3, 32, 32))
    depgraph.save(graph.plan({"embed": range(32)}).apply(model), tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_that_makes_a_constructor_work_on_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bounded, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(store, "rebuild", lambda manifest, model: endless())
    with pytest.raises(depgraph.DepgraphError, match="save it again"):
        depgraph.load(folder)


def test_an_example_of_any_size_is_not_traced(folder: Path) -> None:
    data = json.loads((folder / "plan.json").read_text())
    data["plans"][0]["inputs"] = [{"shape": [10**9, 3, 32, 32], "dtype": "float32"}]
    (folder / "plan.json").write_text(json.dumps(data))
    with pytest.raises(depgraph.DepgraphError, match="elements"):
        depgraph.load(folder)


def test_a_mask_of_a_large_batch_takes_no_memory() -> None:
    mask = torch.arange(6).view(2, 3).gt(2).expand(10**12, 7, 2, 3)
    flat = _reshaped(mask, (10**12, 7, 6))
    assert flat.shape == (10**12, 7, 6) and flat.untyped_storage().nbytes() <= 6
    assert flat[0, 0].tolist() == [False, False, False, True, True, True]
    assert _reshaped(torch.ones(()).bool().expand(0, 3), (0, 3)).shape == (0, 3)
