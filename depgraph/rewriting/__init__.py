"""Writes forwards anew where their code holds a size that a cut changes.

In: a module, its traced calls and the units kept. Out: a graph module for each kind of call.
Invariant: a call that no written forward was made for is refused, never computed wrongly.
"""
