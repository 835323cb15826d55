"""A grid of runs from one file: resumed after any stop, alone or on many workers."""
