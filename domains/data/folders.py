"""Reads `ROOT/<domain>/<class>/<image>`: nothing is returned unless every image of it decodes.

What counts: folders at the first level are domains, at the second classes. Names that start with
a dot and loose files beside those folders (licences, lists) are not read, but a loose image there
is an error, since it would silently be left out. In a class folder every file must be an image.
"""

import difflib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

from depgraph import DepgraphError
from domains.data.images import IMAGE_SUFFIXES, verify_image
from domains.running.progress import progress_bar


@dataclass(frozen=True)
class Sample:
    """One image file and the index of its class in `DomainData.classes`."""

    path: Path
    label: int


@dataclass(frozen=True)
class DomainData:
    """All domains of one folder; they have the same classes, in the same (sorted) order."""

    root: Path
    classes: tuple[str, ...]
    samples: dict[str, tuple[Sample, ...]]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain names, sorted."""
        return tuple(self.samples)


def load_domains(root: str | Path, *, verify: bool = True, progress: bool = False) -> DomainData:
    """List and verify a folder of images by domain and class.

    Parameters
    ----------
    root : path
        Folder in the layout `ROOT/<domain>/<class>/<image>`, as PACS and Office-Home come.
    verify : bool
        Decode every image now (in threads), so that a broken one stops the run before training.
    progress : bool
        Show a progress bar on standard error while verifying.

    Returns
    -------
    DomainData
        Domains, classes and files sorted by name, so that labels do not depend on the machine.

    Raises
    ------
    DepgraphError
        No domains, an empty class, a class that one domain lacks, a file that is no readable
        image: the text names the first one found.
    """
    root = Path(root)
    if root.is_file():
        raise DepgraphError(f"{root} is a file; 'data unpack' makes a folder of an archive")
    if not root.is_dir():
        raise DepgraphError(f"no folder {root}; give the ROOT of ROOT/<domain>/<class>/<image>")
    # Sorted by name, so that neither labels nor results depend on the file system.
    listing = {folder.name: _list_classes(folder) for folder in _subfolders(root)}
    if not listing:
        raise DepgraphError(f"{root} has no domain folders; expected ROOT/<domain>/<class>/<image>")
    classes = _common_classes(root, listing)
    samples = {
        domain: tuple(
            Sample(path, label) for label, name in enumerate(classes) for path in by[name]
        )
        for domain, by in listing.items()
    }
    if verify:
        _verify([sample.path for domain in samples.values() for sample in domain], progress)
    return DomainData(root, classes, samples)


def check_name(name: str, known: Iterable[str], what: str, where: str | Path) -> None:
    """Raise an error with near names unless `name` is one of `known`."""
    known = tuple(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one of these"
    raise DepgraphError(f"unknown {what} '{name}' in {where}, which has {', '.join(known)}; {hint}")


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DepgraphError(f"cannot list {folder}: {error.strerror}") from error


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to what is not there."""
    return path.is_symlink() and not path.exists()


def _subfolders(folder: Path) -> list[Path]:
    entries = _visible(folder)
    for path in entries:
        if leads_nowhere(path):
            raise DepgraphError(f"{path} is a link to nothing; mend or remove it")
        if not path.is_dir() and path.suffix.lower() in IMAGE_SUFFIXES:
            raise DepgraphError(
                f"image {path} is not in a class folder; move it to ROOT/<domain>/<class>/<image>"
            )
    return [path for path in entries if path.is_dir()]


def _list_classes(domain: Path) -> dict[str, list[Path]]:
    by_class = {folder.name: _visible(folder) for folder in _subfolders(domain)}
    if not by_class:
        raise DepgraphError(f"domain {domain} has no class folders; add some or remove the folder")
    for name, paths in by_class.items():
        if not paths:
            raise DepgraphError(
                f"class '{name}' is empty in domain '{domain.name}' ({domain / name}); "
                "add images or remove the class from every domain"
            )
        for path in paths:
            if path.is_dir():
                raise DepgraphError(f"{path} is a folder where an image was expected; move it away")
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DepgraphError(f"{path} is not an image file; move it out of the class folder")
    return by_class


def _common_classes(root: Path, listing: dict[str, dict[str, list[Path]]]) -> tuple[str, ...]:
    classes = tuple(sorted({name for by_class in listing.values() for name in by_class}))
    for domain, by_class in listing.items():
        for name in classes:
            if name not in by_class:
                having = ", ".join(other for other, by in listing.items() if name in by)
                raise DepgraphError(
                    f"class '{name}' is missing from domain '{domain}' of {root} "
                    f"(it is in {having}); add it there or remove it from the others"
                )
    if len(classes) < 2:
        raise DepgraphError(f"{root} has one class only ('{classes[0]}'); two or more are needed")
    return classes


def _verify(paths: Sequence[Path], progress: bool) -> None:
    threads = min(8, (cpu_count() or 1) + 1)
    with ThreadPoolExecutor(threads) as pool, progress_bar(progress) as bar:
        task = bar.add_task("verify images", total=len(paths))
        try:
            for _ in pool.map(verify_image, paths):
                bar.advance(task)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # at the first broken image, or Ctrl-C
