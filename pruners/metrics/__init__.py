"""Scores of units, one file for each paper.

In: a dependency graph and the statistics that the metric asks for. Out: a number for each unit.
Invariant: a higher score is a unit worth keeping; labels of the target domain are never read.
"""
