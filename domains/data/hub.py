"""Hugging Face `datasets` copies with an image, a domain and a label column, saved or on the hub.

Encoded images are copied byte for byte; a file's ending is that of its format.
"""

import io
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from depgraph import DepgraphError
from domains.data.archives import Member

HUB_PREFIX = "hf:"

_COLUMNS = {
    "image": ("image", "img"),
    "domain": ("domain", "environment"),
    "label": ("label", "class", "category"),
}
_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WEBP": ".webp"}
_ENDINGS |= {"TIFF": ".tif", "PPM": ".ppm"}


class HubSource:
    """The images of a data set that `datasets.load_from_disk` or `load_dataset` reads."""

    def __init__(self, name: str) -> None:
        datasets = _datasets()
        self.name, self.skipped = name, 0
        self.members: list[Member] = []
        self._tables: list[tuple[str, Any, str, list[Member]]] = []
        for part, table in _load(datasets, name).items():
            columns = {kind: _column(table, kind, name) for kind in _COLUMNS}
            table = table.cast_column(columns["image"], datasets.Image(decode=False))
            domains, labels = (_names(table, columns[kind]) for kind in ("domain", "label"))
            size = table.data.nbytes // max(1, len(table))  # of one image, about
            members = [
                Member(domain, label, f"{part}_{index:06d}", size)
                for index, (domain, label) in enumerate(zip(domains, labels, strict=True))
            ]
            self._tables.append((part, table, columns["image"], members))
            self.members += members
        if not self.members:
            raise DepgraphError(f"{name} has no rows")

    def read(self, unwanted: Container[str]) -> Iterator[tuple[Member, bytes]]:
        """Yield the content of each image file."""
        for part, table, column, members in self._tables:
            for index, member in enumerate(members):
                if any(member.path + ending in unwanted for ending in _ENDINGS.values()):
                    continue
                where = f"row {index} of '{part}' of {self.name}"
                content = _content(table[index][column], where)
                yield replace(member, file=member.file + _ending(content, where)), content


def is_saved_dataset(folder: Path) -> bool:
    """Say whether `datasets` saved something to this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load(datasets: Any, name: str) -> dict[str, Any]:
    try:
        if name.startswith(HUB_PREFIX):
            found = datasets.load_dataset(name.removeprefix(HUB_PREFIX))
        else:
            found = datasets.load_from_disk(name)
    except (OSError, ValueError, RuntimeError) as error:  # not there, no network, another format
        raise DepgraphError(f"cannot load the data set {name}: {error}") from error
    return dict(found) if isinstance(found, dict) else {"all": found}


def _column(table: Any, kind: str, name: str) -> str:
    for column in _COLUMNS[kind]:
        if column in table.column_names:
            return column
    raise DepgraphError(
        f"{name} has no column '{kind}', only {', '.join(table.column_names)}; rename one with "
        "datasets' rename_column and save it to disk"
    )


def _names(table: Any, column: str) -> Sequence[str]:
    values, names = table[column], getattr(table.features[column], "names", None)
    return [str(value) if names is None else names[value] for value in values]


def _content(cell: dict[str, Any], where: str) -> bytes:
    content = cell["bytes"]
    if content is not None:
        return bytes(content)
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise DepgraphError(f"the image of {where} is not there: {error}") from error


def _ending(content: bytes, where: str) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _ENDINGS[image.format or ""]
    except (OSError, KeyError) as error:
        raise DepgraphError(f"{where} is no image of a format that is read here") from error


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DepgraphError(
            "this data set needs Hugging Face datasets; install it with: "
            "pip install 'depgraph-prune[data]'"
        ) from error
    return datasets
