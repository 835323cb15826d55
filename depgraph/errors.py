"""The one exception of the library: everything a caller can cause and mend."""


class DepgraphError(ValueError):
    """Bad input, said in one sentence that names the thing and the way out.

    Examples
    --------
    >>> raise DepgraphError("unknown metric 'l3'; choose one of l1, l2")
    Traceback (most recent call last):
        ...
    depgraph.errors.DepgraphError: unknown metric 'l3'; choose one of l1, l2
    """
