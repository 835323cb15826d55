from collections import Counter

import pytest
import torch

from domains import FinetuneSettings
from domains.data.images import train_transform
from domains.data.loading import ImageDataset, TrainOrder, interleave, train_loader, train_pools


def draws(order: TrainOrder, epoch: int) -> list[list[tuple[int, int]]]:
    order.epoch = epoch
    return list(order)


def test_equal_sampling_gives_each_domain_the_same_share_of_every_batch():
    order = TrainOrder([range(100), range(100, 120), range(120, 150)], batch_size=12, seed=0)
    for batch in draws(order, 0):
        places = Counter((index >= 100) + (index >= 120) for index, _ in batch)
        assert places == {0: 4, 1: 4, 2: 4}


def test_an_image_is_drawn_again_only_after_all_others_of_its_domain():
    order = TrainOrder([range(100), range(100, 120)], batch_size=8, seed=0)
    counts = Counter(index for batch in draws(order, 0) for index, _ in batch)
    small = [counts[index] for index in range(100, 120)]
    assert max(small) - min(small) <= 1
    assert max(counts[index] for index in range(100)) == 1


def test_concatenated_sampling_draws_every_image_once():
    pools = train_pools({"a": [None] * 30, "b": [None] * 10}, "concat")  # type: ignore[list-item]
    counts = Counter(i for batch in draws(TrainOrder(pools, 8, 0), 0) for i, _ in batch)
    assert counts == dict.fromkeys(range(40), 1)


def test_all_batches_are_full_and_an_epoch_has_as_many_draws_as_images():
    order = TrainOrder([range(10), range(10, 23)], batch_size=8, seed=0)
    assert [len(batch) for batch in draws(order, 0)] == [8, 8, 8]
    assert len(order) == 3


def test_order_and_augmentation_change_with_the_epoch_and_the_seed_and_nothing_else():
    order = TrainOrder([range(20), range(20, 40)], batch_size=8, seed=0)
    assert draws(order, 3) == draws(TrainOrder(order.pools, 8, seed=0), 3)
    assert draws(order, 3) != draws(order, 4)
    assert draws(order, 3) != draws(TrainOrder(order.pools, 8, seed=1), 3)
    seeds = [seed for epoch in (0, 1) for batch in draws(order, epoch) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("policy", [None, "rand-m5-mstd0.5", "augmix-m3"])
def test_loader_processes_do_not_change_what_is_loaded(split, tiny_net, policy):
    settings = FinetuneSettings(img_size=16, auto_augment=policy, random_erasing=0.3)
    samples = [sample for part in split.train.values() for sample in part]
    dataset = ImageDataset(samples, train_transform(tiny_net(), settings))
    loaded = []
    for workers in (0, 2):
        order = TrainOrder(train_pools(split.train, "equal"), 16, 0)
        loaded.append(torch.cat([images for images, _ in train_loader(dataset, order, workers)]))
    assert torch.equal(*loaded)


def test_augmentation_leaves_the_global_generators_alone(split, tiny_net):
    dataset = ImageDataset(split.test, train_transform(tiny_net(), FinetuneSettings(img_size=16)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[0, 123]
    assert torch.equal(torch.rand(3), expected)


def test_interleaving_keeps_every_sample_and_balances_any_beginning(split):
    parts = {"art": split.train["art"], "cartoon": split.train["cartoon"][:5]}
    order = interleave(parts, seed=0)
    assert Counter(order) == Counter(parts["art"] + parts["cartoon"])
    assert Counter(sample.path.parts[-3] for sample in order[:10]) == {"art": 5, "cartoon": 5}
    assert order != interleave(parts, seed=1)
