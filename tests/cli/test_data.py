from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from benchmarks.synthetic import write_synthetic
from tests.cli.conftest import Invoke
from tests.domains.copies import files_of, zipped


def test_an_archive_is_unpacked_checked_and_shown(invoke: Invoke, tmp_path: Path) -> None:
    data = write_synthetic("Office-Home", tmp_path / "data", share=1e-3, side=8)
    archive = zipped(tmp_path / "office.zip", files_of(data), "OfficeHomeDataset_10072016/")
    out = tmp_path / "OfficeHome"
    result = invoke("data", "unpack", archive, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert sum(json.loads(result.stdout)["images"].values()) == 4 * 65 * 2

    sheet = tmp_path / "sheet.png"
    checked = invoke("data", "check", out, "--sheet", sheet, "--json")
    assert checked.exit_code == 1  # far fewer images than published
    row = json.loads(checked.stdout)
    assert row["known"] == "Office-Home" and row["expected"]["all"] == 15588
    assert "domain 'Real World' has 130 images" in " ".join(row["problems"])
    with Image.open(sheet) as image:
        assert image.height > 65 * 64 and image.width > 4 * 3 * 64


def test_a_sound_folder_exits_0_and_counts_by_class_and_domain(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    result = invoke("data", "check", data)
    assert result.exit_code == 0, result.output
    assert "nothing is wrong" in result.stdout and "wool" in result.stdout


def test_what_is_wrong_is_printed_in_sentences(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    (data / "ink/dot/0.png").write_bytes(b"x")
    result = invoke("data", "check", data, "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 1
    assert "is broken" in result.stdout and "1 problems" in result.stdout
    assert (tmp_path / "sheet.png").exists()


def test_bad_input_of_data_is_one_sentence(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    for args in (
        ("unpack", tmp_path / "none.zip", "--out", tmp_path / "x"),
        ("unpack", zipped(tmp_path / "a.zip", {"../a/b/c.png": b""}), "--out", tmp_path / "x"),
        ("check", tmp_path / "none"),
    ):
        result = invoke("data", *args)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert result.stderr.startswith("depgraph-prune: ")
    assert invoke("data", "check", data, "--as", "PACKS").exit_code == 2
    assert not (tmp_path / "x").exists()
