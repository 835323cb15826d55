from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depgraph import DepgraphError
from domains import check_data, load_domains


def test_domains_classes_and_files_come_sorted_with_labels_by_class_name(make_tree):
    data = load_domains(make_tree(("photo", "art"), per_class=2))
    assert data.domains == ("art", "photo")
    assert data.classes == ("blue", "green", "red")
    names = [(s.path.parent.name, s.path.name, s.label) for s in data.samples["art"]]
    assert names == [
        (name, f"{i:03d}.png", label) for label, name in enumerate(data.classes) for i in (0, 1)
    ]


def test_hidden_files_and_loose_lists_are_not_read(make_tree):
    root = make_tree(per_class=2)
    for path in ("README.md", ".git/x", "art/labels.txt", "art/red/.DS_Store"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("no image")
    assert {len(samples) for samples in load_domains(root).samples.values()} == {6}


@pytest.mark.parametrize("place", ["art", "photo/red"])
def test_a_link_to_a_folder_that_is_gone_is_no_folder_less(make_tree, place):
    root = make_tree(per_class=2)
    (root / place).rename(root.parent / "away")
    (root / place).symlink_to(root.parent / "gone")
    with pytest.raises(DepgraphError, match=f"{place} is a link to nothing"):
        load_domains(root)
    assert f"{root / place} is a link to nothing" in check_data(root).problems


def test_endings_count_in_any_case(make_tree):
    root = make_tree(per_class=2)
    (root / "art/red/000.png").rename(root / "art/red/000.PNG")
    assert len(load_domains(root).samples["art"]) == 6


def spoil_png(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def spoil_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    spoil_png(path)  # the header still reads well: only decoding finds it


def no_image_at_all(path: Path) -> None:
    path.write_bytes(b"this is no image")


def deep_image(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [spoil_png, spoil_jpeg, no_image_at_all, deep_image, empty_file, Path.unlink]
)
def test_an_image_that_cannot_be_read_is_named(make_tree, spoil):
    root = make_tree(per_class=3)
    path = root / "cartoon/green/001.png"
    spoil(path)
    if spoil is Path.unlink:
        path.symlink_to(root / "nowhere.png")
    with pytest.raises(DepgraphError, match=r"cartoon.green.001\.png"):
        load_domains(root)


def test_verification_can_be_left_out(make_tree):
    root = make_tree(per_class=2)
    no_image_at_all(root / "art/red/000.png")
    assert len(load_domains(root, verify=False).samples["art"]) == 6


def test_an_empty_class_is_named_with_its_domain(make_tree):
    root = make_tree(per_class=1)
    (root / "art/red/000.png").unlink()
    with pytest.raises(DepgraphError, match="class 'red' is empty in domain 'art'"):
        load_domains(root)


def test_a_class_that_one_domain_lacks_is_named_with_those_that_have_it(make_tree):
    root = make_tree(per_class=1)
    (root / "photo/red").rename(root / "photo/rot")
    with pytest.raises(DepgraphError, match=r"class 'rot' is missing from domain 'art'.*in photo"):
        load_domains(root)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("art/red/notes.txt", "is not an image file"),
        ("art/red/more/x.png", "is a folder where an image was expected"),
        ("art/loose.png", "is not in a class folder"),
        ("loose.jpg", "is not in a class folder"),
    ],
)
def test_a_file_in_the_wrong_place_is_named(make_tree, path, text):
    root = make_tree(per_class=1)
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_bytes(b"x")
    with pytest.raises(DepgraphError, match=text) as error:
        load_domains(root)
    assert path.split("/x.png")[0].split("/")[-1] in str(error.value)


def test_a_domain_without_classes_is_named(make_tree):
    root = make_tree(per_class=1)
    (root / "void").mkdir()
    with pytest.raises(DepgraphError, match="void has no class folders"):
        load_domains(root)


def test_a_root_without_domains_or_no_root_is_named(tmp_path):
    with pytest.raises(DepgraphError, match="has no domain folders"):
        load_domains(tmp_path)
    with pytest.raises(DepgraphError, match=r"no folder .*nowhere"):
        load_domains(tmp_path / "nowhere")


def test_one_class_is_too_few(tmp_path):
    (tmp_path / "art/red").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "art/red/a.png")
    with pytest.raises(DepgraphError, match="one class only"):
        load_domains(tmp_path)


def test_an_archive_where_a_folder_is_expected_is_answered_with_the_way_out(tmp_path):
    (tmp_path / "PACS.zip").write_bytes(b"PK")
    with pytest.raises(DepgraphError, match="data unpack"):
        load_domains(tmp_path / "PACS.zip")
