"""A turn again and again on a thread, while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

LOOK_S = 0.02


class Background:
    """Within the block `turn` is called every `LOOK_S`. What it raises ends it, and is raised at the block's end."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(LOOK_S):
                self._turn()
        except BaseException as error:  # shown by the thread that waits
            self._error = error
