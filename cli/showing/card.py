"""The model card of a repository on the Hugging Face hub: what the model is, and how good."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

import depgraph
from cli import escapes
from cli.output import percent
from cli.running.kept import selection_says
from cli.running.models import example_inputs
from cli.running.saved import read_record
from cli.showing.speed import speed_says


def parent_licence(model: nn.Module) -> str | None:
    """The licence of the weights that a model was made from, as timm records it."""
    licence = (getattr(model, "pretrained_cfg", None) or {}).get("license")
    return licence if isinstance(licence, str) and licence else None


def records(place: Path) -> dict[str, Any]:
    """What `prune`, `finetune` or `run` wrote down of a saved model; empty where there is nothing.

    Raises
    ------
    DepgraphError
        When a record is damaged.
    """
    run, prune, tuned = (
        *(place.parent / "result.json", place / "prune.json", place / "finetune.json"),
    )
    if place.name == "pruned" and run.exists():  # of the model that it fine-tuned last
        return read_record(run)
    record = read_record(prune) if prune.exists() else {}
    if not tuned.exists():
        return record
    later = read_record(tuned)
    training = {"epochs": len(later.get("history", [])), "best_epoch": later.get("best_epoch")}
    return {
        **later,
        **record,
        "target_domain": later.get("target_domain"),
        "pruned": {**record.get("pruned", {}), "accuracy": later.get("accuracy")},
        "training": {"pruned": training},
    }


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
    record = escapes.readable(record)
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
    texts = escapes.templates(escapes.markdown)
    texts.filters |= {
        "percent": percent,
        "thousands": "{:,}".format,
        "fenced": escapes.fenced,
    }
    accuracy = record.get("pruned", {}).get("accuracy") or {}
    target = record.get("target_domain")
    return texts.get_template("card.md.j2").render(
        metadata=escapes.Raw(data.to_yaml().strip()),
        repo=repo,
        use=f"import depgraph\n\nmodel = depgraph.load({json.dumps(f'hf-hub:{repo}')}).eval()",
        licence=licence,
        architecture=cfg.get("architecture") or record.get("model") or type(model).__name__,
        parent=parent,
        record=record,
        accuracy=accuracy,
        target=target,
        sources=[name for name in accuracy if name != target],
        speed=speed_says(record["speedup"], record.get("speedup_interval"))
        if record.get("speedup")
        else None,
        selection=selection_says(record),
        size=tuple(example.shape[2:]),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=depgraph.count_macs(model, example),
        plans=plans,
        command=without_folders(record.get("command", "")),
    )


def _results(record: dict[str, Any]) -> list[EvalResult] | None:
    accuracies = record.get("pruned", {}).get("accuracy") or {}
    target = record.get("target_domain")
    return [
        EvalResult(
            task_type="image-classification",
            # the hub files results of one type and split under the first one's name
            dataset_type=name,
            dataset_name=name,
            dataset_split="all images" if name == target else "held-out images",
            metric_type="accuracy",
            metric_name="accuracy, unseen domain" if name == target else "accuracy, source domain",
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
