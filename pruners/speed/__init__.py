"""Predicts the latency of a plan from measured times of single ops.

In: the work of a graph at the plan's sizes, and a table of this device. Out: milliseconds.
Invariant: no model runs; the same plan and table give the same prediction.
"""
