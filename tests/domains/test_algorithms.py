from dataclasses import replace

import pytest
import torch

from depgraph import DepgraphError
from domains import ALGORITHMS, ERM, FinetuneSettings, Step, Task, batches, finetune, register
from domains.training.algorithms import CORAL, GroupDRO, Mixup, make_algorithm
from domains.training.features import Features

TASK = Task(num_classes=3, num_domains=2, steps_per_epoch=10, batch_size=4)
DOMAINS = torch.tensor([0, 1, 0, 1, 0, 1])


def test_erm_is_the_mean_loss():
    losses = torch.rand(6)
    assert ERM(TASK).loss(Step(losses, DOMAINS)) == losses.mean()


def test_coral_costs_nothing_where_domains_have_the_same_mean_and_covariance():
    features = torch.randn(3, 4).repeat_interleave(2, dim=0)
    losses = torch.rand(6)
    found = CORAL(TASK).loss(Step(losses, DOMAINS, features))
    torch.testing.assert_close(found, losses.mean())


def test_coral_adds_the_mean_squared_differences_of_means_and_covariances():
    features, losses = torch.randn(6, 4), torch.rand(6)
    first, second = features[::2], features[1::2]
    means = (first.mean(0) - second.mean(0)).square().mean()
    covariances = (first.T.cov() - second.T.cov()).square().mean()
    found = CORAL(TASK, penalty=0.5).loss(Step(losses, DOMAINS, features))
    torch.testing.assert_close(found, losses.mean() + 0.5 * (means + covariances))


def test_groupdro_moves_weight_to_the_worse_domain():
    algorithm = GroupDRO(TASK, step_size=1.0)
    losses = torch.tensor([1.0, 3.0] * 3)
    raised = torch.tensor([1.0, 3.0]).exp()
    weights = raised / raised.sum()
    found = algorithm.loss(Step(losses, DOMAINS))
    torch.testing.assert_close(found, weights @ torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(algorithm.state_dict()["weights"], weights)


def test_mixup_gives_shares_of_classes():
    images, targets = Mixup(TASK).prepare(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixup_and_cutmix_of_the_settings_go_with_plain_training():
    algorithm = ERM(replace(TASK, mixup=0.5, cutmix=1.0))
    _, targets = algorithm.prepare(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
    assert targets.shape == (4, 3)
    labels = torch.tensor([0, 1])
    assert ERM(TASK).prepare(torch.zeros(2, 3, 8, 8), labels)[1] is labels


def test_what_needs_domains_refuses_mixed_images():
    settings = FinetuneSettings(algorithm="coral", mixup=0.2)
    with pytest.raises(DepgraphError, match="'coral' has to know each image's domain"):
        make_algorithm(settings, replace(TASK, mixup=0.2))


def test_mixup_with_an_odd_batch_is_refused():
    with pytest.raises(DepgraphError, match="batch_size 3 is odd"):
        Mixup(replace(TASK, batch_size=3))


def test_an_unknown_algorithm_or_argument_is_named():
    with pytest.raises(DepgraphError, match=r"unknown algorithm 'corall'; did you mean 'coral'\?"):
        make_algorithm(FinetuneSettings(algorithm="corall"), TASK)
    settings = FinetuneSettings(algorithm="coral", algorithm_args={"weight": 1})
    with pytest.raises(DepgraphError, match=r"'coral' does not take these arguments \(weight\)"):
        make_algorithm(settings, TASK)


def test_a_class_of_the_user_trains_by_its_name(split, quick, tiny_net, tmp_path):
    seen = []

    class Worst(ERM):
        name, needs_domains, needs_features = "worst", True, True

        def loss(self, step: Step) -> torch.Tensor:
            seen.append((step.domains.bincount().tolist(), tuple(step.features.shape)))
            return step.losses.max()

    register(Worst)
    try:
        settings = replace(quick, algorithm="worst", epochs=1)
        finetune(tiny_net(), split, settings, tmp_path, progress=False)
    finally:
        ALGORITHMS.pop("worst")
    assert seen == [([8, 8], (16, 8))] * 3


def test_coral_brings_the_features_of_the_sources_closer(split, quick, tiny_net, tmp_path):
    distances = []
    for penalty in (0.0, 100.0):
        model = tiny_net()
        settings = replace(
            quick, algorithm="coral", algorithm_args={"penalty": penalty}, epochs=6, keep="last"
        )
        finetune(model, split, settings, tmp_path / str(penalty), progress=False)
        images = torch.cat([x for x, _ in batches(model.eval(), split, img_size=16)])
        with Features(model) as features:
            model(images)
            step = Step(torch.zeros(len(images)), torch.arange(len(images)) % 2, features.value)
        distances.append(float(CORAL(TASK).loss(step).detach()))
    assert distances[1] < 0.8 * distances[0]
