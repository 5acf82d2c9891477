"""Results as files: JSONL and Parquet, written in parts at constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from medley.client.types import Result

ROWS = 10_000  # rows a Parquet row group

_COLUMNS = (
    ("seq", "int64"),
    ("id", "string"),
    ("state", "string"),
    ("custom_id", "string"),
    ("adapter", "string"),
    ("prompt_idx", "int32"),
    ("seed", "int64"),
    ("sample_idx", "int32"),
    ("text", "string"),
    ("finish_reason", "string"),
    ("prompt_tokens", "int32"),
    ("completion_tokens", "int32"),
    ("error_code", "string"),
    ("error_message", "string"),
    ("score", "float64"),
    ("is_greedy", "bool_"),
    ("retry_of", "string"),
    ("retried_by", "string"),
)


def write_jsonl(path: str | Path, results: Iterable[Result]) -> int:
    """One result a line, with all fields; null where there is no value. Returns how many."""
    count = 0
    with Path(path).open("wb") as file:
        for count, result in enumerate(results, 1):  # noqa: B007 - the last index is the count
            file.write(msgspec.json.encode(result) + b"\n")
    return count


def write_parquet(path: str | Path, results: Iterable[Result]) -> int:
    """One result a row; the columns are those of `_COLUMNS` and `finished_at`. Returns how many."""
    import pyarrow as pa  # slow to import, and needed by those who write Parquet alone
    import pyarrow.parquet as pq

    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in _COLUMNS]
    schema = pa.schema([*fields, pa.field("finished_at", pa.timestamp("us", tz="UTC"))])
    count = 0
    with pq.ParquetWriter(str(path), schema) as writer:
        for part in _parts(results):
            writer.write_table(pa.Table.from_pylist([_row(r) for r in part], schema=schema))
            count += len(part)
    return count


def _parts(results: Iterable[Result]) -> Iterator[list[Result]]:
    rows = iter(results)
    while part := list(islice(rows, ROWS)):
        yield part


def _row(result: Result) -> dict[str, Any]:
    row = {name: getattr(result, name, None) for name, _ in _COLUMNS}
    return row | {
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "error_code": result.error and result.error.code,
        "error_message": result.error and result.error.message,
        "score": result.score and result.score.logprob,
        "is_greedy": result.score and result.score.is_greedy,
        "finished_at": result.finished_at,
    }
