from __future__ import annotations

import json

import pytest
import torch

from depgraph import DepgraphError
from domains.measuring.op_timing import time_ops

CONV = json.dumps({"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]})
NORM = {"op": "aten.layer_norm.default", "args": ["all", ["width"], "column", "column", 1e-6]}
ATTENTION = {"masked": True, "causal": False, "alike": True}
JOBS = [
    ("linear", "", (4, 8, 6)),
    ("matmul", "", (2, 3, 4, 5)),
    ("attention", json.dumps(ATTENTION), (1, 2, 5, 5, 8)),
    ("attention", json.dumps({**ATTENTION, "alike": False}), (1, 2, 5, 5, 8, 6)),
    ("conv", CONV, (1, 2, 3, 4, 6, 6)),
    ("rows", json.dumps({**NORM, "kwargs": {}}), (5, 8)),
    ("rows", json.dumps({"op": "aten.gelu.default", "args": ["all"], "kwargs": {}}), (5, 8)),
    ("gather", "", (10, 4)),
    ("copy", "", (200,)),
    ("call", "", ()),
    ("module", "", ()),
]


def test_each_kind_of_op_runs() -> None:
    threads = torch.get_num_threads()
    times = time_ops([*JOBS, JOBS[0]], threads=1, passes=1, progress=False)
    assert list(times) == JOBS
    assert all(value > 0 for value in times.values())
    assert torch.get_num_threads() == threads


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(DepgraphError, match="unknown dtype 'float8'"):
        time_ops(JOBS, dtype="float8", progress=False)
    with pytest.raises(DepgraphError, match="unknown device 'gpu'"):
        time_ops(JOBS, device="gpu", progress=False)
    with pytest.raises(DepgraphError, match=r"attention of sizes .* does not run"):
        time_ops([("attention", json.dumps(ATTENTION), (1, 2, 5, 6, -1))], progress=False)
