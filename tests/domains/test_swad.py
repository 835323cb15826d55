from dataclasses import replace

import pytest
import torch
from torch import nn

from depgraph import DepgraphError
from domains import SWAD, Task, finetune

TASK = Task(num_classes=2, num_domains=2, steps_per_epoch=8, batch_size=4)


def follow(algorithm: SWAD, losses: list[float]) -> float | None:
    """Train a model of one weight, which is the number of the step; give the average."""
    model = nn.Linear(1, 1, bias=False)
    at = iter(losses)
    for step in range(1, len(losses) * algorithm.every + 1):
        nn.init.constant_(model.weight, step)
        algorithm.after_step(model, lambda: next(at))
    averaged = algorithm.averaged()
    return None if averaged is None else float(averaged["weight"])


def swad(**said: float) -> SWAD:
    return SWAD(TASK, **{"checks": 8, "patience_start": 3, "patience_end": 2, **said})


def test_it_averages_from_the_lowest_loss_to_the_last_one_below_the_threshold():
    # Start: step 3, which is lowest for three checks; threshold 1.3 * 1.1; end: before 7 and 8.
    algorithm = swad()
    found = follow(algorithm, [5.0, 2.0, 1.0, 1.1, 1.2, 1.3, 2.0, 3.0, 0.1])
    assert found == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert algorithm.finished


def test_one_loss_above_the_threshold_does_not_end_the_valley():
    algorithm = swad()
    found = follow(algorithm, [2.0, 1.0, 1.1, 1.2, 9.0, 1.0])
    assert found == pytest.approx((2 + 3 + 4 + 5 + 6) / 5)
    assert not algorithm.finished


def test_weights_between_two_checks_count_too():
    algorithm = swad(checks=4)  # every second step
    assert follow(algorithm, [2.0, 1.0, 1.1, 1.2]) == pytest.approx((4 + 5 + 6 + 7 + 8) / 5)


def test_without_a_start_it_averages_since_the_lowest_loss():
    assert follow(swad(), [3.0, 2.0, 1.0, 1.5]) == pytest.approx(3.5)


def test_it_goes_on_from_its_state_as_if_never_stopped():
    losses = [5.0, 2.0, 1.0, 1.1, 1.2, 1.3, 2.0, 3.0]
    for stop in range(1, len(losses)):
        first, second = swad(), swad()
        follow(first, losses[:stop])
        second.load_state_dict(first.state_dict())
        model, at = nn.Linear(1, 1, bias=False), iter(losses[stop:])
        for step in range(stop + 1, len(losses) + 1):
            nn.init.constant_(model.weight, step)
            second.after_step(model, lambda at=at: next(at))
        assert float(second.averaged()["weight"]) == pytest.approx(4.5)


def test_the_average_is_returned_and_training_ends_with_the_valley(
    split, quick, tiny_net, tmp_path
):
    arguments = {"checks": 3, "patience_start": 1, "patience_end": 1, "tolerance": 1e-6}
    settings = replace(quick, algorithm="swad", algorithm_args=arguments, epochs=5)
    model = tiny_net()
    result = finetune(model, split, settings, tmp_path, progress=False)
    assert len(result.history) == 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert not torch.equal(model.conv.weight, state["model"]["conv.weight"])


def test_it_takes_the_place_of_the_moving_average(split, quick, tiny_net, tmp_path):
    settings = replace(quick, algorithm="swad", ema_decay=0.9)
    finetune(tiny_net(), split, settings, tmp_path, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["ema"] is None


def test_checks_below_one_are_refused():
    with pytest.raises(DepgraphError, match="swad's checks is 0"):
        SWAD(TASK, checks=0)
