"""The dependency graph for people and other tools: networkx and GraphML.

In: a `DependencyGraph`. Out: plain attributes that several readers understand alike.
Invariant: ids are unique, and a node's label is its name.
"""
