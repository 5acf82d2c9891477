"""What a machine or a container can still give."""

from __future__ import annotations

from pathlib import Path

import pytest

from medley_worker.ops.host_memory import available_bytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24000000 kB\nMemFree:         1000 kB\nMemAvailable:   1048576 kB\n")
    return path


def limited(folder: Path, limit: str) -> Path:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{300 * MIB}\n")
    (folder / "memory.stat").write_text(f"anon {200 * MIB}\ninactive_file {60 * MIB}\nactive_file {20 * MIB}\n")
    return folder


def test_a_machine_gives_what_it_says_is_available(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine, tmp_path / "none") == 1024 * MIB
    assert available_bytes(machine, limited(tmp_path / "unlimited", "max")) == 1024 * MIB
    assert available_bytes() > 0


def test_a_container_gives_up_to_its_limit_and_files_count_as_free(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine, limited(tmp_path / "small", str(500 * MIB))) == 280 * MIB
    assert available_bytes(machine, limited(tmp_path / "large", str(5000 * MIB))) == 1024 * MIB
    assert available_bytes(machine, limited(tmp_path / "full", str(100 * MIB))) == 0
