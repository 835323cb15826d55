"""What a model costs at other sizes: parameters, multiply-accumulates, the work of each op.

In: the axes of a trace, and how many units of each atom stay. Out: numbers; no forward runs.
Invariant: at full size they are those of the model as it is.
"""
