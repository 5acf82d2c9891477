"""A batch's results into a file, gone on with where a download before was cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medley.client.files import counted, cut_to_whole_lines, read_jsonl, write_jsonl, write_parquet
from medley.client.types import Result

if TYPE_CHECKING:
    from medley.client.batches import Batch

SUFFIXES = (".jsonl", ".parquet")


def download(
    batch: Batch,
    path: Path,
    read: Callable[[int], Iterator[Result]],
    show: Callable[[int], None],
    *,
    after: int,
    include_tokens: bool,
) -> int:
    """Writes what `read(seq)` gives, the results behind that one, to `path`. Returns how many it holds then.

    A .jsonl file grows in its place. A .parquet file comes to be once all is here; until then its results lie beside
    it in `NAME.part`. `show` is told how many there are. Raises ValueError for results of another batch.
    """
    lines = path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.part")
    num_before = 0
    if lines.exists():
        num_before, last = cut_to_whole_lines(lines)
        if last is not None:
            _require_same(batch, last, lines)
            after = last.seq
    show(num_before)
    num_results = num_before + write_jsonl(lines, counted(read(after), show, start=num_before), appends=True)
    if lines is not path:
        whole = path.with_name(f"{path.name}.new")
        write_parquet(whole, read_jsonl(lines), include_tokens=include_tokens)
        whole.replace(path)
        lines.unlink()
    return num_results


def require_suffix(path: Path) -> None:
    """Raises ValueError for a name that says no kind of file."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: got {path.name!r}, wanted a name in {' or '.join(SUFFIXES)}")


def _require_same(batch: Batch, last: Result, path: Path) -> None:
    found = batch.page(after=last.seq - 1, limit=1).results
    if not found or found[0].id != last.id:
        raise ValueError(f"{path}: holds results of another batch; take another name, or delete it")
