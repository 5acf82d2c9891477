"""A host whose clock is wrong, as a folder for PYTHONPATH: each Python process there reads a time that is shifted.

`time.time`, `time.time_ns` and `datetime.now` go wrong by MEDLEY_TEST_SKEW_S seconds, the monotonic clock does not.
"""

from __future__ import annotations

from pathlib import Path

_SITE = """
import datetime as _datetime
import os as _os
import time as _time

_skew_s = float(_os.environ.get("MEDLEY_TEST_SKEW_S", "0"))
if _skew_s:
    _time_s, _time_ns = _time.time, _time.time_ns
    _time.time = lambda: _time_s() + _skew_s
    _time.time_ns = lambda: _time_ns() + int(_skew_s * 1e9)

    class _Shifted(_datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + _datetime.timedelta(seconds=_skew_s)

    _datetime.datetime = _Shifted
"""


def skewed_environ(folder: Path, skew_s: float) -> dict[str, str]:
    """What a process is given whose host's clock is `skew_s` ahead (behind, where negative)."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE)
    return {"PYTHONPATH": str(folder), "MEDLEY_TEST_SKEW_S": str(skew_s)}
