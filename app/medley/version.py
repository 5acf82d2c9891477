"""Which version of Medley this is: what it was installed as, or that it runs from a tree that was not installed."""

from __future__ import annotations

from importlib import metadata

UNINSTALLED = "0+tree"  # machines with a GPU often have no network: the tree on PYTHONPATH is all there is


def version() -> str:
    """The distribution's version, `0+tree` where there is none."""
    try:
        return metadata.version("medley")
    except metadata.PackageNotFoundError:
        return UNINSTALLED
