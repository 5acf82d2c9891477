"""The scale hook: an executable or a URL of the operator's that is told when the pool should grow or may shrink.

One thread beside the loop, one call at a time, each within a time limit: a hook that hangs delays the next call and
no plan. Only the leader calls, by what it saw in its last plan. The document goes to the executable's standard input,
or is posted, signed as webhooks are; heard is a call that ended with status 0, or was answered with 2xx.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from medley.config import inherited_env
from medley.config_scale import ScaleSettings
from medley.dispatcher.glance import Glance
from medley.dispatcher.scale_calls import Call, ScaleCalls
from medley.endpoints import post_trusted
from medley.environment import ConfigError
from medley.spec.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, read_secret, sign

LOOK_S = 0.25
CLOSE_S = 5.0  # for a call that runs when the process ends
SHOWN_CHARS = 500  # of what a failing executable said

log = structlog.get_logger()


class ScaleHook:
    """look: the leader's last view, None while another leads or it is too old."""

    def __init__(self, settings: ScaleSettings, look: Callable[[], Glance | None]) -> None:
        """Raises ConfigError where the executable cannot be run."""
        assert settings.hook is not None
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (type of call, "heard" or "failed")
        self._look = look
        self._calls = ScaleCalls(release_after_s=settings.release_after_s, repeat_s=settings.repeat_s)
        self._send = _sender(settings)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="medley-scale-hook", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Makes no more calls; one that runs has a few seconds."""
        self._stopped.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            glance, now = self._look(), time.monotonic()
            if glance is None:
                self._calls.forget()
                continue
            self._calls.see(glance, now)
            call = self._calls.due(now)
            if call is not None:
                self._make(call)

    def _make(self, call: Call) -> None:
        fault = self._send(call)
        self.outcomes[call.type, "heard" if fault is None else "failed"] += 1
        wait_s = self._calls.made(call, time.monotonic(), is_heard=fault is None)
        facts = {"type": call.type, "id": call.id, "wanted": call.body["wanted"], "registered": call.body["registered"]}
        if fault is None:
            log.info("scale.called", **facts)
        else:
            log.warning("scale.call_failed", **facts, reason=fault, retry_s=round(wait_s, 1))


def _sender(settings: ScaleSettings) -> Callable[[Call], str | None]:
    """How a call is made; it returns what went wrong, None where it was heard."""
    hook, timeout_s = settings.hook, settings.hook_timeout_s
    assert hook is not None
    if hook.startswith(("https://", "http://")):
        assert settings.hook_secret is not None
        secret = read_secret(settings.hook_secret)
        return lambda call: _post(hook, secret, call, timeout_s)
    path = Path(hook)
    if not path.is_absolute() or not path.is_file() or not os.access(path, os.X_OK):
        raise ConfigError("MEDLEY_SCALE_HOOK", hook, "an https:// URL, or the whole path of a file that can be run")
    return lambda call: _execute(path, call, timeout_s)


def _post(url: str, secret: bytes, call: Call, timeout_s: float) -> str | None:
    payload, timestamp = msgspec.json.encode(call.body).decode(), int(time.time())
    headers = {
        ID_HEADER: call.id,
        TIMESTAMP_HEADER: str(timestamp),
        SIGNATURE_HEADER: sign(call.id, timestamp, payload, [secret]),
    }
    return post_trusted(url, payload, headers, timeout_s=timeout_s).error


def _execute(path: Path, call: Call, timeout_s: float) -> str | None:
    with tempfile.TemporaryFile() as said:
        try:
            # A session of its own: what it has started ends with it where it is overdue. It needs no secret of ours.
            process = subprocess.Popen(
                [path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=inherited_env(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            return f"it could not be started: {error.strerror}"
        try:
            process.communicate(msgspec.json.encode(call.body), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no end within {timeout_s:g} s"
        if process.returncode == 0:
            return None
        said.seek(max(0, said.tell() - SHOWN_CHARS))
        tail = said.read(SHOWN_CHARS).decode(errors="replace").strip()
        return f"it ended with status {process.returncode}" + (f": {tail!r}" if tail else "")
