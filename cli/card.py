"""The model card of a repository on the Hugging Face hub: what the model is, and how good."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

import depgraph
from cli.html import template
from cli.models import example_inputs
from cli.saved import read_record


def parent_licence(model: nn.Module) -> str | None:
    """The licence of the weights that a model was made from, as timm records it."""
    licence = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    return licence if isinstance(licence, str) and licence else None


def records(place: Path) -> dict[str, Any]:
    """What `prune` or `run` wrote down of a saved model; empty where there is nothing.

    Raises
    ------
    DepgraphError
        When a record is damaged.
    """
    for path in (place.parent / "result.json", place / "prune.json"):
        # the result of a run is that of the model that it fine-tuned last
        if path.exists() and (path.name == "prune.json" or place.name == "pruned"):
            return read_record(path)
    return {}


def model_card(model: nn.Module, repo: str, licence: str, record: dict[str, Any]) -> str:
    """The text of ``README.md``.

    Parameters
    ----------
    model : nn.Module
    repo : str
        ``"owner/name"``.
    licence : str
    record : dict
        See `records`.

    Returns
    -------
    str
        Markdown, with the metadata that the hub reads.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    # weights that started at random have no parent, whatever timm offers for the name
    origin = record.get("settings", {}).get("origin", record)
    parent = cfg.get("hf_hub_id") if origin.get("pretrained", True) else None
    data = ModelCardData(
        license=licence,
        library_name="depgraph-prune",
        pipeline_tag="image-classification",
        tags=["image-classification", "pruning", "timm"],
        base_model=parent,
        model_name=repo.rpartition("/")[2],
        eval_results=_results(record),
    )
    example = example_inputs(model)
    plans = depgraph.plans_of(model)
    return template("card.md.j2").render(
        metadata=data.to_yaml(),
        repo=repo,
        licence=licence,
        architecture=cfg.get("architecture") or record.get("model") or type(model).__name__,
        parent=parent,
        record=record,
        size=tuple(example.shape[2:]),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=depgraph.count_macs(model, example),
        plans=plans,
        command=without_folders(record.get("command", "")),
    )


def _results(record: dict[str, Any]) -> list[EvalResult] | None:
    accuracies = record.get("pruned", {}).get("accuracy", {})
    target = record.get("target_domain")
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="domain",
            dataset_name=f"{name} (unseen domain)" if name == target else name,
            metric_type="accuracy",
            metric_value=share,
        )
        for name, share in accuracies.items()
    ] or None


def without_folders(command: str) -> str:
    """A command line whose absolute paths are cut to their last part: folders are private."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if value.startswith(("/", "~")):
            value = Path(value).name
        words.append(f"{option}{equals}{value}")
    return shlex.join(words)
