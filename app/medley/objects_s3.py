"""Blobs in an S3-compatible store, through boto3: path-style, multipart beyond one part, digests kept and checked.

Owns what S3 calls things and how its failures are told apart. The SHA-256 of a blob is taken before it is sent, stands
beside it as metadata, and is checked by whoever reads it whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from medley.config import StoreAccess
from medley.objects import (
    CHUNK_BYTES,
    ObjectCorrupt,
    ObjectMissing,
    Objects,
    StoreUnavailable,
    UnsupportedStore,
    check_key,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_BYTES = 16 << 20  # of a multipart upload, at most 10,000 of them; held in memory one at a time
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0  # without a byte
MAX_TRIES = 3  # of one request, with the client's backoff between them
_SHA256 = "sha256"


class S3Objects(Objects):
    """Blobs below a prefix of one bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix

    @classmethod
    def of_url(cls, url: str, access: StoreAccess) -> S3Objects:
        """The store at `s3://bucket/prefix`. Opens no connection. Raises UnsupportedStore."""
        parts = urlsplit(url)
        prefix = parts.path.strip("/")
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise UnsupportedStore("the store's URL must have the form s3://bucket/prefix, without credentials")
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=access.endpoint,
            region_name=access.region,
            aws_access_key_id=access.access_key,
            aws_secret_access_key=access.secret_key,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": MAX_TRIES},
                s3={"addressing_style": "path"},
                max_pool_connections=32,
                # Stores other than AWS's know neither.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        return cls(client, parts.netloc, f"{prefix}/" if prefix else "")

    def put(self, key: str, source: BinaryIO) -> int:
        place = self._place(key)
        with _rewindable(source) as (file, num_bytes, sha256), _failures(key):
            about = place | {"Metadata": {_SHA256: sha256.hexdigest()}}
            sent = hashlib.sha256()
            if num_bytes <= PART_BYTES:
                body = file.read(PART_BYTES + 1)
                sent.update(body)
                _check_unchanged(sent.digest() == sha256.digest(), key)
                self._client.put_object(**about, Body=body)
            else:
                self._put_parts(about, place, file, sha256.digest())
        return num_bytes

    def _put_parts(self, about: dict[str, Any], place: dict[str, Any], file: BinaryIO, sha256: bytes) -> None:
        upload = self._client.create_multipart_upload(**about)["UploadId"]
        try:
            sent = hashlib.sha256()
            parts: list[dict[str, Any]] = []
            while body := file.read(PART_BYTES):
                sent.update(body)
                number = len(parts) + 1
                part = self._client.upload_part(**place, UploadId=upload, PartNumber=number, Body=body)
                parts.append({"ETag": part["ETag"], "PartNumber": number})
            _check_unchanged(sent.digest() == sha256, place["Key"])
            self._client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            # Where the store does not take this either, `forget_unfinished` finds the parts.
            with contextlib.suppress(BotoCoreError, ClientError):
                self._client.abort_multipart_upload(**place, UploadId=upload)
            raise

    def open_read(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        if length is not None and length <= 0:
            self.size(key)
            return io.BytesIO()
        options: dict[str, Any] = {}
        if start or length is not None:
            options["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        try:
            with _failures(key):
                answer = self._client.get_object(**self._place(key), **options)
        except _BeyondEnd:
            return io.BytesIO()
        sha256 = None if options else answer["Metadata"].get(_SHA256)
        return cast(BinaryIO, io.BufferedReader(_Body(key, answer["Body"], sha256), CHUNK_BYTES))

    def size(self, key: str) -> int:
        with _failures(key):
            return int(self._client.head_object(**self._place(key))["ContentLength"])

    def delete(self, key: str) -> None:
        with _failures(key), contextlib.suppress(ObjectMissing):
            self._client.delete_object(**self._place(key))

    def keys(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with _failures(prefix):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield item["Key"].removeprefix(self._prefix)

    def forget_unfinished(self, *, older_than_s: float) -> int:
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
        num_forgotten = 0
        with _failures(self._prefix):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"] < before:
                        place = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                        self._client.abort_multipart_upload(**place)
                        num_forgotten += 1
        return num_forgotten

    def _place(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}


class _BeyondEnd(Exception):
    """A range that begins past the end of the blob."""


class _Body(io.RawIOBase):
    """The bytes of an answer, which it owns. At their end their digest is `sha256`, where that is known."""

    def __init__(self, key: str, body: Any, sha256: str | None) -> None:
        self._key, self._body, self._wanted = key, body, sha256
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        with _failures(self._key):
            data = self._body.read(len(view))
        view[: len(data)] = data
        self._sha256.update(data)
        if not data and self._wanted not in (None, self._sha256.hexdigest()):
            raise ObjectCorrupt(f"object {self._key!r} is not what was put: its SHA-256 is another")
        return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


@contextlib.contextmanager
def _rewindable(source: BinaryIO) -> Iterator[tuple[BinaryIO, int, Any]]:
    """(what is left of `source` at its start, its bytes, its SHA-256); spooled to a file where it cannot go back."""
    sha256 = hashlib.sha256()
    num_bytes = 0
    with contextlib.ExitStack() as stack:
        file = source
        is_spooled = not source.seekable()
        if is_spooled:
            file = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile(prefix="medley-put-")))
        start = file.tell()
        while chunk := source.read(CHUNK_BYTES):
            sha256.update(chunk)
            num_bytes += len(chunk)
            if is_spooled:
                file.write(chunk)
        file.seek(start)
        yield file, num_bytes, sha256


def _check_unchanged(is_same: bool, key: str) -> None:
    if not is_same:
        raise ObjectCorrupt(f"the source of {key!r} changed while it was stored")


@contextlib.contextmanager
def _failures(key: str) -> Iterator[None]:
    """The client's errors as the store's."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code in ("NoSuchKey", "404") or (status == 404 and code not in ("NoSuchBucket", "NoSuchUpload")):
            raise ObjectMissing(key) from None
        if status == 416:
            raise _BeyondEnd from None
        raise StoreUnavailable(f"the store refuses: {code} (status {status})") from error
    except BotoCoreError as error:
        # Without its text, which may hold the address of the store.
        raise StoreUnavailable(f"the store does not answer: {type(error).__name__}") from error
