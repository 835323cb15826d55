from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from safetensors.torch import save_file

import domains
from tests.cli.conftest import TINY, Invoke


def failed(result: Result, *words: str) -> None:
    """One sentence on standard error, exit code 1 or 2, and no traceback."""
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def run(data: Path, tmp_path: Path) -> list[object]:
    return [
        "run",
        *TINY,
        "--data",
        data,
        "--target=wool",
        "--out",
        tmp_path / "run",
        "--epochs=1",
        "--dense-epochs=1",
        "--batch-size=6",
        "--metric=l2",
        "--bench-seconds=0.1",
    ]


def test_an_unknown_model_is_answered_with_near_names(invoke: Invoke) -> None:
    failed(invoke("inspect", "vit_bas_patch16_224"), "vit_base_patch16_224")


@pytest.mark.parametrize("argument", ["legs=4", "num_heads=0", "norm_layer=wide"])
def test_an_argument_the_model_does_not_take_is_named(invoke: Invoke, argument: str) -> None:
    result = invoke("inspect", "vit_tiny_patch16_224", "--model-arg", argument)
    failed(result, "timm cannot make", argument.partition("=")[0])


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1", "half", "nan"])
def test_a_ratio_outside_zero_and_one_is_a_usage_error(
    invoke: Invoke, ratio: str, tmp_path: Path
) -> None:
    result = invoke("prune", *TINY, f"--ratio={ratio}", "--out", tmp_path / "x")
    assert result.exit_code == 2
    failed(result, "--ratio")


def test_two_budgets_at_once_are_a_usage_error(invoke: Invoke, tmp_path: Path) -> None:
    args = ["--ratio=0.5", "--target-macs=0.5", "--out", tmp_path / "x"]
    failed(invoke("prune", *TINY, *args), "one of --ratio")


@pytest.mark.parametrize(
    ("option", "word"),
    [("--kinds=,", "--kinds"), ("--target=clay", "--data"), ("--round-to=5000", "round_to")],
)
def test_an_option_that_would_change_nothing_is_refused(
    invoke: Invoke, tmp_path: Path, option: str, word: str
) -> None:
    args = ["--metric=l2", "--ratio=0.5", option, "--out", tmp_path / "x"]
    failed(invoke("prune", *TINY, *args), word)
    assert not (tmp_path / "x").exists()


def test_an_unknown_metric_is_answered_with_a_near_one(invoke: Invoke, tmp_path: Path) -> None:
    failed(invoke("prune", *TINY, "--metric=hesian", "--out", tmp_path / "x"), "'hessian'")


def test_a_metric_with_data_needs_data(invoke: Invoke, tmp_path: Path) -> None:
    failed(invoke("prune", *TINY, "--metric=hessian", "--out", tmp_path / "x"), "--data")
    assert not (tmp_path / "x").exists()


def test_weights_that_do_not_fit_name_the_first_parameter(invoke: Invoke, tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", *TINY, *args), "cls_token", "(1, 1, 7)")


def test_weights_that_are_not_finite_name_the_parameter(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}
    state = timm.create_model("vit_tiny_patch16_224", num_classes=2, **settings).state_dict()
    state["blocks.1.mlp.fc2.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    args = [*TINY, "--num-classes=2", "--weights", tmp_path / "w.pt", "--out", tmp_path / "x"]
    failed(invoke("prune", *args, "--metric=random"), "'blocks.1.mlp.fc2.weight'", "NaN")
    result = invoke("prune", *args, "--metric=taylor", "--data", data, "--target=wool")
    failed(result, "'blocks.1.mlp.fc2.weight'", "NaN")
    assert not (tmp_path / "x").exists()


def test_weights_that_are_no_weights_are_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_bytes(b"not weights at all")
    (tmp_path / "text.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("text.safetensors", "text.pt", "list.pt", "numbers.pt"):
        args = ["--weights", tmp_path / name, "--metric=l2", "--out", tmp_path / "x"]
        failed(invoke("prune", *TINY, *args), "cannot be read as weights", name)


def test_a_pickle_is_never_loaded(invoke: Invoke, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"x": Evil()}, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", *TINY, *args), "cannot be read as weights")
    assert not (tmp_path / "owned").exists()


def test_a_corrupt_image_is_named_before_any_training(
    invoke: Invoke, run: list[object], data: Path, tmp_path: Path
) -> None:
    (data / "ink" / "dot" / "3.png").write_bytes(b"\x89PNG nothing")
    failed(invoke(*run), "3.png")
    assert not (tmp_path / "run").exists()


def test_a_class_missing_in_one_domain_is_named(
    invoke: Invoke, run: list[object], data: Path
) -> None:
    shutil.rmtree(data / "clay" / "line")
    failed(invoke(*run), "clay", "line")


def test_per_head_dims_beside_a_refit_are_refused_before_any_training(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    failed(invoke(*run, "--per-head"), "--per-head needs --no-compensate")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--num-calibration", "--num-samples"])
def test_more_images_than_there_are_is_refused_before_any_training(
    invoke: Invoke, run: list[object], tmp_path: Path, option: str
) -> None:
    failed(
        invoke(*run, "--calibration=plain", "--metric=taylor", f"{option}=1000"), "1000", "images"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["run", "prune", "finetune", "sweep"])
def test_results_in_the_folder_of_images_are_refused(
    invoke: Invoke, run: list[object], data: Path, tmp_path: Path, command: str
) -> None:
    calls: dict[str, list[object]] = {
        "run": [*run],
        "prune": ["prune", *TINY, "--ratio=0.5", "--data", data],
        "finetune": ["finetune", tmp_path, "--data", data, "--target=wool"],
        "sweep": ["sweep", tmp_path / "grid.toml", "--data", data],
    }
    (tmp_path / "grid.toml").write_text(
        'data = "ROOT"\nmodels = "vit_tiny_patch16_224"\nratio = 0.5'
    )
    inside = data / "results"
    failed(invoke(*calls[command], "--out", inside), "folder of images")
    assert not inside.exists()


def test_an_unknown_target_is_answered_with_near_names(invoke: Invoke, run: list[object]) -> None:
    failed(invoke(*run, "--target=wol"), "wool")


def test_a_folder_without_a_model_is_refused(invoke: Invoke, tmp_path: Path, data: Path) -> None:
    failed(invoke("evaluate", tmp_path, "--data", data), "no saved model")


def test_a_plan_for_another_model_shows_in_bench(invoke: Invoke, tmp_path: Path) -> None:
    invoke("prune", *TINY, "--metric=l2", "--out", tmp_path / "small")
    record = json.loads((tmp_path / "small" / "prune.json").read_text())
    record["arguments"]["model_args"]["embed_dim"] = 48
    (tmp_path / "small" / "prune.json").write_text(json.dumps(record))
    failed(invoke("bench", tmp_path / "small"), "--dense")


@pytest.mark.parametrize("text", ['{"half": ', "[]", "{}"])
def test_records_that_others_wrote_or_cut_off_are_named(
    invoke: Invoke, run: list[object], data: Path, tmp_path: Path, text: str
) -> None:
    invoke("prune", *TINY, "--metric=l2", "--num-classes=2", "--out", tmp_path / "small")
    (tmp_path / "small" / "prune.json").write_text(text)
    failed(invoke("bench", tmp_path / "small"), "prune.json")
    if text != "{}":
        args = ["--data", data, "--bench-seconds=0"]
        failed(invoke("evaluate", tmp_path / "small", *args), "prune.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dense.json").write_text(text)
    failed(invoke(*run, "--resume"), "dense.json")


@pytest.mark.parametrize("command", ["evaluate", "finetune", "bench"])
def test_a_directory_that_is_not_there_is_named(
    invoke: Invoke, command: str, data: Path, tmp_path: Path
) -> None:
    args = [] if command == "bench" else ["--data", data, "--target=wool"]
    failed(invoke(command, tmp_path / "nowhere", *args), "nowhere", "is no directory")


def test_options_that_a_saved_model_cannot_take_are_refused(invoke: Invoke, tmp_path: Path) -> None:
    invoke("prune", *TINY, "--metric=l2", "--out", tmp_path / "small")
    args = ["--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", tmp_path / "small", "--img-size=64", *args), "--img-size")
    failed(invoke("prune", tmp_path / "small", "--weights=w.pt", *args), "--weights")


def test_a_model_with_other_classes_than_the_data_is_refused_before_training(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    failed(invoke(*run, "--num-classes=5"), "5 outputs", "2 classes")
    assert not (tmp_path / "run").exists()


def test_a_tag_that_timm_does_not_have_is_answered_with_those_it_has(invoke: Invoke) -> None:
    failed(invoke("inspect", "test_vit.nothing"), "'nothing'", "test_vit.r160_in1k")


def test_a_model_without_pretrained_weights_says_so(invoke: Invoke, tmp_path: Path) -> None:
    args = ["--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", "vit_base_patch16_gap_224", *args), "no pretrained weights", "--weights")


def test_weights_that_cannot_be_had_from_the_hub_are_one_sentence(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    args = ["--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", "vit_tiny_patch16_224", *args), "hub", "--no-pretrained")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"cls_token": 1}])
def test_a_torch_file_that_is_no_state_dict_is_refused(
    invoke: Invoke, tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "w.pt")
    args = ["--weights", tmp_path / "w.pt", "--metric=l2", "--out", tmp_path / "x"]
    failed(invoke("prune", *TINY, *args), "cannot be read as weights")


def test_a_device_file_is_never_replaced(invoke: Invoke, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for option in ("--html", "--graphml"):
        failed(invoke("inspect", *TINY, option, pipe), "no ordinary file")
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "option",
    [
        "--batch-size=0",
        "--seconds=-1",
        "--seconds=nan",
        "--seconds=inf",
        f"--seed={2**64}",
        "--threads=0",
        "--threads=100000",
        "--device=toaster",
    ],
)
def test_a_number_out_of_range_is_a_usage_error(
    invoke: Invoke, tmp_path: Path, option: str
) -> None:
    result = invoke("bench", tmp_path, option)
    assert result.exit_code == 2
    failed(result, option.partition("=")[0])


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("depgraph.storing.store.save_file", full)
    args = ["--metric=l2", "--out", tmp_path / "small"]
    failed(invoke("prune", *TINY, *args), "No space left")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_training_is_one_sentence_and_resume_finishes(
    invoke: Invoke, run: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = domains.finetune

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(domains, "finetune", interrupted)
    result = invoke(*run)
    assert result.exit_code == 130 and "Traceback" not in result.output
    assert "interrupted" in result.stderr and "--resume" in result.stderr
    monkeypatch.setattr(domains, "finetune", finetune)
    finished = invoke(*run, "--resume", "--json")
    assert finished.exit_code == 0, finished.output
    assert json.loads(finished.stdout)["speedup"] > 0


def test_a_device_that_is_not_there_is_refused(
    invoke: Invoke, run: list[object], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    failed(invoke(*run, "--device=cuda"), "cuda")


def test_debug_shows_the_traceback(invoke: Invoke) -> None:
    result = invoke("--debug", "inspect", "vit_bas_patch16_224")
    assert result.exit_code == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weights", "x.safetensors"], "--weights does not go with --checkpoint"),
        (["--num-samples", "8"], "--num-samples does not go with --checkpoint"),
        (["--amp"], "--amp does not go with --checkpoint"),
        (["--max-memory", "lots"], "'lots' is no size"),
    ],
)
def test_what_does_not_go_with_a_checkpoint_is_a_usage_error(
    invoke: Invoke, tmp_path: Path, arguments: list[str], says: str
) -> None:
    call = ["prune", "--checkpoint", tmp_path, "--out", tmp_path / "small", *arguments]
    failed(invoke(*call), says)


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(
    invoke: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    said = invoke("prune", "--checkpoint", tmp_path, "--out", tmp_path / "small")
    failed(said, "does not say which model it is of")


@pytest.mark.parametrize("name", ["local-dir:/tmp", "hf-hub:someone/model", 5, "no_such_model"])
def test_a_checkpoint_does_not_send_for_a_model_from_elsewhere(
    invoke: Invoke, tmp_path: Path, name: object
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    said = invoke("prune", "--checkpoint", tmp_path, "--out", tmp_path / "small")
    failed(said, "does not say which model it is of")


def test_a_name_in_a_message_does_not_write_to_the_terminal(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "plan.json").write_text(json.dumps({"format": "\x1b]0;title\x07"}))
    said = invoke("inspect", tmp_path / "model")
    failed(said, "has format")
    assert "\x1b" not in said.stderr and "\x07" not in said.stderr


@pytest.mark.parametrize("text", ["[" * 100_000, "\x00", "null"])
def test_a_record_beside_a_model_that_is_none_is_one_sentence(
    invoke: Invoke, tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    failed(invoke("prune", "--checkpoint", tmp_path, "--out", tmp_path / "small"), "config.json")


def test_prune_needs_a_model_or_a_checkpoint(invoke: Invoke, tmp_path: Path) -> None:
    failed(invoke("prune", "--out", tmp_path / "small"), "name a MODEL")


def test_a_configuration_of_larger_buffers_than_weights_is_refused(
    invoke: Invoke, tmp_path: Path
) -> None:
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    sizes = {"img_size": 4096, "depth": 1}  # positions of 65,536 patches, by pairs
    said = {"architecture": "beit_base_patch16_224", "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(said))
    failed(invoke("prune", "--checkpoint", tmp_path, "--out", tmp_path / "small"), "of buffers")
