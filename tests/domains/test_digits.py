import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion
from sklearn.neighbors import KNeighborsClassifier

from depgraph import DepgraphError
from domains import load_domains, write_digits
from domains.data import digits
from domains.data.images import read_image

DOMAINS = ("outline", "photo", "poster", "scan")


def pixels(root: Path, domain: str) -> tuple[np.ndarray, np.ndarray]:
    samples = load_domains(root, verify=False).samples[domain]
    images = np.stack([np.asarray(read_image(s.path), np.float32) for s in samples])
    return images, np.array([s.label for s in samples])


def test_four_domains_hold_the_same_digits_as_small_colour_images(digits_root):
    data = load_domains(digits_root)
    assert data.domains == DOMAINS
    assert data.classes == tuple("0123456789")
    names = [{(s.label, s.path.name) for s in part} for part in data.samples.values()]
    assert all(part == names[0] for part in names)
    assert len(names[0]) == 200
    with Image.open(data.samples["scan"][0].path) as image:
        assert image.mode == "RGB"
    assert pixels(digits_root, "photo")[0].shape == (200, 32, 32, 3)


def test_the_same_file_is_the_same_digit_in_every_domain(digits_root):
    ink = pixels(digits_root, "scan")[0].mean(-1) < 140
    lines = 255 - pixels(digits_root, "outline")[0].mean(-1)
    rings = [binary_dilation(digit) & ~binary_erosion(digit) for digit in ink]
    alike = np.corrcoef(np.reshape(rings, (200, -1)), np.reshape(lines, (200, -1)))[:200, 200:]
    assert (alike.argmax(1) == np.arange(200)).mean() > 0.8


def _blur(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 8, 4, 8, 4).mean((2, 4))


@pytest.mark.parametrize(("domain", "least"), [("scan", 0.8), ("outline", 0.5)])
def test_the_digits_can_be_read_within_a_domain(digits_root, domain, least):
    images, labels = pixels(digits_root, domain)
    flat = _blur(images.mean(-1)).reshape(200, -1)
    nearest = KNeighborsClassifier(3).fit(flat[::2], labels[::2])
    assert nearest.score(flat[1::2], labels[1::2]) > least


def test_what_reads_one_domain_does_not_read_the_others(digits_root):
    images, labels = pixels(digits_root, "scan")
    nearest = KNeighborsClassifier(3).fit(images.reshape(200, -1), labels)
    for domain in ("outline", "photo", "poster"):
        others, truth = pixels(digits_root, domain)
        assert nearest.score(others.reshape(200, -1), truth) < 0.6


def test_only_the_poster_is_colourful_and_only_photo_is_textured(digits_root):
    spread = {name: np.ptp(pixels(digits_root, name)[0], axis=-1).mean() for name in DOMAINS}
    assert max(spread["scan"], spread["outline"]) == 0
    assert spread["poster"] > 2 * spread["photo"] > 0


def test_the_same_seed_gives_the_same_files_and_another_seed_others(digits_root, tmp_path):
    again = write_digits(tmp_path / "again", per_class=20)
    for path in sorted(digits_root.glob("*/*/*.png"))[::37]:
        assert (again / path.relative_to(digits_root)).read_bytes() == path.read_bytes()
    other = write_digits(tmp_path / "other", per_class=2, seed=1)
    small = write_digits(tmp_path / "small", per_class=2, seed=0)
    names = [{path.name for path in root.glob("*/*/*.png")} for root in (other, small)]
    assert names[0] != names[1]


def test_a_complete_folder_is_not_written_again(tmp_path, monkeypatch):
    root = write_digits(tmp_path / "d", per_class=2)
    monkeypatch.setattr(digits, "_write_all", None)
    assert write_digits(root, per_class=2) == root


def test_a_folder_that_lost_files_is_written_again(tmp_path):
    root = write_digits(tmp_path / "d", per_class=2)
    lost = next(root.glob("scan/3/*.png"))
    lost.unlink()
    write_digits(root, per_class=2)
    assert lost.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_run_that_was_stopped(tmp_path, monkeypatch, error):
    def stop(part: Path, *args: object) -> None:
        (part / "scan").mkdir(parents=True)
        raise error

    monkeypatch.setattr(digits, "_write_all", stop)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else DepgraphError
    with pytest.raises(expected):
        write_digits(tmp_path / "d", per_class=2)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / ".d.part/scan").mkdir(parents=True)
    write_digits(tmp_path / "d", per_class=2)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DepgraphError, match="holds something else"):
        write_digits(tmp_path, per_class=2)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    root = write_digits(tmp_path / "d", per_class=2)
    with pytest.raises(DepgraphError, match="other settings"):
        write_digits(root, per_class=2, seed=1)
    assert json.loads((root / "digits.json").read_text())["seed"] == 0


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "d").write_text("")
    with pytest.raises(DepgraphError, match="choose another folder"):
        write_digits(tmp_path / "d", per_class=2)


@pytest.mark.parametrize("number", [0, 1, 175])
def test_more_or_fewer_digits_than_there_are_is_refused(tmp_path, number):
    with pytest.raises(DepgraphError, match="from 2 to 174"):
        write_digits(tmp_path / "d", per_class=number)
