"""The whole job in stages that can be resumed.

In: settings of a run. Out: saved models and records of each stage in one folder.
Invariant: what is finished is not made again; nothing a user made is overwritten unasked.
"""
