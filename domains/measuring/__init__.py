"""Accuracy by domain, latency, throughput and memory.

In: models, taken in turns. Out: measured numbers, ratios with their interval.
Invariant: all models meet the same conditions, and come back as they were.
"""
