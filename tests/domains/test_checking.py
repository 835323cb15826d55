import shutil

import pytest
from PIL import Image

from benchmarks.synthetic import write_synthetic
from depgraph import DepgraphError
from domains import KNOWN, check_data
from domains.data.known import KnownData


@pytest.fixture
def small_pacs(tmp_path, monkeypatch):
    """PACS with two or more images a class, and its counts published as such."""
    root = write_synthetic("PACS", tmp_path / "PACS", share=0.01, side=8)
    pacs = KNOWN["PACS"]
    per_class = {d: tuple(max(2, round(0.01 * n)) for n in c) for d, c in pacs.per_class.items()}
    domains = {domain: sum(counts) for domain, counts in per_class.items()}
    small = KnownData(
        "PACS", pacs.classes, domains, sum(domains.values()), "here", pacs.aliases, per_class
    )
    monkeypatch.setitem(KNOWN, "PACS", small)
    return root


def test_a_complete_copy_is_recognised_and_has_no_problems(small_pacs):
    report = check_data(small_pacs)
    assert report.known is not None and report.known.name == "PACS"
    assert report.problems == ()
    assert report.counts["sketch"]["horse"] == 8


def test_other_spellings_are_recognised_too(small_pacs):
    (small_pacs / "art_painting").rename(small_pacs / "Art Painting")
    assert check_data(small_pacs).problems == ()


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


def test_missing_images_are_told_by_domain_and_class(small_pacs):
    (small_pacs / "sketch/horse/pic_001.png").unlink()
    assert only(check_data(small_pacs).problems) == (
        "class 'horse' of domain 'sketch' has 7 images, the published one 8: 1 are missing"
    )


def test_too_many_images_are_told(small_pacs):
    image = small_pacs / "sketch/horse/pic_001.png"
    Image.effect_noise((8, 8), 9).save(image.with_name("more.png"))
    assert "1 too many" in only(check_data(small_pacs).problems)


def test_a_missing_domain_and_a_foreign_one_are_told(small_pacs):
    (small_pacs / "sketch").rename(small_pacs / "watercolour")
    problems = check_data(small_pacs).problems
    assert "domain 'sketch' of PACS is missing" in problems
    assert "domain 'watercolour' is not one of PACS's" in problems


def test_a_part_is_sound_when_compared_with_nothing(small_pacs):
    shutil.rmtree(small_pacs / "sketch")
    report = check_data(small_pacs, known="none")
    assert report.known is None and report.problems == ()


def test_broken_images_are_all_named(small_pacs):
    for name in ("photo/dog/pic_001.png", "cartoon/house/pic_002.png"):
        (small_pacs / name).write_bytes(b"no image")
    problems = check_data(small_pacs).problems
    assert sum("is broken" in problem for problem in problems) == 2


def test_the_same_file_in_two_domains_is_told_whatever_its_name(small_pacs):
    source = small_pacs / "photo/dog/pic_001.png"
    shutil.copy(source, small_pacs / "sketch/dog/pic_001.png")
    problem = only(check_data(small_pacs).problems)
    assert problem.startswith("1 images are in both 'photo' and 'sketch'")
    assert str(source) in problem


def test_an_empty_class_and_files_in_the_wrong_place_are_told(make_tree):
    root = make_tree(per_class=1)
    (root / "art/red/000.png").unlink()
    (root / "photo/red/notes.txt").write_text("x")
    shutil.copy(root / "art/blue/000.png", root / "art/loose.png")
    problems = check_data(root).problems
    assert "class 'red' has no images in domain 'art' (it has some in cartoon, photo)" in problems
    assert any("notes.txt is not an image file" in problem for problem in problems)
    assert any("loose.png is not in a class folder" in problem for problem in problems)


def test_domains_of_which_only_the_total_is_known_are_compared_by_it(tmp_path):
    root = write_synthetic("TerraIncognita", tmp_path / "terra", share=0.002, side=8)
    assert "the whole has 80 images, the published one 24,788" in only(check_data(root).problems)


def test_no_folder_no_domains_and_unknown_names_are_errors(tmp_path):
    with pytest.raises(DepgraphError, match="no folder"):
        check_data(tmp_path / "none")
    with pytest.raises(DepgraphError, match="no domain folders"):
        check_data(tmp_path)
    with pytest.raises(DepgraphError, match=r"'PACKS'.*did you mean PACS"):
        check_data(tmp_path, known="PACKS")
