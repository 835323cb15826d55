"""Where and how models run: devices, precision, processes, sharding, random numbers, progress.

In: what the caller asks for. Out: contexts that put everything back.
Invariant: what is drawn at random depends on what it is drawn for, not on what was drawn before.
"""
