"""/openai/v1/files: upload, list, read, content, delete. Bytes go to the object store, streamed both ways."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, cast
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection, Row
from starlette.datastructures import FormData, UploadFile

from medley.api.auth import Caller, reads, submits
from medley.api.decoding import Query
from medley.api.errors import ApiError, FaultList, InvalidRequest, NotFound, TooLarge
from medley.api.idempotency import REPLAYED, Create, read_create
from medley.api.openai.shapes import Deleted, file_of, page_of
from medley.api.shapes import answer
from medley.db import files
from medley.db.quotas import check_file_room, lock_usage
from medley.objects import ObjectMissing, StoreError
from medley.spec.errors import Fault
from medley.spec.ids import FILE, parse_id, public_id, uuid7
from medley.spec.strict_json import shown_name

MAX_PAGE = 10_000
MAX_NAME_CHARS = 255
MAX_FIELD_BYTES = 4 << 10
MAX_FIELDS = 8
CHUNK_BYTES = 256 << 10
DAY_S = 24 * 3600
# Seconds that a file may be asked to last, as OpenAI documents them.
MIN_EXPIRES_S, MAX_EXPIRES_S = 3600, 30 * DAY_S

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("file", "purpose", ANCHOR, SECONDS)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

router = APIRouter(prefix="/openai/v1/files")


@dataclass(frozen=True)
class _Upload:
    source: BinaryIO
    size_bytes: int
    filename: str
    expires_after_s: int

    def digest(self, content_sha256: bytes) -> bytes:
        """Of all that was asked for."""
        parts = (content_sha256.hex(), str(self.expires_after_s), self.filename)
        return hashlib.sha256("\n".join(parts).encode()).digest()


class RangeNotSatisfiable(ApiError):
    status, code = 416, "range_not_satisfiable"


@router.post("")
async def upload(request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise InvalidRequest.of([Fault(field="Content-Type", got=kind[:80] or "nothing", wanted="multipart/form-data")])
    services = who.services
    # A full store is not first sent a file to refuse.
    await services.sql.run(who.tenant.id, lambda conn: _check_room(conn, who, num_bytes=1))
    # Beyond a megabyte the file is spooled to disk as it arrives; what is wrong with the form is a 400.
    async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        sent = _read_form(form)
        if sent.size_bytes > (limit := services.settings.limits.max_file_bytes):
            raise TooLarge(f"the file has {sent.size_bytes} bytes, the limit is {limit}")
        digest = await services.take_in(lambda: _digest(sent.source))
        # The form's boundary differs each time it is sent, so what it holds is compared.
        create = read_create(request, sent.digest(digest))
        file = files.NewFile(
            id=uuid7(),
            tenant=who.tenant.id,
            purpose=files.BATCH_INPUT,
            filename=sent.filename,
            size_bytes=sent.size_bytes,
            sha256=digest,
            expires_after_s=sent.expires_after_s,
        )
        file, is_new = await services.sql.run(who.tenant.id, partial(_begin, who=who, create=create, file=file))
        if is_new:
            await _store(who, create, file, sent.source)

    def finish(conn: Connection) -> Row[Any] | None:
        if is_new and files.finish_file(conn, file.id):
            who.note(conn, "file.upload", public_id(FILE, file.id), size_bytes=file.size_bytes)
        return files.read_file(conn, file.id)

    row = await services.sql.run(who.tenant.id, finish)
    if row is None:  # made by an equal request, and deleted since
        if is_new:
            await services.take_in(lambda: services.store.objects.delete(file.object_key))
        raise NotFound("file", public_id(FILE, file.id))
    return answer(file_of(row), headers=None if is_new else REPLAYED)


async def _store(who: Caller, create: Create, file: files.NewFile, source: BinaryIO) -> None:
    """Stores the bytes. Where that fails, and no equal request can go on with it, the file takes no room."""
    services = who.services
    try:
        await services.take_in(lambda: services.store.objects.put(file.object_key, source))
    except (StoreError, OSError):
        if create.key is None:
            await services.sql.run(who.tenant.id, lambda conn: files.give_up_files(conn, [file.id]))
        raise


def _begin(conn: Connection, who: Caller, create: Create, file: files.NewFile) -> tuple[files.NewFile, bool]:
    """(the file, whether its bytes are to be stored): an equal request that was cut is gone on with."""
    existing = create.claim(conn, who.tenant.id, file.id)
    if existing is not None:
        return replace(file, id=existing), files.read_object_key(conn, existing) is None
    lock_usage(conn, who.tenant.id)
    _check_room(conn, who, num_bytes=file.size_bytes)
    files.begin_file(conn, file)
    return file, True


def _check_room(conn: Connection, who: Caller, *, num_bytes: int) -> None:
    check_file_room(conn, who.tenant.id, who.tenant.quotas, num_bytes=num_bytes)


def _digest(source: BinaryIO) -> bytes:
    source.seek(0)
    digest = hashlib.file_digest(cast(Any, source), "sha256").digest()
    source.seek(0)
    return digest


def _read_form(form: FormData) -> _Upload:
    """What was sent. Raises InvalidRequest with every fault."""
    faults = FaultList()
    for name, _ in form.multi_items():
        if name not in _FIELDS:
            faults.add(Fault(field=shown_name(name), got="a field", wanted=f"the fields {', '.join(_FIELDS)}"))
        elif len(form.getlist(name)) > 1:
            faults.add(Fault(field=name, got="several", wanted="one"))
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        faults.add(Fault(field="file", got="no file", wanted="a file of lines of JSON"))
    if purpose != files.BATCH_INPUT:
        faults.add(Fault(field="purpose", got=repr(purpose)[:80], wanted="batch: files serve batches alone"))
    expires = _expires_after(form, faults)
    faults.raise_any()
    assert isinstance(file, UploadFile)
    name = (file.filename or "upload.jsonl").replace("\0", "")[:MAX_NAME_CHARS]
    return _Upload(file.file, file.size or 0, name, expires)


def _expires_after(form: FormData, faults: FaultList) -> int:
    anchor, seconds = form.get(ANCHOR), form.get(SECONDS)
    if anchor is None and seconds is None:
        return files.DEFAULT_EXPIRES_S
    if anchor != "created_at":
        faults.add(Fault(field=ANCHOR, got=repr(anchor)[:80], wanted="created_at"))
    num = int(seconds) if isinstance(seconds, str) and re.fullmatch(r"\d{1,9}", seconds) else 0
    if MIN_EXPIRES_S <= num <= MAX_EXPIRES_S:
        return num
    faults.add(Fault(field=SECONDS, got=repr(seconds)[:80], wanted=f"{MIN_EXPIRES_S} to {MAX_EXPIRES_S}"))
    return files.DEFAULT_EXPIRES_S


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    query = Query(request)
    limit = query.whole("limit", MAX_PAGE, low=1, high=MAX_PAGE)
    order, purpose = query.text("order") or "desc", query.text("purpose")
    if order not in ("asc", "desc"):
        query.refuse("order", "asc or desc")
    after = None
    if (text := query.text("after")) is not None:
        after = parse_id(FILE, text)
        if after is None:
            query.refuse("after", "the id of a file")
    query.end()

    def act(conn: Connection) -> Any:
        return files.list_files(conn, after=after, limit=limit + 1, is_ascending=order == "asc", purpose=purpose)

    rows = await who.services.sql.run(who.tenant.id, act)
    return answer(page_of([file_of(row) for row in rows], limit))


@router.get("/{file_id}")
async def read(file_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    return answer(file_of(await _read(who, file_id)))


@router.get("/{file_id}/content")
async def content(file_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    """The bytes, or with a Range those asked for: a download that was cut goes on where it stood."""
    Query(request).end()
    row = await _read(who, file_id)
    etag = f'"{row.sha256.hex()}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row.filename)}",
    }
    start, length, status = 0, row.size_bytes, 200
    if "range" in request.headers and request.headers.get("if-range") in (None, etag):
        found = _range(request.headers["range"], row.size_bytes)
        if found is not None:
            start, length, status = *found, 206
            headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{row.size_bytes}"
    headers["Content-Length"] = str(length)
    services = who.services
    try:
        source = await services.take_in(
            lambda: services.store.objects.open_read(row.object_key, start=start, length=length)
        )
    except ObjectMissing:  # it was deleted after it was found
        raise NotFound("file", file_id) from None
    return StreamingResponse(_chunks(source), status, headers, media_type="application/octet-stream")


def _range(text: str, size: int) -> tuple[int, int] | None:
    """(start, length) of one range; None for what HTTP lets a server overlook. Raises RangeNotSatisfiable."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if first:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
        if last and int(last) < start:
            return None
    else:
        start, end = max(0, size - int(last)), size - 1
    if start > end:
        raise RangeNotSatisfiable(
            f"the range {text[:80]!r} is not in a file of {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end - start + 1


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


@router.delete("/{file_id}")
async def delete(file_id: str, request: Request, who: Caller = Depends(submits)) -> Response:
    Query(request).end()
    file = _parse(file_id)

    def act(conn: Connection) -> bool:
        is_deleted = files.delete_file(conn, file)
        if is_deleted:
            who.note(conn, "file.delete", file_id)
        return is_deleted

    if not await who.services.sql.run(who.tenant.id, act):
        raise NotFound("file", file_id)
    return answer(Deleted(file_id, "file"))


def _parse(file_id: str) -> UUID:
    file = parse_id(FILE, file_id)
    if file is None:
        raise NotFound("file", file_id)
    return file


async def _read(who: Caller, file_id: str) -> Row[Any]:
    file = _parse(file_id)
    row = await who.services.sql.run(who.tenant.id, lambda conn: files.read_file(conn, file))
    if row is None:
        raise NotFound("file", file_id)
    return row
