import io
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from depgraph import DepgraphError
from domains import (
    RECIPES,
    FinetuneSettings,
    Split,
    evaluate,
    finetune,
    leave_one_out,
    load_domains,
)
from domains.training import checkpoint, finetuning


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def without_seconds(history: list) -> list:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


class Interrupting(nn.Module):
    """Passes on to a model, and stops the program at its n-th batch, as Ctrl-C does."""

    def __init__(self, model: nn.Module, at: int) -> None:
        super().__init__()
        self.model, self.left = model, at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.model(images)


def test_training_learns_what_tells_the_classes_apart(split, quick, tiny_net, tmp_path):
    model = tiny_net()
    before = evaluate(model, split, img_size=16)
    result = finetune(model, split, replace(quick, epochs=8), tmp_path, progress=False)
    assert result.best_val_accuracy > 0.9 > max(before["art"], before["cartoon"])
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_the_model_ends_with_the_weights_of_the_best_epoch(split, quick, tiny_net, tmp_path):
    model = tiny_net()
    hot = replace(quick, lr=1.0, schedule="constant", warmup_epochs=0, epochs=6, clip_grad=None)
    result = finetune(model, split, hot, tmp_path, progress=False)
    ranks = [(row["val_accuracy"], -row["val_loss"]) for row in result.history]
    assert ranks.index(max(ranks)) + 1 == result.best_epoch < 6
    found = evaluate(model, split, img_size=16)
    best = result.history[result.best_epoch - 1]
    assert {name: found[name] for name in split.sources} == best["val_accuracies"]
    assert result.best_val_accuracy == sum(best["val_accuracies"].values()) / 2


VARIANTS = {
    "plain": {},
    "ema": {"ema_decay": 0.9},
    "mixup": {"mixup": 0.4, "cutmix": 0.5},
    "augmented": {"auto_augment": "rand-m5-mstd0.5", "random_erasing": 0.3},
    "momentum": {"optimizer": "sgd", "schedule": "poly"},
    "concat": {"sampling": "concat", "clip_grad": None},
    "amp": {"amp": True},
    "coral": {"algorithm": "coral"},
    "groupdro": {"algorithm": "groupdro", "algorithm_args": {"step_size": 1.0}},
    "mixup algorithm": {"algorithm": "mixup"},
    "last": {"keep": "last"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_anywhere_and_resumed_it_ends_bit_for_bit_the_same(
    split, quick, tiny_net, tmp_path, variant
):
    settings = replace(quick, **VARIANTS[variant])
    whole = tiny_net()
    expected = finetune(Interrupting(whole, 0), split, settings, tmp_path / "a", progress=False)
    # An epoch is 3 batches of training and 2 of validation: in the first, before it has ended;
    # in the second; and where a moving average is what is validated, in the second and third.
    for at in (2, 5, 8):
        folder = tmp_path / f"stopped_{at}"
        with pytest.raises(KeyboardInterrupt):
            finetune(Interrupting(tiny_net(), at), split, settings, folder, progress=False)
        begun = (folder / "checkpoint.pt").exists()
        resumed = tiny_net(seed=99 if begun else 0)  # the checkpoint has the weights
        torch.manual_seed(at)  # the state of the process must not matter
        found = finetune(
            Interrupting(resumed, 0), split, settings, folder, resume=True, progress=False
        )
        assert begun == (at > 5 or (variant == "ema" and at > 2))
        assert same(weights(whole), weights(resumed))
        assert without_seconds(found.history) == without_seconds(expected.history)
        assert found.best_epoch == expected.best_epoch


def test_swad_resumes_bit_for_bit_too(split, quick, tiny_net, tmp_path):
    settings = replace(
        quick, algorithm="swad", algorithm_args={"checks": 3, "patience_start": 2}, epochs=4
    )
    whole = tiny_net()
    expected = finetune(Interrupting(whole, 0), split, settings, tmp_path / "a", progress=False)
    # An epoch is 3 steps and 2 batches of validation after each, and 2 at its end: 11.
    for at in (14, 24):
        with pytest.raises(KeyboardInterrupt):
            finetune(
                Interrupting(tiny_net(), at), split, settings, tmp_path / f"{at}", progress=False
            )
        resumed = tiny_net(seed=99)
        found = finetune(
            Interrupting(resumed, 0),
            split,
            settings,
            tmp_path / f"{at}",
            resume=True,
            progress=False,
        )
        assert same(weights(whole), weights(resumed))
        assert without_seconds(found.history) == without_seconds(expected.history)


@pytest.mark.parametrize("feature_weight", [0.0, 0.7])
def test_with_a_teacher_it_resumes_bit_for_bit_too(
    split, quick, tiny_net, tmp_path, feature_weight
):
    teacher = tiny_net(seed=5, width=12).train()
    quick = replace(quick, feature_weight=feature_weight)
    ended = []
    for at in (0, 9):
        model, again, folder = tiny_net(), tiny_net(), tmp_path / str(at)
        if at:
            with pytest.raises(KeyboardInterrupt):
                finetune(
                    Interrupting(model, at), split, quick, folder, progress=False, teacher=teacher
                )
        finetune(
            Interrupting(again, 0),
            split,
            quick,
            folder,
            resume=True,
            progress=False,
            teacher=teacher,
        )
        ended.append(weights(again))
    assert same(*ended)
    assert teacher.training
    assert same(weights(teacher), weights(tiny_net(seed=5, width=12)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resumes_bit_for_bit(split, quick, tiny_net, tmp_path, name):
    recipe = RECIPES[name]
    same_for_all = {key: getattr(quick, key) for key in ("epochs", "batch_size", "img_size", "lr")}
    settings = replace(recipe.settings, **same_for_all, device="cpu", num_workers=0)
    teacher = tiny_net(seed=5, width=12) if recipe.distill else None
    ended = []
    for at in (0, 4, 7):
        folder = tmp_path / str(at)
        if at:
            with pytest.raises(KeyboardInterrupt):
                finetune(
                    Interrupting(tiny_net(), at),
                    split,
                    settings,
                    folder,
                    progress=False,
                    teacher=teacher,
                )
        model = tiny_net()
        finetune(
            Interrupting(model, 0),
            split,
            settings,
            folder,
            resume=True,
            progress=False,
            teacher=teacher,
        )
        ended.append(weights(model))
    assert all(same(ended[0], other) for other in ended[1:])


def test_a_teacher_changes_the_result(split, quick, tiny_net, tmp_path):
    taught, alone = tiny_net(), tiny_net()
    finetune(taught, split, quick, tmp_path / "a", progress=False, teacher=tiny_net(seed=5))
    finetune(alone, split, quick, tmp_path / "b", progress=False)
    assert not same(weights(taught), weights(alone))


def test_loader_processes_do_not_change_the_result(split, quick, tiny_net, tmp_path):
    ended = []
    for workers in (0, 2):
        model = tiny_net()
        settings = replace(quick, epochs=2, num_workers=workers)
        finetune(model, split, settings, tmp_path / str(workers), progress=False)
        ended.append(weights(model))
    assert same(*ended)


def test_the_cache_does_not_change_the_result(split, quick, tiny_net, tmp_path):
    ended = []
    for mib in (0.0, 100.0):
        model = tiny_net()
        finetune(model, split, replace(quick, cache_mib=mib), tmp_path / str(mib), progress=False)
        ended.append(weights(model))
    assert same(*ended)


def test_the_target_has_no_part_in_training_or_choice(make_tree, quick, tiny_net, tmp_path):
    root = make_tree()
    ended, results = [], []
    for step in ("as it is", "relabelled", "deleted"):
        if step == "relabelled":
            (root / "photo/red").rename(root / "photo/x")
            (root / "photo/blue").rename(root / "photo/red")
            (root / "photo/x").rename(root / "photo/blue")
        split = leave_one_out(load_domains(root), "photo", seed=1)
        if step == "deleted":
            for sample in split.test:
                sample.path.unlink()
        model = tiny_net()
        results.append(finetune(model, split, quick, tmp_path / step, progress=False))
        ended.append(weights(model))
    assert same(ended[0], ended[1])
    assert same(ended[0], ended[2])
    assert len({result.best_epoch for result in results}) == 1


def test_a_run_that_is_over_is_not_trained_again(split, quick, tiny_net, tmp_path):
    first, again = tiny_net(), tiny_net(seed=3)
    expected = finetune(first, split, quick, tmp_path, progress=False)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert finetune(again, split, quick, tmp_path, resume=True, progress=False) == expected
    assert same(weights(first), weights(again))
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_without_resume_it_begins_anew(split, quick, tiny_net, tmp_path):
    first, second = tiny_net(), tiny_net()
    finetune(first, split, quick, tmp_path, progress=False)
    finetune(second, split, quick, tmp_path, progress=False)
    assert same(weights(first), weights(second))


def test_the_state_of_the_process_is_left_alone(split, quick, tiny_net, tmp_path):
    model = tiny_net().eval()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    finetune(model, split, quick, tmp_path, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert not model.training


def test_only_the_checkpoint_is_in_the_folder(split, quick, tiny_net, tmp_path):
    finetune(tiny_net(), split, quick, tmp_path / "deep/er", progress=False)
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["checkpoint.pt"]


def test_frozen_parameters_stay(split, quick, tiny_net, tmp_path):
    model = tiny_net()
    model.conv.requires_grad_(False)
    before = weights(model)
    finetune(model, split, quick, tmp_path, progress=False)
    assert torch.equal(model.conv.weight, before["conv.weight"])
    assert not torch.equal(model.heads[0].weight, before["heads.0.weight"])
    with pytest.raises(DepgraphError, match="every parameter of the model is frozen"):
        finetune(model.requires_grad_(False), split, quick, tmp_path, progress=False)


def test_a_model_with_two_heads_trains_both(split, quick, tiny_net, tmp_path):
    model = tiny_net(heads=2)
    before = weights(model)
    finetune(model, split, quick, tmp_path, progress=False)
    for head in ("heads.0.weight", "heads.1.weight"):
        assert not torch.equal(model.state_dict()[head], before[head])


def test_layer_decay_slows_the_layers_far_from_the_head(split, quick, tmp_path):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2}
    moved = {}
    for decay in (1.0, 0.01):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
        before = weights(model)
        settings = replace(quick, layer_decay=decay, epochs=1, warmup_epochs=0, weight_decay=0.0)
        finetune(model, split, settings, tmp_path / str(decay), progress=False)
        moved[decay] = {k: (v - before[k]).abs().sum() for k, v in model.state_dict().items()}
    assert moved[0.01]["patch_embed.proj.weight"] < 0.01 * moved[1.0]["patch_embed.proj.weight"]
    assert moved[0.01]["head.weight"] > 0.3 * moved[1.0]["head.weight"]


def test_layer_decay_on_a_model_that_knows_no_layers_is_refused(split, quick, tiny_net, tmp_path):
    with pytest.raises(DepgraphError, match="layer_decay needs a timm model"):
        finetune(tiny_net(), split, replace(quick, layer_decay=0.9), tmp_path, progress=False)


def test_an_unknown_optimizer_or_schedule_is_refused(split, quick, tiny_net, tmp_path):
    for change in ({"optimizer": "adamm"}, {"schedule": "cosinus"}, {"schedule": "none"}):
        with pytest.raises(DepgraphError, match=next(iter(change.values()))):
            finetune(tiny_net(), split, replace(quick, **change), tmp_path, progress=False)


def test_outputs_that_do_not_fit_the_classes_are_refused(split, quick, tiny_net, tmp_path):
    with pytest.raises(DepgraphError, match="num_classes=3"):
        finetune(tiny_net(classes=4), split, quick, tmp_path, progress=False)


def test_a_loss_that_is_not_finite_names_epoch_and_lr_and_keeps_the_checkpoint(
    split, quick, tiny_net, tmp_path
):
    class Diverging(Interrupting):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.left -= self.training
            return self.model(images) * (float("nan") if self.left < 0 else 1.0)

    with pytest.raises(DepgraphError, match=r"became nan in epoch 2 at lr 0\.00"):
        finetune(Diverging(tiny_net(), 3), split, quick, tmp_path, progress=False)
    model = Interrupting(tiny_net(), 0)
    result = finetune(model, split, quick, tmp_path, resume=True, progress=False)
    assert len(result.history) == 3


def test_a_checkpoint_of_other_settings_is_refused_by_name(split, quick, tiny_net, tmp_path):
    finetune(tiny_net(), split, quick, tmp_path, progress=False)
    with pytest.raises(DepgraphError, match=r"another lr \(0\.01, now 0\.02\); resume with"):
        finetune(tiny_net(), split, replace(quick, lr=0.02), tmp_path, resume=True, progress=False)


def test_a_checkpoint_of_other_data_model_or_teacher_is_refused(
    data, split, quick, tiny_net, tmp_path
):
    finetune(tiny_net(), split, quick, tmp_path, progress=False)
    other = leave_one_out(data, "art", seed=1)
    for model, part, teacher, what in (
        (tiny_net(), other, None, "data split"),
        (tiny_net(heads=2), split, None, "model"),
        (tiny_net(), split, tiny_net(), "teacher"),
    ):
        with pytest.raises(DepgraphError, match=f"another {what}"):
            finetune(model, part, quick, tmp_path, resume=True, progress=False, teacher=teacher)


def test_workers_and_cache_may_change_on_resume(split, quick, tiny_net, tmp_path):
    expected = finetune(tiny_net(), split, quick, tmp_path, progress=False)
    free = replace(quick, num_workers=1, cache_mib=0.0)
    assert finetune(tiny_net(), split, free, tmp_path, resume=True, progress=False) == expected


@pytest.mark.parametrize("content", [b"", b"junk", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_checkpoint_that_cannot_be_read_is_named(split, quick, tiny_net, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(DepgraphError, match=r"checkpoint\.pt is no readable checkpoint"):
        finetune(tiny_net(), split, quick, tmp_path, resume=True, progress=False)


def test_a_folder_that_cannot_be_made_stops_before_training(split, quick, tmp_path):
    (tmp_path / "file").write_text("")
    model = Interrupting(nn.Linear(1, 1), 1)
    with pytest.raises(DepgraphError, match=r"cannot write to .*file"):
        finetune(model, split, quick, tmp_path / "file/run", progress=False)


def test_a_broken_image_stops_before_training_with_its_name(split, quick, tiny_net, tmp_path):
    split.train["art"][3].path.write_bytes(b"broken since it was verified")
    with pytest.raises(DepgraphError, match=split.train["art"][3].path.name):
        finetune(Interrupting(tiny_net(), 1), split, quick, tmp_path, progress=False)


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoint.save_checkpoint(tmp_path, {"identity": {}, "state": "good"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DepgraphError, match=r"cannot write the checkpoint.*File too large"):
            checkpoint.save_checkpoint(tmp_path, {"state": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    saved = checkpoint.load_checkpoint(tmp_path, {})
    assert saved == {"identity": {}, "state": "good"}


def test_ctrl_c_inside_torchs_zip_writer_is_no_failed_write(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, content: object) -> int:
            if self.tell():
                raise KeyboardInterrupt
            return super().write(content)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, {"state": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_program_is_named(tmp_path):
    torch.save({"identity": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(DepgraphError, match=r"checkpoint\.pt is no readable checkpoint"):
        checkpoint.load_checkpoint(tmp_path, {"settings": {}})


def test_stopped_while_writing_the_checkpoint_the_one_before_is_whole(
    split, quick, tiny_net, tmp_path, monkeypatch
):
    expected, model = tiny_net(), tiny_net()
    finetune(expected, split, quick, tmp_path / "a", progress=False)
    calls = []

    def half(state: object, file: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        torch_save(state, file)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_net(), split, quick, tmp_path / "b", progress=False)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint.pt"]
    finetune(model, split, quick, tmp_path / "b", resume=True, progress=False)
    assert same(weights(expected), weights(model))


def test_what_a_killed_run_left_half_written_does_no_harm(split, quick, tiny_net, tmp_path):
    (tmp_path / ".checkpoint.pt.0123456789abcdef.tmp").write_bytes(b"half")
    result = finetune(tiny_net(), split, quick, tmp_path, resume=True, progress=False)
    assert len(result.history) == 3
    assert not list(tmp_path.glob(".*"))


def test_defaults_are_used_where_no_settings_are_given(split, tiny_net, tmp_path, monkeypatch):
    short = FinetuneSettings(epochs=1, img_size=16, device="cpu", warmup_epochs=0)
    monkeypatch.setattr(finetuning, "FinetuneSettings", lambda: short)
    assert len(finetune(tiny_net(), split, None, tmp_path, progress=False).history) == 1


def test_the_progress_bar_writes_to_standard_error_only(
    split: Split, quick: FinetuneSettings, tiny_net, tmp_path: Path, capsys
):
    finetune(tiny_net(), split, replace(quick, epochs=1, warmup_epochs=0), tmp_path, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_epochs_are_logged_to_whoever_hears_the_library(split, quick, tiny_net, tmp_path, caplog):
    with caplog.at_level("INFO", logger="domains"):
        finetune(tiny_net(), split, quick, tmp_path, progress=False, name="mine")
    lines = [line for line in caplog.messages if line.startswith("mine: epoch")]
    assert len(lines) == 3 and lines[-1].endswith("ETA 0 s")
