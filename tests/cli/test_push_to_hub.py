from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError

import depgraph
from tests.cli.conftest import TINY, Invoke
from tests.depgraph.models import images


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub in a directory, at the border of the hub's client."""
    root = tmp_path / "hub"

    def upload_folder(*, repo_id: str, folder_path: Path, **_: Any) -> None:
        shutil.copytree(folder_path, root / repo_id)

    def hf_hub_download(repo_id: str, filename: str, **_: Any) -> str:
        if not (root / repo_id).exists():
            raise OSError("no network")
        if not (root / repo_id / filename).exists():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(root / repo_id / filename)

    def snapshot_download(repo_id: str, **_: Any) -> str:
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **kwargs: None)
    for function in (upload_folder, hf_hub_download, snapshot_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return root


@pytest.fixture
def small(invoke: Invoke, tmp_path: Path) -> Path:
    invoke("prune", *TINY, "--metric=l2", "--out", tmp_path / "small")
    return tmp_path / "small"


def test_a_pushed_model_is_loaded_from_the_hub_bit_for_bit(
    invoke: Invoke, small: Path, hub: Path
) -> None:
    result = invoke("push-to-hub", small, "me/half", "--json")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in json.loads(result.stdout)["files"]
    loaded, own = depgraph.load("hf-hub:me/half"), depgraph.load(small)
    assert torch.equal(loaded.eval()(images()), own.eval()(images()))
    assert depgraph.plans_of(loaded) == depgraph.plans_of(own)
    shown = invoke("inspect", "hf-hub:me/half", "--json")
    assert json.loads(shown.stdout)["params"] == sum(p.numel() for p in own.parameters())
    served = invoke("export", "hf-hub:me/half", "--format=pt2", "--no-check")
    assert served.exit_code == 2 and "--out" in served.stderr


def test_a_repository_in_a_directory_is_complete(
    invoke: Invoke, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repository"
    result = invoke("push-to-hub", small, "me/half", "--local-dir", out)
    assert result.exit_code == 0, result.output
    depgraph.load(out)
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_classes"]
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # its weights started at random
    text = card.text
    assert "## How it was made" in text and "| parameters |" in text
    assert 'depgraph.load("hf-hub:me/half")' in text
    assert str(tmp_path) not in text  # folders are private
    again = invoke("push-to-hub", small, "me/half", "--local-dir", out)
    assert again.exit_code == 1 and "not empty" in again.stderr


def test_the_card_of_a_run_has_the_accuracy_on_each_domain(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    quick = ["--epochs=0", "--dense-epochs=0", "--bench-seconds=0", "--metric=l2"]
    run = tmp_path / "run"
    ran = invoke("run", *TINY, "--data", data, "--target=wool", *quick, "--out", run, "--json")
    assert ran.exit_code == 0, ran.output
    result = invoke("push-to-hub", run, "me/half", "--local-dir", tmp_path / "repository")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    assert "accuracy, wool (never seen in training)" in card.text
    measured = {found.dataset_name: found for found in card.data.eval_results or ()}
    row = json.loads((run / "result.json").read_text())
    assert {name: found.metric_value for name, found in measured.items()} == row["pruned"][
        "accuracy"
    ]
    kinds = {name: found.metric_name for name, found in measured.items()}
    assert kinds["wool"] == "accuracy, unseen domain"
    assert kinds["ink"] == kinds["clay"] == "accuracy, source domain"
    assert "Unseen domain: wool" in card.text and "Source domains: clay, ink" in card.text
    assert "nothing was selected" in card.text


def test_the_card_says_what_was_selected_on_what(
    invoke: Invoke, small: Path, data: Path, tmp_path: Path
) -> None:
    train = ["--data", data, "--target=wool", "--epochs=2", "--batch-size=6", "--recipe=strong"]
    tuned = invoke("finetune", small, *train, "--json")
    assert tuned.exit_code == 0, tuned.output
    best = json.loads(tuned.stdout)["best_epoch"]
    result = invoke("push-to-hub", small, "me/half", "--local-dir", tmp_path / "repository")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "repository" / "README.md")
    assert f"epoch {best} of 2, chosen by the mean accuracy on held-out images" in card.text
    assert len(card.data.eval_results or ()) == 3
    assert invoke("prune", *TINY, "--metric=l1", "--out", small).exit_code == 0
    invoke("push-to-hub", small, "me/half", "--local-dir", tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")  # another model: not its accuracy
    assert not again.data.eval_results and "no accuracy was measured" in again.text


def test_a_licence_that_nobody_knows_has_to_be_said(
    invoke: Invoke, tmp_path: Path, small: Path
) -> None:
    depgraph.save(torch.nn.Linear(3, 2), tmp_path / "mine")
    result = invoke("push-to-hub", tmp_path / "mine", "me/mine")
    assert result.exit_code == 1 and "--license" in result.stderr
    assert invoke("push-to-hub", small, "mine").exit_code == 2


def test_a_repository_that_cannot_be_had_or_is_not_ours_is_a_sentence(hub: Path) -> None:
    with pytest.raises(depgraph.DepgraphError, match="could not be had"):
        depgraph.load("hf-hub:me/nothing")
    (hub / "timm" / "resnet").mkdir(parents=True)
    with pytest.raises(depgraph.DepgraphError, match=r"no plan\.json"):
        depgraph.load("hf-hub:timm/resnet")
