"""``push-to-hub``: a saved model as a repository on the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import huggingface_hub

from cli.options.shared import json_option
from cli.output import emit, environment, table, write_text
from cli.running.made import force_option
from cli.running.saved import load_saved, saved_in
from cli.showing.card import model_card, parent_licence, records
from depgraph import DepgraphError
from depgraph.files import replacing
from depgraph.storing.checkpoint import INDEX, weight_files


@click.command("push-to-hub")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--license", "licence", help="Of the weights  [what timm says of the parent].")
@click.option("--private", is_flag=True, help="Only the owner sees a new repository.")
@click.option("--revision", help="Branch to push to.")
@click.option(
    "--local-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the repository here, new or empty, and upload nothing.",
)
@force_option
@json_option
def push_to_hub(
    directory: Path,
    repo: str,
    licence: str | None,
    private: bool,
    revision: str | None,
    local_dir: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Share the model in DIR as OWNER/NAME, for depgraph.load("hf-hub:OWNER/NAME").

    The token is that of `hf auth login`, or of the variable HF_TOKEN.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise click.BadParameter(f"'{repo}' is not of the form OWNER/NAME")
    model = load_saved(directory)
    place = saved_in(directory) or directory
    licence = licence or parent_licence(model)
    if licence is None:
        raise DepgraphError(
            f"'{directory}' does not say the licence of its parent's weights; say it with "
            "--license, as in --license apache-2.0"
        )
    card = model_card(model, repo, licence, records(place))
    if local_dir is not None:
        if local_dir.exists() and any(local_dir.iterdir()) and not force:
            raise DepgraphError(
                f"'{local_dir}' is not empty; choose another --local-dir, or write there all the "
                "same with --force"
            )
        _write(place, card, local_dir)
        url, files = str(local_dir), sorted(path.name for path in local_dir.iterdir())
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write(place, card, Path(folder))
            files = sorted(path.name for path in Path(folder).iterdir())
            url = _upload(Path(folder), repo, private, revision)
    result: dict[str, Any] = {"repo": repo, "url": url, "license": licence, "files": files}
    result |= environment()
    name = f"hf-hub:{repo}" if local_dir is None else str(local_dir)
    rows = [("files", ", ".join(files)), ("licence", licence), ("load with", name)]
    emit(result, as_json, table(f"written to {url}", ["", ""], rows))


def _write(place: Path, card: str, folder: Path) -> None:
    """The files of a saved model, as they are, and its card."""
    optional = [name for name in (INDEX, "buffers.safetensors") if (place / name).exists()]
    names = (*weight_files(place), "plan.json", "config.json", *optional)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            with replacing(folder / name) as temporary:
                shutil.copyfile(place / name, temporary)
    except OSError as error:
        raise DepgraphError(
            f"cannot write '{folder}': {error.strerror}; choose another place"
        ) from error
    write_text(folder / "README.md", card)


def _upload(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    """Upload a repository's folder in one commit; its address."""
    try:
        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            huggingface_hub.create_branch(repo, branch=revision, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Model saved by depgraph-prune",
        )
    except OSError as error:  # the hub's own errors among them
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DepgraphError(
            f"the hub did not take '{repo}': {text}; see `hf auth whoami`, or write the "
            "repository with --local-dir"
        ) from error
    return str(getattr(commit, "repo_url", repo))
