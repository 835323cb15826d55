"""From a model and example inputs to a flat graph of ATen ops, without reading a weight.

In: an ``nn.Module`` and what it is called with. Out: a `Trace` of nodes, tensors and module calls.
Invariant: the caller's model, its hooks and its caches are as they were.
"""
