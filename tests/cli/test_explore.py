from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import depgraph
from cli.showing.explore import block_of, explore
from tests.cli.conftest import TINY, Invoke
from tests.depgraph.models import images, tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


def test_a_group_says_which_op_made_each_coupling() -> None:
    graph = depgraph.trace(tiny(), images())
    groups = {group["name"]: group for group in explore(graph)}
    hidden = groups["blocks.0.mlp.hidden"]
    ends = {(c["op"], end) for c in hidden["couplings"] for end in (c["first"], c["second"])}
    assert ("aten.linear", "blocks.0.mlp.fc2.weight[1]") in ends
    names = {module["name"] for module in hidden["modules"]}
    assert {"blocks.0.mlp.fc2"} <= names and hidden["place"] == "blocks.0"
    assert all({e["first"], e["second"]} <= names and e["ops"] for e in hidden["edges"])


def test_the_modules_of_a_deep_model_are_summed_up_by_block() -> None:
    graph = depgraph.trace(tiny(depth=12), images())
    (embed,) = [group for group in explore(graph) if group["name"] == "embed"]
    assert len(embed["modules"]) < 20 and len(embed["couplings"]) > 40


def test_a_block_is_a_path_up_to_its_last_number() -> None:
    assert block_of("stages.1.blocks.2.attn") == "stages.1.blocks.2"
    assert block_of("head") == "head" and block_of("") == "model"


def test_inspect_shows_what_a_ratio_and_a_plan_remove(invoke: Invoke, tmp_path: Path) -> None:
    page = tmp_path / "groups.html"
    result = invoke("inspect", *TINY, "--ratio=0.5", "--html", page, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["metric"] == "l2" and row["pruned"]["macs"] < row["macs"]
    assert any(group["kept"] < group["size"] for group in row["groups"])
    text = page.read_text()
    assert '"removed": [' in text and "share kept" in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)

    invoke("prune", *TINY, "--metric=l2", "--out", tmp_path / "small")
    planned = invoke("inspect", *TINY, "--plan", tmp_path / "small" / "plan.json", "--json")
    kept = {g["name"]: g["kept"] for g in json.loads(planned.stdout)["groups"]}
    assert kept == {g["name"]: g["kept"] for g in row["groups"]}


def test_a_plan_of_another_model_and_a_metric_without_data_are_sentences(
    invoke: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text("{}")
    result = invoke("inspect", *TINY, "--plan", tmp_path / "plan.json")
    assert result.exit_code == 1 and "no plan" in result.stderr
    invoke("prune", *TINY, "--metric=l2", "--model-arg=mlp_ratio=2", "--out", tmp_path / "small")
    result = invoke("inspect", *TINY, "--plan", tmp_path / "small" / "plan.json")
    assert result.exit_code == 1 and "for another model: group 'blocks.0.mlp" in result.stderr
    result = invoke("inspect", *TINY, "--metric=taylor")
    assert result.exit_code == 1 and "--data" in result.stderr


CLICK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const i = groups.findIndex(g => g.name === "blocks.1.mlp.hidden");
  el("map").emit("plotly_click", { points: [{ customdata: i }] });
  document.body.insertAdjacentHTML("beforeend", `<p id="heard">${el("group").innerText}</p>`);
}, 500));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_click_in_a_browser_shows_members_and_couplings(invoke: Invoke, tmp_path: Path) -> None:
    page = tmp_path / "groups.html"
    assert invoke("inspect", *TINY, "--ratio=0.5", "--html", page).exit_code == 0
    page.write_text(page.read_text().replace("</body>", CLICK + "</body>"))
    shown = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert re.search(r'id="heard">\s*blocks\.1\.mlp\.hidden', shown)
    lists = shown.partition('id="lists">')[2]
    assert "blocks.1.mlp.fc1.weight" in lists and "aten." in lists
    assert shown.count("plotly") > 3 and "the plan keeps" in shown
