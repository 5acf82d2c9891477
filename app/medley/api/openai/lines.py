"""The lines of a batch's input: one request each, judged by itself, with every fault as OpenAI's batches list them.

Whether a line's model exists and its custom_id is the only one is said by who reads the whole file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from medley.api.decoding import decode_fields
from medley.api.job_bodies import label_faults
from medley.api.openai.requests import Request, RequestReader
from medley.api.openai.shapes import BatchError
from medley.spec.errors import Fault


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


@dataclass
class Line:
    """One line as read; `request` is None where the body or what it is read by is faulty."""

    number: int
    custom_id: str | None = None
    request: Request | None = None
    errors: list[BatchError] = field(default_factory=list)


class LineReader:
    """Reads the lines of batches of one base model."""

    def __init__(self, requests: RequestReader) -> None:
        self._requests = requests

    def read(self, data: bytes, number: int, endpoint: str) -> Line:
        """Line `number`, which counts from 1, of a batch for `endpoint`."""
        found = decode_fields(data, _Line)
        line = Line(number, errors=[_error(_code_of(fault), number, fault) for fault in found.faults])
        if found.value is None:
            return line
        sent = found.value
        faults: list[tuple[str, Fault]] = [("invalid_custom_id", f) for f in label_faults("custom_id", sent.custom_id)]
        if sent.method != "POST":
            faults.append(("invalid_method", Fault(field="method", got=repr(sent.method)[:80], wanted="POST")))
        if sent.url != endpoint:
            wanted = f"{endpoint}, the batch's endpoint"
            faults.append(("invalid_url", Fault(field="url", got=repr(sent.url)[:80], wanted=wanted)))
        else:
            line.request, wrong = self._requests.read(endpoint, sent.body, may_stream=False)
            faults += [(_code_of(f), msgspec.structs.replace(f, field=f"body.{f.field}")) for f in wrong]
        line.custom_id = sent.custom_id
        line.errors += [_error(code, number, fault) for code, fault in faults]
        return line


def file_error(code: str, message: str) -> BatchError:
    """An error of the file as a whole."""
    return BatchError(code, None, storable(message), None)


def line_error(code: str, number: int, *, param: str, got: str, wanted: str) -> BatchError:
    """An error of one line that shows in the light of others."""
    return _error(code, number, Fault(field=param, got=got, wanted=wanted))


def _error(code: str, number: int, fault: Fault) -> BatchError:
    return BatchError(code, number, storable(str(fault)), storable(fault.field))


def _code_of(fault: Fault) -> str:
    if fault.field == "body" and "JSON" in fault.wanted:
        return "invalid_json_line"
    return "missing_required_parameter" if fault.got == "nothing" else "invalid_value"


def storable(text: str) -> str:
    """PostgreSQL holds neither NUL nor half of a surrogate pair, and a faulty line may well show either."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
