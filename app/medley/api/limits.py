"""The limit on a body's bytes, counted as they arrive and before anything is parsed, whatever the headers claim."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medley.api.errors import Encoded, TooLarge, error_response
from medley.config import Limits

ADAPTERS_PATH = "/v1/adapters/"
FILES_PATH = "/openai/v1/files"
# The configuration beside an adapter's weights, and the multipart headers.
UPLOAD_OVERHEAD_BYTES = 1 << 20


class BodyLimit:
    """ASGI middleware: a body beyond the limit is answered 413, a declared one before it is read; a compressed one,
    which is small until it is read, 415.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            await error_response(Encoded(), scope["path"])(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            await error_response(_too_large(limit), scope["path"])(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, counted, send)

    def _limit(self, scope: Scope) -> int:
        if scope["method"] == "PUT" and scope["path"].startswith(ADAPTERS_PATH):
            return self._limits.max_adapter_bytes + UPLOAD_OVERHEAD_BYTES
        if scope["method"] == "POST" and scope["path"] == FILES_PATH:
            return self._limits.max_file_bytes + UPLOAD_OVERHEAD_BYTES
        return self._limits.max_body_bytes


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes, which is the limit here")
