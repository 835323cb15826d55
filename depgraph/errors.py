"""The one exception of the library: everything a caller can cause and mend."""

import re

_LONG = re.compile(r"'[^']{500,}'|\S{500,}")
_SHOWN = 100


class DepgraphError(ValueError):
    """Bad input, said in one sentence that names the thing and the way out.

    A name of 500 characters and more, as a damaged or hostile file may have it, is cut short.

    Examples
    --------
    >>> raise DepgraphError("unknown metric 'l3'; choose one of l1, l2")
    Traceback (most recent call last):
        ...
    depgraph.errors.DepgraphError: unknown metric 'l3'; choose one of l1, l2
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(_LONG.sub(lambda name: f"{name[0][:_SHOWN]}...", text))
