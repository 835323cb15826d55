"""The ``depgraph-prune`` command line: one file per command; other packages do the work."""
