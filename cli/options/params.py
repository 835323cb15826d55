"""Kinds of option values: what is read from a word on the command line, and what is refused."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import click
import torch
from accelerate.utils import convert_file_size_to_int

import domains
from pruners import make_metric
from pruners.choosing.choices import AUTO


def key_values(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict:
    """``key=value`` texts as a mapping, values read as Python's literals where they are."""
    parsed = {}
    for text in values:
        key, found, value = text.partition("=")
        if not found or not key.isidentifier():
            raise click.BadParameter(f"'{text}' is not of the form key=value", ctx, param)
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def words(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Words by comma, or by repeating the option."""
    found = tuple(word for value in values for word in value.split(",") if word)
    if values and not found:
        raise click.BadParameter("names nothing.", ctx, param)
    return found


def known_algorithm(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The algorithm's name, refused before any work where it is unknown."""
    if value is not None:
        domains.check_algorithm(value)
    return value


def known_metric(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The metric's name, refused before any work where it is unknown."""
    if value is not None:
        make_metric(value)
    return value


def present_device(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """The device's name, once it is known to be there; CUDA where nothing is said and it is."""
    if value is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(value)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"'{value}' is not cpu, cuda or cuda:N", ctx, param)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"'{value}' is not on this machine; use cpu", ctx, param)
    return value


def present_threads(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """The number of threads, once there is a CPU for each: torch crashes on very many."""
    cpus = os.cpu_count() or 1
    if value is not None and value > cpus:
        raise click.BadParameter(f"{value} threads on {cpus} CPUs only wait; use fewer", ctx, param)
    return value


class Bytes(click.ParamType):
    """A number of bytes, as in ``2GiB``, ``1.5GB`` or ``800MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, or a usage error."""
        try:
            count = int(convert_file_size_to_int(value))
        except ValueError:
            count = 0
        if count < 1:
            self.fail(f"'{value}' is no size; write it like 2GiB or 800MiB", param, ctx)
        return count


class Multiple(click.ParamType):
    """A whole number of at least 1, or ``auto``."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        return value if value == AUTO else click.IntRange(1).convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number: nan passes every comparison of a range, and no clock reaches infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or a usage error."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Share(Number):
    """A number strictly between 0 and 1."""

    name = "share"

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True, max_open=True)
