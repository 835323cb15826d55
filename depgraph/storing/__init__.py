"""Saves and loads models as a folder of JSON and safetensors; slices checkpoints on disk.

In: a model and how it was made, or a folder that a stranger may have written. Out: the other one.
Invariant: nothing that is loaded runs, and nothing outside the folder is read, written or removed.
"""
