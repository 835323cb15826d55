"""A contact sheet of a folder of images: a row for each class, some images of each domain."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from depgraph import DepgraphError
from domains import DataReport, evenly
from domains.data.images import read_image

_PAPER, _INK, _EMPTY = "white", "#24292f", "#e6e8eb"
_GAP = 4
_LETTERS = 13


def contact_sheet(report: DataReport, count: int = 3, side: int = 64) -> Image.Image:
    """Draw a few images of each class and domain; a cell that has none stays grey.

    Parameters
    ----------
    report : DataReport
    count : int
        Images of each class in each domain, evenly spaced by file name.
    side : int
        Pixels of the square that each is fitted into.
    """
    font = ImageFont.load_default(_LETTERS)
    left = 2 * _GAP + max(int(font.getlength(name)) for name in report.classes)
    top = 2 * _GAP + 2 * _LETTERS
    width = count * (side + _GAP) + 2 * _GAP
    height = side + _GAP
    size = (left + width * len(report.files), top + height * len(report.classes) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (domain, by_class) in enumerate(report.files.items()):
        x = left + column * width
        total = sum(map(len, by_class.values()))
        draw.text((x, _GAP), f"{domain}\n{total:,} images", _INK, font)
        for row, paths in enumerate(by_class.values()):
            y = top + row * height
            chosen = evenly(paths, count)
            for place in range(count):
                corner = (x + place * (side + _GAP), y)
                if place < len(chosen):
                    _paste(sheet, draw, chosen[place], corner, side)
                else:
                    draw.rectangle((corner, (corner[0] + side, y + side)), _EMPTY)
    for row, name in enumerate(report.classes):
        draw.text((_GAP, top + row * height + (side - _LETTERS) // 2), name, _INK, font)
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, path: Path, corner: tuple[int, int], side: int
) -> None:
    try:
        image = read_image(path)
    except DepgraphError:  # one of the report's problems: crossed out here
        x, y = corner
        draw.rectangle((x, y, x + side, y + side), outline="#cf222e")
        draw.line((x, y, x + side, y + side), "#cf222e")
        draw.line((x, y + side, x + side, y), "#cf222e")
        return
    image = ImageOps.contain(image, (side, side))
    sheet.paste(
        image, (corner[0] + (side - image.width) // 2, corner[1] + (side - image.height) // 2)
    )
