"""What tests that need a CUDA device share.

Here, and nowhere else, is decided that they are skipped: where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from sgmv_cases import Adapters, adapters_in


@pytest.fixture(scope="module", params=["bulk", "ring"])
def mixed(request: pytest.FixtureRequest) -> Adapters:
    """Adapters of many ranks, in the mode that serves on sm_90 and in the one that serves before it."""
    return adapters_in(request.param)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Show a line that a test measured, whether it passes or fails."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return show


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
