"""The page of a device, from the records of the steps; what is missing is there with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.device.record import DONE, Record
from benchmarks.device.settings import Settings
from benchmarks.device.steps import FIRST, STEPS
from benchmarks.device.tables import Table
from benchmarks.pages import markdown_table

STAND_IN = "as ViT-B, DeiT-B and BEiT-B stand models of the same kinds with {width}"


def page(settings: Settings, records: Mapping[str, Record], about: Mapping[str, str]) -> str:
    """The whole page.

    Parameters
    ----------
    settings : Settings
    records : mapping of str to Record
        Of each step, by name.
    about : mapping of str to str
        ``commands``, ``commits`` and ``dates``.
    """
    facts = records[FIRST.name].facts
    card = str(facts.get("device", settings.device))
    parts = [f"# Device: {card}\n\n{_opening(settings, facts, about)}\n"]
    states = [(step.title, *_state(records[step.name])) for step in STEPS]
    parts.append("\n## Steps\n\n" + markdown_table(("step", "state", "s", "why"), _clean(states)))
    for step in STEPS:
        record = records[step.name]
        parts.append(f"\n## {step.title}\n")
        if record.state != DONE:
            parts.append(f"\n{': '.join(filter(None, _state(record)[::2]))}.\n")
        if record.rows or record.facts:
            parts += [_section(table) for table in step.tables(record)]
    return "".join(parts)


def _opening(settings: Settings, facts: Mapping[str, object], about: Mapping[str, str]) -> str:
    driver = f", driver {facts['driver']}, CUDA {facts['cuda']}" if "driver" in facts else ""
    text = (
        f"Made by {about['commands']} at commit {about['commits']}, {about['dates']}, on "
        f"{facts.get('device', settings.device)}{driver}, torch {facts.get('torch', 'unknown')}, "
        f"{facts.get('threads', '?')} CPU threads. "
        "Random weights; cuts by L2. Times are medians over rounds in which all models, and an op "
        "on one number (the *floor*), take turns; on a GPU by CUDA events around one forward, "
        "the launches included; a speed-up is the median of the rounds' own. *cudagraph* replays "
        "on the images in place. Nothing here is a median over processes."
    )
    if settings.sizes.width:
        width = ", ".join(f"{name} {value}" for name, value in settings.sizes.width.items())
        text += f" Not full size: {STAND_IN.format(width=width)}."
    if not settings.cuda:
        text += " **No GPU was at hand: this page shows that the command runs, on a CPU.**"
    return text


def _state(record: Record) -> tuple[str, str, str]:
    seconds = record.data["seconds"]
    return record.state, f"{seconds:.0f}" if seconds else "", str(record.data["reason"])


def _section(table: Table) -> str:
    says = f"\n{table.says}\n" if table.says else ""
    rows = markdown_table(table.columns, _clean(table.rows)) if table.rows else ""
    return f"{says}\n{rows}"


def _clean(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Reasons come from libraries: a line break or a bar in one would end the table."""
    return [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
