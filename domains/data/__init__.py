"""Images by domain and class: found, checked, unpacked, split and loaded.

In: folders, archives or copies from the hub. Out: a `Split` of sources and the held-out target.
Invariant: nothing is returned unless all of it is sound; no image is in two parts of a split.
"""
