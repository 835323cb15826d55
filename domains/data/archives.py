"""Zips and tars of images by domain and class: every name is checked before anything is read.

An archive is refused whole when it has one member that leads out of its folder, is a link or a
device, is encrypted, or declares more than the limits: nothing of it has been written then.
"""

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from depgraph import DepgraphError
from domains.data.images import IMAGE_SUFFIXES

MAX_FILES = 2_000_000
"""Members of one archive; DomainNet, the largest known, has 586,575 images."""

MAX_FILE_BYTES = 2**28
"""Of one image: 256 MiB, decoded from memory."""


@dataclass(frozen=True)
class Member:
    """An image to be written as `<domain>/<class>/<file>`; `size` in bytes is what is declared."""

    domain: str
    class_name: str
    file: str
    size: int

    @property
    def path(self) -> str:
        """Relative to the ROOT of the data."""
        return f"{self.domain}/{self.class_name}/{self.file}"


class Source(Protocol):
    """Where images come from: what it holds is known, and checked, before any is read."""

    name: str
    members: list[Member]
    skipped: int

    def read(self, unwanted: Container[str]) -> Iterator[tuple[Member, bytes]]:
        """Yield the content of each member, in order; those with a path in `unwanted` left out."""


@dataclass(frozen=True)
class Limits:
    """What an archive may declare; `inside` is the folder of it to read."""

    max_bytes: int
    inside: str | None = None


class ZipSource:
    """The images of a zip file."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.name = path, path.name
        try:
            with zipfile.ZipFile(path) as archive:
                files = list(_checked_zip(archive, self.name))
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DepgraphError(f"cannot read the archive {path}: {error}") from error
        self.places, self.skipped = _placed(files, self.name, limits)
        self.members = list(self.places.values())

    def read(self, unwanted: Container[str]) -> Iterator[tuple[Member, bytes]]:
        """Yield the content of each member, in the order of the archive."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                for inner, member in self.places.items():
                    if member.path not in unwanted:
                        yield member, archive.read(inner)
        except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
            raise _damaged(self.path, error) from error


class TarSource:
    """The images of a tar file, compressed or not."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.name = path, path.name
        try:
            with tarfile.open(path) as archive:
                files = list(_checked_tar(archive, self.name, limits))
        except (OSError, tarfile.TarError, zlib.error, EOFError) as error:
            raise DepgraphError(f"cannot read the archive {path}: {error}") from error
        self.places, self.skipped = _placed(files, self.name, limits)
        self.members = list(self.places.values())

    def read(self, unwanted: Container[str]) -> Iterator[tuple[Member, bytes]]:
        """Yield the content of each member in one pass through the archive."""
        try:
            with tarfile.open(self.path) as archive:
                for info in archive:
                    member = self.places.get(info.name.removeprefix("./"))
                    if member is None or not info.isreg() or member.path in unwanted:
                        continue
                    content = archive.extractfile(info)
                    if content is not None:
                        yield member, content.read()
        except (OSError, tarfile.TarError, zlib.error, EOFError) as error:
            raise _damaged(self.path, error) from error


def _damaged(path: Path, error: Exception) -> DepgraphError:
    return DepgraphError(f"the archive {path} is damaged ({error}); get it again")


def _checked_zip(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, int]]:
    for info in archive.infolist():
        _check_path(info.orig_filename, name)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DepgraphError(_refusal(name, info.filename, "is a link or a device"))
        if info.flag_bits & 1:
            raise DepgraphError(f"{name} is encrypted; unpack it yourself with its password")
        if not info.is_dir():
            yield info.filename, info.file_size


def _checked_tar(archive: tarfile.TarFile, name: str, limits: Limits) -> Iterator[tuple[str, int]]:
    total = 0
    for count, info in enumerate(archive):
        _check_path(info.name, name)
        if not (info.isreg() or info.isdir()):
            raise DepgraphError(_refusal(name, info.name, "is a link or a device"))
        total += info.size
        # A compressed archive is decompressed to find its members: stop at the first too many.
        _check_size(total, count, name, limits)
        if info.isreg():
            yield info.name.removeprefix("./"), info.size


def _check_path(inner: str, name: str) -> None:
    windows = PureWindowsPath(inner)
    if windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DepgraphError(_refusal(name, inner, "leads out of its folder"))
    if "\0" in inner or "\\" in inner:
        raise DepgraphError(_refusal(name, inner, "has a name that is no portable path"))


def _refusal(name: str, inner: str, why: str) -> str:
    return f"{name} is not unpacked: its member {inner!r} {why}; get the archive from its publisher"


def _check_size(total: int, count: int, name: str, limits: Limits) -> None:
    if count > MAX_FILES:
        raise DepgraphError(f"{name} has more than {MAX_FILES:,} files; no data set known here has")
    if total > limits.max_bytes:
        raise DepgraphError(
            f"{name} would unpack to more than {total / 2**30:.1f} GiB, above the limit of "
            f"{limits.max_bytes / 2**30:.1f} GiB; raise it with --max-size if you trust the archive"
        )


def _placed(
    files: Sequence[tuple[str, int]], name: str, limits: Limits
) -> tuple[dict[str, Member], int]:
    """Where each image goes, by its name in the archive, and how many other files there are."""
    inside = PurePosixPath(limits.inside or ".").parts
    _check_size(sum(size for _, size in files), len(files), name, limits)
    places: dict[str, Member] = {}
    tops: dict[tuple[str, ...], str] = {}
    seen: set[str] = set()
    skipped = 0
    for inner, size in files:
        parts = PurePosixPath(inner).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        image = PurePosixPath(inner).suffix.lower() in IMAGE_SUFFIXES
        if hidden or not image or parts[: len(inside)] != inside:
            skipped += 1
            continue
        member = _member(inner, parts, size, name)
        tops.setdefault(parts[:-3], inner)
        if len(tops) > 1:
            first, second = tops.values()
            raise DepgraphError(
                f"{name} has images in several folders of domains ({first!r}, {second!r}); choose "
                "the one that holds the domains with --inside"
            )
        if member.path in seen:
            raise DepgraphError(f"{name} has two files that would be {member.path}; repair it")
        seen.add(member.path)
        places[inner] = member
    if not places:
        where = f" inside '{limits.inside}'" if limits.inside else ""
        raise DepgraphError(f"{name} has no images{where}; expected .../<domain>/<class>/<image>")
    return places, skipped


def _member(inner: str, parts: tuple[str, ...], size: int, name: str) -> Member:
    if len(parts) < 3:
        raise DepgraphError(
            f"{name} has an image outside of .../<domain>/<class>/: {inner!r}; choose the folder "
            "that holds the domains with --inside, or unpack it yourself"
        )
    if size > MAX_FILE_BYTES:
        raise DepgraphError(
            f"{name} has an image of {size / 2**20:.0f} MiB ({inner!r}), more than "
            f"{MAX_FILE_BYTES // 2**20} MiB; that is no image of a data set"
        )
    domain, class_name, file = parts[-3:]
    return Member(domain, class_name, file, size)
