"""Scores of units, one file for each paper.

In: a dependency graph and the statistics that the metric asks for. Out: a number for each unit.
Invariant: the lower the score, the sooner the unit goes; the model stays as it was.
"""
