"""From a trace to groups: which dimensions are the same units, and which may not be cut.

In: a `Trace`. Out: an axis for every dimension of every value, and the groups of parameters.
Invariant: dimensions that must shrink together share an atom, by one rule for each kind of op.
"""
