"""Results as files and tables: JSONL, Parquet and Arrow; files are written in parts, at constant memory.

Results are numbered in the order in which they were committed, so a JSONL file of them is its own cursor: a download
that was cut off goes on behind the last line that is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from medley.client.types import Result

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 10_000  # rows a Parquet row group
_LINE = b'{"seq":'  # how the line of a result begins

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


def write_jsonl(path: str | Path, results: Iterable[Result], *, appends: bool = False) -> int:
    """One result a line, with all fields; null where there is no value. Returns how many.

    appends: behind what is there (see `cut_to_whole_lines`), not in its place.
    """
    count = 0
    with Path(path).open("ab" if appends else "wb") as file:
        for count, result in enumerate(results, 1):  # noqa: B007 - the last index is the count
            file.write(msgspec.json.encode(result) + b"\n")
    return count


def read_jsonl(path: str | Path) -> Iterator[Result]:
    """The results of a file that `write_jsonl` has written."""
    with Path(path).open("rb") as file:
        for line in file:
            yield msgspec.json.decode(line, type=Result)


def cut_to_whole_lines(path: Path) -> tuple[int, Result | None]:
    """(lines, the last result) of a file whose writing was cut off, once a line that is not whole is cut from it.

    Raises ValueError where it ends in something else than results; then it stays as it is.
    """
    count, last, tail, end = 0, b"", b"", 0
    with path.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, last, end = count + 1, line, end + len(line)
            else:
                tail = line
        try:
            result = msgspec.json.decode(last, type=Result) if last else None
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: holds something else than results ({error})") from error
        if not tail.startswith(_LINE[: len(tail)]):
            raise ValueError(f"{path}: holds something else than results")
        file.truncate(end)
    return count, result


def write_parquet(path: str | Path, results: Iterable[Result], *, include_tokens: bool = False) -> int:
    """One result a row, in the columns of `to_table`. Returns how many."""
    import pyarrow.parquet as pq  # slow to import, and needed by those who want tables alone

    schema = _schema(include_tokens)
    count = 0
    with pq.ParquetWriter(str(path), schema) as writer:
        for part in _parts(results):
            writer.write_table(_table(part, schema))
            count += len(part)
    return count


def to_table(results: Iterable[Result], *, include_tokens: bool = False) -> pa.Table:
    """Results as an Arrow table: usage, error and score in columns of their own.

    include_tokens: with token_ids and logprobs, of results that were read with them.
    """
    import pyarrow as pa

    schema = _schema(include_tokens)
    return pa.concat_tables([schema.empty_table(), *(_table(part, schema) for part in _parts(results))])


def _schema(include_tokens: bool) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in _COLUMNS]
    fields.append(pa.field("finished_at", pa.timestamp("us", tz="UTC")))
    if include_tokens:
        fields += [pa.field("token_ids", pa.list_(pa.int32())), pa.field("logprobs", pa.list_(pa.float32()))]
    return pa.schema(fields)


def _table(results: list[Result], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist([_row(result) for result in results], schema=schema)


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
        "token_ids": result.token_ids,
        "logprobs": result.logprobs,
    }


def counted(results: Iterable[Result], show: Callable[[int], None], *, start: int) -> Iterator[Result]:
    """`results`, each of which `show` is told the number of, from `start` + 1 on."""
    for number, result in enumerate(results, start + 1):
        yield result
        show(number)
