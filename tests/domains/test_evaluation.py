import pytest
import timm
import torch
from torch import Tensor, nn

from depgraph import DepgraphError
from domains import batches, evaluate, folder_batches


class Hue(nn.Module):
    """Says the class by the strongest channel: right on every image, but for `blind` classes."""

    def __init__(self, classes: int = 3, blind: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.classes, self.blind = classes, blind
        self.frozen = nn.BatchNorm2d(3)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.seen += len(images)
        red, green, blue = images.mean((2, 3)).T
        logits = torch.stack([blue, green, red], 1)  # the order of the class names
        for label in self.blind:
            logits[:, label] = -99
        return nn.functional.pad(logits, (0, self.classes - 3), value=-99.0)


def test_accuracy_is_the_share_of_right_answers_in_every_domain(split):
    assert evaluate(Hue(), split, img_size=16) == {"art": 1.0, "cartoon": 1.0, "photo": 1.0}
    blind = evaluate(Hue(blind=(2,)), split, img_size=16, batch_size=7)
    assert blind == pytest.approx(dict.fromkeys(("art", "cartoon", "photo"), 2 / 3))


def test_sources_count_by_their_validation_part_and_the_target_by_all(split):
    model = Hue()
    evaluate(model, split, img_size=16)
    assert model.seen == 6 + 6 + 30
    relabelled = dict.fromkeys(split.train, ())  # what is in training cannot matter
    assert evaluate(model, type(split)(split.classes, "photo", relabelled, split.val, split.test))


def test_data_mappings_and_plain_samples_are_evaluated_in_full(data, split):
    model = Hue()
    assert evaluate(model, data, img_size=16) == dict.fromkeys(data.domains, 1.0)
    assert model.seen == 90
    assert evaluate(model, {"some": split.test[:4]}, img_size=16) == {"some": 1.0}
    assert evaluate(model, split.test, img_size=16) == {"all": 1.0}


def test_the_mode_of_every_module_is_put_back(split):
    model = Hue().train()
    model.frozen.eval()
    evaluate(model, split, img_size=16)
    assert model.training
    assert not model.frozen.training


def test_the_mode_is_put_back_after_an_error_too(split):
    model = Hue(classes=5).train()
    with pytest.raises(DepgraphError):
        evaluate(model, split, img_size=16)
    assert model.training


def test_mixed_precision_evaluates_after_a_run_in_full_precision(split):
    assert evaluate(Hue(), split.test, img_size=16, device="cpu") == {"all": 1.0}
    assert evaluate(Hue(), split.test, img_size=16, device="cpu", amp=True) == {"all": 1.0}


def test_outputs_that_do_not_fit_the_classes_are_refused(split):
    with pytest.raises(DepgraphError, match="num_classes=3"):
        evaluate(Hue(classes=5), split, img_size=16)


def test_labels_beyond_the_outputs_are_refused(split):
    too_far = [type(split.test[0])(sample.path, 7) for sample in split.test]
    with pytest.raises(DepgraphError, match="label 7"):
        evaluate(Hue(), too_far, img_size=16)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DepgraphError, match="no images"):
        evaluate(Hue(), [], img_size=16)


def test_a_device_that_is_not_there_is_refused(split):
    with pytest.raises(DepgraphError, match="'cuda:99' is not on this machine"):
        evaluate(Hue(), split, img_size=16, device="cuda:99")
    with pytest.raises(DepgraphError, match="'meta' is not supported"):
        evaluate(Hue(), split, img_size=16, device="meta")
    with pytest.raises(DepgraphError, match="'nonsense' is not known"):
        evaluate(Hue(), split, img_size=16, device="nonsense")


def test_a_distilled_transformer_is_evaluated(split):
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=3
    )
    model.set_distilled_training(True)
    assert set(evaluate(model, split)) == {"art", "cartoon", "photo"}
    assert model.training


def test_batches_are_of_the_sources_training_part_balanced_over_domains(split):
    model = Hue()
    found = batches(model, split, batch_size=8, num_samples=20, img_size=16)
    sizes = [len(labels) for _, labels in found]
    assert (sizes, len(found)) == ([8, 8, 4], 3)
    known = {sample for part in split.train.values() for sample in part}
    assert set(found.dataset.samples) <= known
    assert sum(sample.path.parts[-3] == "art" for sample in found.dataset.samples) == 10


def test_batches_are_as_in_evaluation_and_the_same_each_time(split):
    first, again = (
        list(batches(Hue(), split, seed=4, num_samples=12, img_size=16)) for _ in range(2)
    )
    other = list(batches(Hue(), split, seed=5, num_samples=12, img_size=16))
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], other[0][0])
    model = Hue().eval()
    assert torch.equal(model(first[0][0]).argmax(1), first[0][1])


def test_batches_can_be_gone_through_twice(split):
    found = batches(Hue(), split, num_samples=12, img_size=16)
    assert [x.shape for x, _ in found] == [x.shape for x, _ in found] == [(12, 3, 16, 16)]


@pytest.mark.parametrize("number", [0, 49])
def test_a_number_of_images_that_are_not_there_is_refused(split, number):
    with pytest.raises(DepgraphError, match="of 48"):
        batches(Hue(), split, num_samples=number)


def test_images_in_looks_come_again_each_time_in_another_and_the_same_for_a_seed(split):
    found = batches(Hue(), split, num_samples=96, img_size=16, looks=True, seed=3)
    images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    again = torch.cat([x for x, _ in found])
    assert (found.num_samples, len(found), len(images)) == (96, 3, 96)
    assert torch.equal(images, again)
    assert torch.equal(labels[:48], labels[48:])
    same = [torch.equal(one, two) for one, two in zip(images[:48], images[48:], strict=True)]
    assert sum(same) < 24  # both plain, or both in a look that leaves the image as it is
    other = torch.cat([x for x, _ in batches(Hue(), split, img_size=16, looks=True, seed=4)])
    assert len(other) == 8 * 48
    assert not torch.equal(other[:96], images)


def test_a_folder_of_images_needs_no_classes(data, tmp_path):
    found = folder_batches(Hue(), data.root, img_size=16, batch_size=50)
    assert [len(labels) for _, labels in found] == [50, 40]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "list.txt").write_text("no image")
    with pytest.raises(DepgraphError, match="holds no image"):
        folder_batches(Hue(), tmp_path / "empty")
    with pytest.raises(DepgraphError, match="no folder"):
        folder_batches(Hue(), tmp_path / "gone")
