"""Holds the time per output token to a bound: how many rows run at once, and how much of a prompt beside them.

Pure arithmetic on measured step times; knows no rows, no clock and no device.
"""

from __future__ import annotations

from collections import deque
from statistics import median

FIRST_ROWS = 8  # to start with: a row that runs is not stopped, so too many would be too slow until they end
WINDOW = 5  # steps of which the median counts: one may hold the capture of a graph
WELL_WITHIN = 0.9  # of the bound; below it there is room for more
MAX_GROWTH = 1.5
LEAST_CUT, MOST_CUT = 0.9, 0.5
# How many windows a number of rows that was too slow is not tried again. Texts grow longer and end meanwhile.
MEMORY = 50
MIN_PROMPT_TOKENS = 16  # beside decode rows, so that a prompt always gets on
FIRST_PROMPT_TOKENS = 128  # while it is not known what a token of a prompt costs


class Pace:
    """At most `max_rows` rows, and beside decode rows at most `prompt_tokens` tokens of prompts."""

    def __init__(self, max_tpot_ms: float, num_rows: int) -> None:
        """num_rows: the most there can be."""
        if not max_tpot_ms > 0:
            raise ValueError(f"max_tpot_ms: got {max_tpot_ms}, wanted more than 0")
        self.max_rows = min(FIRST_ROWS, num_rows)
        self._bound_s = max_tpot_ms / 1000
        self._num_rows = num_rows
        self._times: list[float] = []  # of decode steps since the last look
        self._fewest = num_rows  # rows in these steps
        self._decode_s: float | None = None
        self._token_times: deque[float] = deque(maxlen=WINDOW)  # seconds that a token of a prompt adds
        self._too_many: int | None = None
        self._windows_left = 0  # before _too_many is forgotten

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts that a step with decode rows has time for; more than a step's budget for plenty."""
        if self._decode_s is None:
            return MIN_PROMPT_TOKENS
        left_s = self._bound_s - self._decode_s
        if not self._token_times:
            return FIRST_PROMPT_TOKENS if left_s > 0 else MIN_PROMPT_TOKENS
        # A step as long as the bound holds bound_s / token_s tokens: no division by the zero of a coarse clock.
        token_s = max(median(self._token_times), 1e-9)
        return max(MIN_PROMPT_TOKENS, int(left_s / token_s))

    def observe(self, num_decode_rows: int, num_prompt_tokens: int, elapsed_s: float) -> None:
        """A step has run. Those without decode rows hold nobody's next token up."""
        if num_decode_rows == 0:
            return
        if num_prompt_tokens > MIN_PROMPT_TOKENS:
            if self._decode_s is not None:
                self._token_times.append(max(0.0, elapsed_s - self._decode_s) / num_prompt_tokens)
            return
        if num_decode_rows > self.max_rows:
            return  # rows from before the last cut, on their way out
        self._times.append(elapsed_s)
        self._fewest = min(self._fewest, num_decode_rows)
        if len(self._times) == WINDOW:
            self._decode_s = median(self._times)
            self._adjust(self._decode_s, self._fewest)
            self._times.clear()
            self._fewest = self._num_rows

    def _adjust(self, step_s: float, num_rows: int) -> None:
        """step_s: of steps with at least `num_rows` rows."""
        self._windows_left = max(0, self._windows_left - 1)
        if self._windows_left == 0:
            self._too_many = None
        if step_s > self._bound_s:
            self._too_many, self._windows_left = self.max_rows, MEMORY
            cut = max(MOST_CUT, min(LEAST_CUT, self._bound_s / step_s))
            self.max_rows = max(1, min(self.max_rows - 1, int(self.max_rows * cut)))
            return
        is_full = num_rows >= self.max_rows - self.max_rows // 8
        if not is_full or step_s > WELL_WITHIN * self._bound_s:
            return
        # A step's time grows at most in proportion to its rows, so this does not overshoot.
        growth = min(MAX_GROWTH, self._bound_s / max(step_s, 1e-9))
        most = self._num_rows if self._too_many is None else self._too_many - 1
        self.max_rows = max(self.max_rows, min(most, max(self.max_rows + 1, int(num_rows * growth))))
