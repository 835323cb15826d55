"""Synthetic copies of the known data sets: their folders, names and counts, with small images.

For tests of a whole study without the data: `python -m benchmarks.synthetic PACS --out DIR`. A
class shows as a colour and each domain adds noise and a ground of its own, so that there is
something to learn, and no number means anything.
"""

import colorsys
from pathlib import Path

import click
import numpy as np
from PIL import Image

from domains import KNOWN, KnownData, progress_bar


def write_synthetic(
    name: str,
    root: str | Path,
    *,
    share: float = 1.0,
    side: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write `root/<domain>/<class>/<image>.png` with the published names and counts.

    Parameters
    ----------
    name : str
        Of `domains.KNOWN`.
    root : path
    share : float
        Of each class's images; at least two are written.
    side : int
        Pixels of an image.
    seed : int
    progress : bool
        Show a progress bar on standard error.
    """
    known, root = KNOWN[name], Path(root)
    rng = np.random.default_rng(seed)
    with progress_bar(progress) as bar:
        task = bar.add_task(f"write {name}", total=None)
        for place, domain in enumerate(known.domains):
            for label, count in enumerate(class_counts(known, domain)):
                folder = root / domain / known.classes[label]
                folder.mkdir(parents=True)
                for index in range(max(2, round(share * count))):
                    image = _image(label / len(known.classes), place, side, rng)
                    image.save(folder / f"pic_{index + 1:03d}.png", compress_level=1)
                    bar.advance(task)
    return root


def class_counts(known: KnownData, domain: str) -> tuple[int, ...]:
    """Images of each class: as published, else the domain's or an equal share of the total."""
    if domain in known.per_class:
        return known.per_class[domain]
    published = known.domains[domain]
    if published is None:
        place = list(known.domains).index(domain)
        published = _even(known.total, len(known.domains))[place]
    return _even(published, len(known.classes))


def _even(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def _image(hue: float, place: int, side: int, rng: np.random.Generator) -> Image.Image:
    ground = np.full((side, side, 3), 60.0 + 50 * place)
    start, half = rng.integers(0, side // 2, 2), side // 2
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    ground[start[0] : start[0] + half, start[1] : start[1] + half] = colour
    noisy = ground + rng.normal(0, 15 + 10 * place, ground.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@click.command()
@click.argument("name", type=click.Choice(list(KNOWN)))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--side", type=click.IntRange(4), default=32, show_default=True, help="Pixels.")
@click.option("--seed", default=0)
def main(name: str, out: Path, share: float, side: int, seed: int) -> None:
    """Write a synthetic copy of the data set NAME."""
    write_synthetic(name, out, share=share, side=side, seed=seed, progress=True)
    click.echo(out)


if __name__ == "__main__":
    main()
