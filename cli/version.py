"""The version of the installed program."""

from importlib import metadata


def program_version() -> str:
    """As pip says it; ``"unknown"`` where the program is run without being installed."""
    try:
        return metadata.version("depgraph-prune")
    except metadata.PackageNotFoundError:
        return "unknown"
