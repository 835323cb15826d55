"""From the archives that people have to `ROOT/<domain>/<class>/<image>`, which all else reads.

Zips and tars of any depth above the domains, PACS's hdf5 files, and Hugging Face data sets. An
interrupted call leaves `.ROOT.part`, and the same call again goes on from there.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depgraph import DepgraphError
from depgraph.files import replacing
from domains.data.archives import Limits, Member, Source, TarSource, ZipSource
from domains.data.hdf5 import by_domain
from domains.data.hub import HUB_PREFIX, HubSource, is_saved_dataset
from domains.running.progress import progress_bar

MANIFEST = ".unpacked.json"
"""Written into ROOT: what it was made from, so that the same call again has nothing to do."""

DEFAULT_LIMIT = 64 * 2**30
"""Bytes that one call may write; DomainNet, the largest known data set, has about 17 GiB."""


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` did.

    Attributes
    ----------
    root : Path
    images : dict of str to int
        By domain.
    written : int
        Images written by this call; those that were there are not written again.
    skipped : int
        Files of the archives that are no images: lists, licences.
    """

    root: Path
    images: dict[str, int]
    written: int
    skipped: int


def unpack(
    sources: Sequence[str | Path],
    root: str | Path,
    *,
    max_bytes: int = DEFAULT_LIMIT,
    inside: str | None = None,
    progress: bool = False,
) -> Unpacked:
    """Write the images of archives as `root/<domain>/<class>/<image>`.

    Parameters
    ----------
    sources : sequence of path or str
        Zip and tar files, PACS's hdf5 files, folders that `datasets` saved, or `hf:owner/name`.
        Several are put together: the six zips of DomainNet, the files of PACS's domains.
    root : path
        Must be new, empty, or made by this function from the same sources; then nothing is
        written again. All or nothing: the folder appears when it is complete.
    max_bytes : int
        Refuse to write more than this.
    inside : str or None
        The folder within the archives that holds the domains, where that is not clear.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Unpacked

    Raises
    ------
    DepgraphError
        A source that cannot be read, leads out of the folder, declares too much for the limit or
        the disk, or does not hold images by domain and class; a folder with something else in it.

    Notes
    -----
    Encoded images are copied byte for byte. PACS's hdf5 holds pixels, which become PNG files.

    References
    ----------
    Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017 (PACS and its hdf5).
    """
    root = Path(root).absolute()
    opened = _open(sources, Limits(max_bytes, inside))
    manifest = _manifest(opened)
    images = _count(opened)
    skipped = sum(source.skipped for source in opened)
    if _is_complete(root, manifest):
        return Unpacked(root, images, 0, skipped)
    part = root.with_name(f".{root.name}.part")
    try:
        _check_room(part, opened, max_bytes)
        _prepare(part, manifest)
        written = _write(part, opened, progress)
        if root.exists():
            root.rmdir()  # empty, as checked
        os.replace(part, root)
    except OSError as error:
        raise DepgraphError(
            f"cannot write to {root} ({error.strerror}); choose another folder, or make room and "
            "call again: what is done is kept"
        ) from error
    return Unpacked(root, images, written, skipped)


def _open(sources: Sequence[str | Path], limits: Limits) -> list[Source]:
    opened: list[Source] = []
    hdf5: list[Path] = []
    for given in sources:
        path = Path(given)
        if str(given).startswith(HUB_PREFIX) or is_saved_dataset(path):
            opened.append(HubSource(str(given)))
        elif not path.is_file():
            what = "is a folder that datasets did not save" if path.is_dir() else "is not there"
            raise DepgraphError(
                f"{path} {what}; give archives, a folder saved by datasets, or hf:owner/name"
            )
        elif path.suffix.lower() in (".hdf5", ".h5"):
            hdf5.append(path)
        elif zipfile.is_zipfile(path):
            opened.append(ZipSource(path, limits))
        elif tarfile.is_tarfile(path):
            opened.append(TarSource(path, limits))
        else:
            raise DepgraphError(f"{path} is no zip, tar or hdf5 file; unpack it yourself")
    opened += by_domain(hdf5)
    _check_members(opened)
    return opened


def _check_members(opened: Sequence[Source]) -> None:
    first: dict[str, str] = {}
    for source in opened:
        for member in source.members:
            for name in (member.domain, member.class_name, member.file):
                if not name or name.startswith(".") or any(char in name for char in "/\\\0"):
                    raise DepgraphError(
                        f"{source.name} has {name!r} as the name of a domain, class or file; "
                        "rename it"
                    )
            other = first.setdefault(member.path, source.name)
            if other != source.name:
                raise DepgraphError(
                    f"{other} and {source.name} both have {member.path}; give one of them"
                )


def _manifest(opened: Sequence[Source]) -> dict[str, object]:
    digest = hashlib.sha256()
    for source in opened:
        for member in source.members:
            digest.update(f"{member.path}\0{member.size}\n".encode())
    return {
        "made_by": "domains.unpack",
        "version": 1,
        "sources": [source.name for source in opened],
        "images": sum(len(source.members) for source in opened),
        "digest": digest.hexdigest(),
    }


def _count(opened: Sequence[Source]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for source in opened:
        for member in source.members:
            counts[member.domain] = counts.get(member.domain, 0) + 1
    return dict(sorted(counts.items()))


def _is_complete(root: Path, manifest: dict[str, object]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if _read_manifest(root) == manifest:
        found = sum(1 for path in root.glob("*/*/*") if not path.name.startswith("."))
        if found == manifest["images"]:
            return True
        raise DepgraphError(
            f"{root} was made from the same sources but has {found:,} of {manifest['images']:,} "
            "files; remove the folder and call again"
        )
    raise DepgraphError(f"{root} holds something else already; choose another folder")


def _read_manifest(folder: Path) -> object:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _prepare(part: Path, manifest: dict[str, object]) -> None:
    """Keep what an interrupted call with the same sources left, and nothing else."""
    if part.exists() and _read_manifest(part) != manifest:
        if any(part.iterdir()) and not (part / MANIFEST).exists():
            raise DepgraphError(f"{part} is in the way, and not of this program; move it away")
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _check_room(part: Path, opened: Sequence[Source], max_bytes: int) -> None:
    total = sum(member.size for source in opened for member in source.members)
    if total > max_bytes:
        raise DepgraphError(
            f"the sources would unpack to {total / 2**30:.1f} GiB together, above the limit of "
            f"{max_bytes / 2**30:.1f} GiB; raise it with --max-size if you trust them"
        )
    there = sum(path.stat().st_size for path in part.glob("*/*/*"))
    free = shutil.disk_usage(next(folder for folder in part.parents if folder.exists())).free
    if total - there > free:
        raise DepgraphError(
            f"{(total - there) / 2**30:.1f} GiB would be written where {free / 2**30:.1f} GiB are "
            f"free ({part.parent}); make room or choose another disk"
        )


def _write(part: Path, opened: Sequence[Source], progress: bool) -> int:
    done = {path.relative_to(part).as_posix() for path in part.glob("*/*/*")}
    for left in (path for path in done if path.endswith(".tmp")):  # by a call that was killed
        (part / left).unlink()
    done = {path for path in done if not path.endswith(".tmp")}
    written = 0
    with progress_bar(progress) as bar:
        total = sum(len(source.members) for source in opened)
        task = bar.add_task("unpack", total=total, completed=len(done))
        for source in opened:
            for member, content in source.read(done):
                _write_one(part, member, content)
                written += 1
                bar.advance(task)
    return written


def _write_one(part: Path, member: Member, content: bytes) -> None:
    folder = part / member.domain / member.class_name
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / member.file) as temporary:
        temporary.write_bytes(content)
