"""Whether a folder of images is complete and sound: all that is wrong with it, not the first."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from os import cpu_count
from pathlib import Path

from depgraph import DepgraphError
from domains.data.folders import check_name, leads_nowhere
from domains.data.images import IMAGE_SUFFIXES, verify_image
from domains.data.known import KNOWN, KnownData, recognise
from domains.running.progress import progress_bar

Listing = dict[str, dict[str, tuple[Path, ...]]]
"""Image files by domain and class."""


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found.

    Attributes
    ----------
    root : Path
    known : KnownData or None
        The published data set that the folder was compared with.
    files : dict of str to dict of str to tuple of Path
        Image files by domain and class; each class is there in each domain, empty or not.
    problems : tuple of str
        A sentence each; empty where nothing is wrong.
    """

    root: Path
    known: KnownData | None
    files: Listing
    problems: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that any domain has, sorted."""
        return tuple(next(iter(self.files.values()), ()))

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images by domain and class."""
        return {
            domain: {name: len(paths) for name, paths in by_class.items()}
            for domain, by_class in self.files.items()
        }


def check_data(root: str | Path, *, known: str | None = None, progress: bool = False) -> DataReport:
    """Look for all that is wrong with `root/<domain>/<class>/<image>`.

    Parameters
    ----------
    root : path
    known : str or None
        Compare with this data set of `KNOWN`; "none": with none; None: with the one it looks like.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    DataReport
        With the problems found: images or classes that are missing or too many by the published
        counts, empty classes, classes that a domain lacks, files that are no readable image or in
        the wrong place, and the same file in two domains, which lets a target leak into training.

    Raises
    ------
    DepgraphError
        When there is no folder, no domain in it, or no such known data set.

    Notes
    -----
    Every image is decoded once. Copies are found by SHA-256 of the file, so that one that was
    encoded anew is not.
    """
    root = Path(root)
    if known not in (None, "none"):
        check_name(str(known), KNOWN, "data set", "this program")
    misplaced: list[str] = []
    files = _list(root, misplaced)
    if not files:
        raise DepgraphError(f"{root} has no domain folders; expected ROOT/<domain>/<class>/<image>")
    classes = list(next(iter(files.values())))
    data = recognise(list(files), classes) if known is None else KNOWN.get(known)
    problems = [*_gaps(files), *misplaced]
    if data is not None:
        problems += _against(files, data)
    problems += _broken(files, progress)
    problems += _shared(files)
    return DataReport(root, data, files, tuple(problems))


def _list(root: Path, problems: list[str]) -> Listing:
    if not root.is_dir():
        raise DepgraphError(f"no folder {root}; give the ROOT of ROOT/<domain>/<class>/<image>")
    found: dict[str, dict[str, tuple[Path, ...]]] = {}
    for domain in _folders(root, problems):
        found[domain.name] = {}
        for folder in _folders(domain, problems):
            images = []
            for path in _visible(folder):
                if path.is_dir():
                    problems.append(f"{path} is a folder where an image was expected")
                elif path.suffix.lower() not in IMAGE_SUFFIXES:
                    problems.append(f"{path} is not an image file")
                else:
                    images.append(path)
            found[domain.name][folder.name] = tuple(images)
    classes = sorted({name for by_class in found.values() for name in by_class})
    return {
        domain: {name: by_class.get(name, ()) for name in classes}
        for domain, by_class in found.items()
    }


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DepgraphError(f"cannot list {folder}: {error.strerror}") from error


def _folders(folder: Path, problems: list[str]) -> list[Path]:
    entries = _visible(folder)
    problems += [
        f"image {path} is not in a class folder"
        for path in entries
        if not path.is_dir() and path.suffix.lower() in IMAGE_SUFFIXES
    ]
    problems += [f"{path} is a link to nothing" for path in filter(leads_nowhere, entries)]
    return [path for path in entries if path.is_dir()]


def _gaps(files: Listing) -> Iterator[str]:
    for domain, by_class in files.items():
        for name, paths in by_class.items():
            if not paths:
                having = ", ".join(other for other, by in files.items() if by[name]) or "no domain"
                yield f"class '{name}' has no images in domain '{domain}' (it has some in {having})"


def _against(files: Listing, data: KnownData) -> Iterator[str]:
    """Compare with the published names and counts."""
    domains = {folder: data.domain_of(folder) for folder in files}
    classes = {folder: data.class_of(folder) for folder in next(iter(files.values()))}
    for what, names, wanted in (
        ("domain", domains, tuple(data.domains)),
        ("class", classes, data.classes),
    ):
        yield from (
            f"{what} '{n}' of {data.name} is missing" for n in wanted if n not in names.values()
        )
        yield from (
            f"{what} '{n}' is not one of {data.name}'s" for n, k in names.items() if k is None
        )
    for folder, domain in domains.items():
        if domain is None:
            continue
        by_class = dict(zip(data.classes, data.per_class.get(domain, ()), strict=False))
        wrong = [
            _difference(f"class '{name}' of domain '{folder}'", len(paths), by_class[usual])
            for name, paths in files[folder].items()
            if (usual := classes[name]) in by_class and len(paths) != by_class[str(usual)]
        ]
        yield from wrong
        count, expected = sum(map(len, files[folder].values())), data.domains[domain]
        if expected is not None and count != expected and not wrong:
            yield _difference(f"domain '{folder}'", count, expected)
    total = sum(len(paths) for by in files.values() for paths in by.values())
    if None in data.domains.values() and total != data.total:
        yield _difference("the whole", total, data.total)


def _difference(what: str, count: int, expected: int) -> str:
    less = (
        f"{expected - count:,} are missing"
        if count < expected
        else f"{count - expected:,} too many"
    )
    return f"{what} has {count:,} images, the published one {expected:,}: {less}"


def _broken(files: Listing, progress: bool) -> list[str]:
    paths = [path for by in files.values() for several in by.values() for path in several]
    threads = min(8, (cpu_count() or 1) + 1)
    with ThreadPoolExecutor(threads) as pool, progress_bar(progress) as bar:
        task = bar.add_task("verify images", total=len(paths))
        found = []
        try:
            for problem in pool.map(_problem, paths):
                bar.advance(task)
                if problem is not None:
                    found.append(problem)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # on Ctrl-C
    return found


def _problem(path: Path) -> str | None:
    try:
        verify_image(path)
    except DepgraphError as error:
        return str(error)
    return None


def _shared(files: Listing) -> Iterator[str]:
    """Name the pairs of domains that have the same files; one pair of files stands for all."""
    by_size: defaultdict[int, list[tuple[str, Path]]] = defaultdict(list)
    for domain, by_class in files.items():
        for path in (path for paths in by_class.values() for path in paths):
            if path.exists():
                by_size[path.stat().st_size].append((domain, path))
    pairs: defaultdict[tuple[str, str], list[tuple[Path, Path]]] = defaultdict(list)
    for same_size in by_size.values():
        if len({domain for domain, _ in same_size}) < 2:
            continue
        by_content: defaultdict[bytes, dict[str, Path]] = defaultdict(dict)
        for domain, path in same_size:
            by_content[_digest(path)].setdefault(domain, path)
        for copies in by_content.values():
            for first, second in combinations(sorted(copies), 2):
                pairs[first, second].append((copies[first], copies[second]))
    for (first, second), found in sorted(pairs.items()):
        yield (
            f"{len(found):,} images are in both '{first}' and '{second}', which leaks a target "
            f"into training: {found[0][0]} is {found[0][1]}"
        )


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def evenly(paths: Sequence[Path], count: int) -> list[Path]:
    """Return `count` files, or all of fewer, evenly spaced in their order."""
    taken = min(count, len(paths))
    return [paths[i * len(paths) // taken] for i in range(taken)]
