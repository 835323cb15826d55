"""Where the parts and factors of two axes meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from depgraph.coupling.axes import Axis, Concat, Factor, axis_size, factor_size


def boundaries(parts: Sequence[Axis]) -> list[int]:
    ends, offset = [], 0
    for part in parts:
        offset += axis_size(part)
        ends.append(offset)
    return ends


def join(fine: Sequence[Axis], cuts: Sequence[int]) -> list[Axis]:
    """Neighbouring parts put together again between the cuts."""
    pieces: list[list[Axis]] = [[]]
    for part, end in zip(fine, boundaries(fine), strict=True):
        pieces[-1].append(part)
        if end in cuts:
            pieces.append([])
    return [piece[0] if len(piece) == 1 else (Concat(tuple(piece)),) for piece in pieces if piece]


def runs(
    factors: Sequence[Factor], sizes: Sequence[int]
) -> Iterator[tuple[list[Factor], list[int]]]:
    """Shortest runs of factors and of dimensions whose products agree."""
    rest = list(factors)
    run: list[Factor] = []
    dims: list[int] = []
    have = want = 1
    for size in sizes:
        dims.append(size)
        want *= size
        while have < want and rest:
            run.append(rest.pop(0))
            have *= factor_size(run[-1])
        if have == want:
            yield run, dims
            run, dims, have, want = [], [], 1, 1
    if dims or rest:
        yield run + rest, dims
