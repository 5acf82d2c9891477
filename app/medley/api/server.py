"""The API's process: uvicorn around the application, and a stop that keeps nobody waiting."""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

from medley.api.app import create_app
from medley.api.http_protocol import BoundedProtocol
from medley.config import Settings
from medley.garbage import collect_rarely

GRACE_S = 8  # for requests that run when the process is asked to stop
BACKLOG = 2048
# The loop waits this long at the most for a thread that computes between two queries, not Python's 5 ms (measured at
# half the most requests: median of a read 8.3 and 5.4 ms).
SWITCH_INTERVAL_S = 0.0005


class _Server(uvicorn.Server):
    """Lets waiters go when asked to stop: each answers with the present state."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.hub.release_all()
        await super().shutdown(sockets)


def make_server(settings: Settings) -> uvicorn.Server:
    """The server, not yet started; `run(sockets)` serves until SIGTERM, SIGINT or `should_exit`."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Only the audit log reads it; believed of anyone, it would say what its sender likes.
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=settings.trusted_proxies or "",
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_S,
    )
    return _Server(config, app)


def serve(settings: Settings) -> None:
    """Serves until it is asked to stop, on `settings.listen_fd` where a supervisor hands one down."""
    fd = settings.listen_fd
    server = make_server(settings)

    def stop(_number: int, _frame: object) -> None:
        server.should_exit = True

    # uvicorn puts its own in their place and, once all is answered, sends itself the signal again: an orderly end is
    # none by a signal.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    collect_rarely()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server.run(None if fd is None else [socket.socket(fileno=fd)])
