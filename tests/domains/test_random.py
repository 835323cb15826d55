import random

import numpy as np
import torch

from domains.running.random import derive_seed, seeded


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_are_the_same_on_every_machine_and_differ_by_any_part():
    assert derive_seed(0, "epoch", 1) == 3808558412218152728
    parts = [(0, "epoch", 1), (0, "epoch", 2), (1, "epoch", 1), (0, "order", 1), (0, "epoch")]
    assert len({derive_seed(*part) for part in parts}) == len(parts)


def test_what_is_drawn_inside_depends_on_the_seed_alone():
    with seeded(7):
        first = draw()
    draw()
    with seeded(7):
        assert draw() == first
    with seeded(8):
        assert draw() != first


def test_the_generators_go_on_outside_as_if_nothing_had_been():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw(), draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    with seeded(9):
        draw()
    assert (first, draw()) == expected
