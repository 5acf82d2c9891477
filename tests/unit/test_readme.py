"""README's tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("app/medley", "workers/medley_worker")


def test_the_tree_names_every_module_and_nothing_else() -> None:
    shown = _modules((ROOT / "README.md").read_text().split("## The tree")[1])
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {path for path in shown if path.startswith(PACKAGES)} == there


def _modules(tree: str) -> set[str]:
    found, folders = set(), {0: ""}
    for line in tree.splitlines():
        match = re.match(r"( *)(\S+?\.py|\S+/)\s", line + " ")
        if match is None:
            continue
        depth, name = len(match[1]) // 2, match[2]
        parent = folders.get(depth - 1, "") if depth else ""
        if name.endswith("/"):
            folders[depth] = parent + name
        else:
            found.add(parent + name)
    return found


def test_it_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
