"""Saved models on the Hugging Face hub: ``hf-hub:owner/name``, or ``hf-hub:owner/name@revision``.

A repository holds the files of `depgraph.save`; no code is read from it.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from depgraph.errors import DepgraphError
from depgraph.storing.manifest import NAME

PREFIX = "hf-hub:"

FILES = (NAME, "config.json", "model.safetensors.index.json", "*.safetensors")
"""What a saved model is made of."""


def is_hub_name(name: object) -> bool:
    """Whether a name is of a repository on the hub."""
    return str(name).startswith(PREFIX)


def fetch(name: str) -> Path:
    """The files of a saved model on the hub, from the hub's cache where they are there already.

    Parameters
    ----------
    name : str
        ``"hf-hub:owner/name"``, with ``"@revision"`` for a branch, tag or commit.

    Returns
    -------
    Path
        A directory for `depgraph.load`.

    Raises
    ------
    DepgraphError
        When the repository cannot be had, or holds no model that this tool saved.
    """
    repo, revision = _parts(name)
    try:
        huggingface_hub.hf_hub_download(repo, NAME, revision=revision)
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(FILES)
        )
    except LocalEntryNotFoundError as error:
        raise _unavailable(name, error) from error
    except EntryNotFoundError as error:
        raise DepgraphError(
            f"'{name}' has no {NAME}: depgraph.save did not write it; models of timm are "
            "made by timm.create_model"
        ) from error
    except HFValidationError as error:
        raise DepgraphError(f"'{name}' is no name on the hub; write hf-hub:owner/name") from error
    except OSError as error:  # the hub's own errors among them
        raise _unavailable(name, error) from error
    return Path(found)


def is_saved(name: str) -> bool:
    """Whether a repository is known to hold a model that this tool saved, not one of timm's.

    One that cannot be had now is not: timm may have it in its cache, and says so if not.
    """
    repo, revision = _parts(name)
    try:
        huggingface_hub.hf_hub_download(repo, NAME, revision=revision)
    except (EntryNotFoundError, HFValidationError, OSError):
        return False
    return True


def _parts(name: str) -> tuple[str, str | None]:
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    return repo, revision or None


def _unavailable(name: str, error: Exception) -> DepgraphError:
    return DepgraphError(
        f"'{name}' could not be had from the Hugging Face hub ({type(error).__name__}); check the "
        "name and the network, or give a timm name with --weights FILE, or with --no-pretrained"
    )
