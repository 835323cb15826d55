"""The embedded benchmark: scikit-learn's handwritten digits drawn in four ways, as a folder.

The same digit has the same file name in every domain, so split by stem. It needs no network.
"""

import glob
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from depgraph import DepgraphError
from domains.data.digit_styles import STYLES, enlarge
from domains.running.progress import progress_bar
from domains.running.random import derive_seed

MANIFEST = "digits.json"
_VERSION = 1


def write_digits(
    root: str | Path, *, seed: int = 0, per_class: int | None = None, progress: bool = False
) -> Path:
    """Write the digits as `root/<domain>/<class>/<image>.png`, 32 x 32 RGB.

    Parameters
    ----------
    root : path
        Must be new, empty, or written by this function with the same arguments; then nothing is
        written again. All or nothing: the folder appears when it is complete.
    seed : int
        Decides papers, colours, textures, angles, and which digits are taken.
    per_class : int or None
        Digits of each class; None: all (174 to 183 of each, 1,797 together).
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Path
        `root`, for `load_domains`.

    Raises
    ------
    DepgraphError
        The folder holds something else, or cannot be written; or `per_class` is out of range.

    Notes
    -----
    Domains: ``scan`` (dark ink on paper), ``photo`` (inverted on a piece of a photograph),
    ``outline`` (the contour, a thin line on white), ``poster`` (rotated, slanted, coloured).

    References
    ----------
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the digits). Ganin
    et al., "Domain-Adversarial Training of Neural Networks", 2016 (MNIST-M: ``photo``).
    """
    from sklearn.datasets import load_digits  # large, and for the digits alone

    root = Path(root)
    digits = load_digits()
    chosen = _choose(digits.target, seed, per_class)
    manifest = {
        "made_by": "domains.write_digits",
        "version": _VERSION,
        "seed": seed,
        "per_class": per_class,
        "images": len(STYLES) * len(chosen),
    }
    try:
        if _is_complete(root, manifest):
            return root
        part = root.with_name(f".{root.name}.{secrets.token_hex(8)}.part")
        try:
            _write_all(part, digits, chosen, seed, progress)
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _put(part, root, manifest)
        except OSError:
            if not _is_complete(root, manifest):  # by another process, which cleared ours away
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _clear_left(root)
    except OSError as error:
        raise DepgraphError(
            f"cannot write the digits to {root} ({error.strerror}); choose another folder"
        ) from error
    return root


def _put(part: Path, root: Path, manifest: dict[str, object]) -> None:
    """Rename the drawn folder, unless another process has put the same one there."""
    try:
        os.replace(part, root)  # over an empty folder too
    except OSError:
        if not root.is_dir() or _is_complete(root, manifest):
            raise
        shutil.rmtree(root)  # ours and incomplete, as checked
        os.replace(part, root)


def _clear_left(root: Path) -> None:
    """Remove what calls that were killed have left; one still at work finds the root complete."""
    known = {*STYLES, MANIFEST}
    for left in root.parent.glob(f".{glob.escape(root.name)}.*part"):
        if left.is_dir() and {path.name for path in left.iterdir()} <= known:
            shutil.rmtree(left, ignore_errors=True)


def _choose(labels: np.ndarray, seed: int, per_class: int | None) -> list[int]:
    smallest = int(np.bincount(labels).min())
    if per_class is not None and not 2 <= per_class <= smallest:
        raise DepgraphError(f"per_class is {per_class}; it must be from 2 to {smallest}, or None")
    rng = np.random.default_rng(derive_seed(seed, "choose"))
    taken = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(10)]
    return sorted(int(index) for part in taken for index in part)


def _is_complete(root: Path, manifest: dict[str, object]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DepgraphError(
            f"{root} holds something else than the digits; choose another folder"
        ) from error
    if found != manifest:
        raise DepgraphError(
            f"{root} holds digits of other settings ({MANIFEST} there); choose another folder"
        )
    return sum(1 for _ in root.glob("*/*/*.png")) == manifest["images"]


def _write_all(part: Path, digits: object, chosen: list[int], seed: int, progress: bool) -> None:
    images, labels = digits.images, digits.target  # type: ignore[attr-defined]
    for domain in STYLES:
        for label in range(10):
            (part / domain / str(label)).mkdir(parents=True)
    with progress_bar(progress) as bar:
        for index in bar.track(chosen, description="draw digits"):
            ink = enlarge(images[index])
            for domain, draw in STYLES.items():
                rng = np.random.default_rng(derive_seed(seed, domain, index))
                path = part / domain / str(labels[index]) / f"digit_{index:04d}.png"
                draw(ink, rng).save(path, compress_level=1)
