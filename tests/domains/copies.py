"""Small data sets packed in the ways that people have them."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Each way of leading out of the folder, or of being no plain file, that an archive may try.
BAD_NAMES = (
    "../art/dog/a.png",
    "PACS/../../art/dog/a.png",
    "/tmp/art/dog/a.png",
    "C:/art/dog/a.png",
    "..\\art\\dog\\a.png",
)


def png(colour: tuple[int, int, int] = (200, 30, 30), side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def files_of(root: Path) -> dict[str, bytes]:
    """The content of each file by its path in `root`; hidden ones left out."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def zipped(path: Path, files: Mapping[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def tarred(path: Path, files: Mapping[str, bytes], top: str = "") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def hdf5(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra: data)")
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels
    return path
