"""Names that are markup, formulas or no UTF-8, in every format that results are written in."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from cli import escapes
from tests.cli.conftest import TINY, Invoke
from tests.cli.test_report import result, write

NAMES = (
    "=1+1",
    "a|b",
    "a\\b",
    "a\nb",
    "<img src=x onerror=alert(1)>",
    "50%_of~$x$^{2}#&",
    "no\udce9utf8",
    "[x](y) `code` *b* _i_",
    "\\input{/etc/passwd}",
)


@pytest.fixture
def study(invoke: Invoke, tmp_path: Path) -> Path:
    """Files of a study whose models, metrics and domains have such names."""
    rows = [result("ink", model=name, metric=name, domains=("ink", name)) for name in NAMES]
    rows += [result("ink", model=name, pruned=0.6, scope=name) for name in NAMES]
    root = write(tmp_path / "runs", *rows)
    failed = root / "a|b<i>\udce9"
    failed.mkdir()
    (failed / "error.txt").write_text("it <b>failed</b> | at\\once")
    answer = invoke("report", root, "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    return tmp_path / "out"


def test_tables_in_markdown_keep_their_columns_and_hold_no_html(study: Path) -> None:
    text = (study / "report.md").read_text()
    assert not re.findall(r"<(?!!-- made by)", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert r"a\|b" in text and r"a\\b" in text and "a b" in text and r"no\\udce9utf8" in text
    assert r"\[x\](y)" in text and r"\_i\_" in text


def test_tables_in_latex_hold_no_command_of_a_name(study: Path) -> None:
    text = (study / "tables.tex").read_text()
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert r"a\textbackslash{}b" in text
    assert r"50\%\_of\textasciitilde{}\$x\$\textasciicircum{}\{2\}\#\&" in text
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows if " & " in line}) == 1
    assert not any(line.startswith(("[", "*")) for line in text.splitlines())
    commands = set(re.findall(r"\\[a-zA-Z]+", text))
    assert commands <= {
        *(r"\begin", r"\end", r"\caption", r"\toprule", r"\midrule", r"\bottomrule"),
        *(r"\endhead", r"\pm", r"\times", r"\Delta", r"\usepackage"),
        *(r"\textbackslash", r"\textasciitilde", r"\textasciicircum", r"\textless"),
        *(r"\textgreater", r"\textbar"),
    }


def test_tables_in_csv_hold_no_formula_and_numbers_stay_numbers(study: Path) -> None:
    for name in ("table.csv", "runs.csv"):
        rows = list(csv.DictReader(io.StringIO((study / name).read_text())))
        assert len({len(row) for row in rows}) == 1
        assert {row["model"] for row in rows} >= {"'=1+1", "a|b", "a b"}
        assert all(float(row["unseen_drop"]) == pytest.approx(-10) for row in rows)
        cells = [cell for row in rows for cell in row.values()]
        assert not [cell for cell in cells if cell[:1] in tuple("=+@\t")]
        assert all(float(cell) < 0 for cell in cells if cell.startswith("-"))


def test_pages_hold_no_html_of_a_name(study: Path) -> None:
    text = (study / "report.html").read_text()
    assert "<img src=x" not in text and "&lt;img src=x" in text
    assert "<b>failed" not in text and r"no\udce9utf8" in text


@pytest.mark.parametrize("text", ["+1 (x)", "-a", "@sum", "\t=1", "\r=1", " =1", "＝1"])
def test_what_a_spreadsheet_would_work_out_is_text(text: str) -> None:
    assert escapes.cell(text).startswith("'") and not set("\t\r\n") & set(escapes.cell(text))


@pytest.mark.parametrize("value", ["-0.5", -0.5, 3, "1e-5", "vit", None])
def test_what_it_would_not_work_out_is_left_alone(value: object) -> None:
    assert escapes.cell(value) == value


def test_code_does_not_end_its_own_fence() -> None:
    text = escapes.fenced("a\n```\n# not a heading", "sh")
    assert text == "````sh\na\n```\n# not a heading\n````"


def test_a_folder_whose_name_is_no_utf8_can_be_reported_on(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    (data / "ink").rename(data / "in\udce9k")
    checked = invoke("data", "check", data)
    assert checked.exit_code == 0 and r"in\udce9k" in checked.stdout, checked.output
    out = tmp_path / "run"
    quick = ["--epochs=0", "--dense-epochs=0", "--bench-seconds=0", "--metric=l2"]
    ran = invoke(
        "run", *TINY, "--data", data, "--target=wool", *quick, "--no-compensate", "--out", out
    )
    assert ran.exit_code == 0, ran.output
    assert r"in\udce9k" in (out / "report.html").read_text()
    card = invoke("push-to-hub", out, "me/half", "--local-dir", tmp_path / "hub")
    assert card.exit_code == 0, card.output
    assert r"in\\udce9k" in (tmp_path / "hub" / "README.md").read_text()
