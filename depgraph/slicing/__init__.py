"""Cuts a plan out of a model, and proves the result.

In: a graph, a plan and the model. Out: a smaller ``nn.Module``.
Invariant: the caller's model changes only when all is proven, and only when asked to.
"""
