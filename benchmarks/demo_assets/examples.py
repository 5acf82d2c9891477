"""Examples as tensors of token ids.

Owns the token ids of the byte-level vocabulary and the layout `<s> prompt answer </s> pad...` of a row.
Knows nothing of models.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS, prompt_of
from medley.demo.texts import Kind, draw, is_held_out

BOS, EOS, PAD = 256, 257, 258  # ids 0 to 255 are the bytes themselves
NUM_TOKENS = 259
VOCAB_SIZE = 264  # padded to a multiple of 8; the last five stand for nothing
ROW_LEN = 26  # the longest training row; longer answers do not occur


@dataclass(frozen=True)
class Examples:
    """Rows of training examples, the same number for each group (a skill, or the echo of the base)."""

    token_ids: Tensor  # [G, n, ROW_LEN] int16
    answer_at: Tensor  # [G, n] int16, where the answer begins

    def to(self, device: str) -> Examples:
        return Examples(self.token_ids.to(device), self.answer_at.to(device))


def encode_prompt(prompt: str) -> list[int]:
    return [BOS, *prompt.encode()]


def skill_examples(num_per_skill: int, seed: int, num_processes: int) -> Examples:
    """Training rows for every skill, in the order of SKILLS."""
    with ProcessPoolExecutor(num_processes) as pool:
        count = len(SKILLS)
        parts = list(pool.map(_rows_of_skill, range(count), [num_per_skill] * count, [seed] * count))
    return _as_tensors([rows for rows, _ in parts], [starts for _, starts in parts])


def echo_examples(num: int, seed: int) -> Examples:
    """Rows in which the answer is the text itself: what the base does when no adapter is asked for."""
    rng = random.Random(f"echo {seed}")
    texts: list[str] = []
    while len(texts) < num:
        text = draw(rng.choice((Kind.WORD, Kind.WORD, *Kind)), rng)
        if not is_held_out(text):
            texts.append(text)
    rows, starts = _pack([(prompt_of(text), text) for text in texts])
    return _as_tensors([rows], [starts])


def prompt_rows(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Room to generate in, for (prompt, expected) pairs.

    Returns the rows [n, S] with prompts in and pads after, the prompts' lengths [n], and the rows [n, S] as
    they should become; all int64.
    """
    width = max(len(encode_prompt(prompt)) for prompt, _ in pairs) + MAX_ANSWER_TOKENS
    rows = torch.full((len(pairs), width), PAD)
    wanted = rows.clone()
    lengths = torch.zeros(len(pairs), dtype=torch.int64)
    for i, (prompt, expected) in enumerate(pairs):
        ids = encode_prompt(prompt)
        rows[i, : len(ids)] = torch.tensor(ids)
        full = [*ids, *expected.encode(), EOS]
        wanted[i, : len(full)] = torch.tensor(full)
        lengths[i] = len(ids)
    return rows, lengths, wanted


def _rows_of_skill(index: int, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return _pack(SKILLS[index].training(num, seed))


def _pack(pairs: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.full((len(pairs), ROW_LEN), PAD, dtype=np.int16)
    starts = np.zeros(len(pairs), dtype=np.int16)
    for i, (prompt, expected) in enumerate(pairs):
        ids = encode_prompt(prompt)
        full = [*ids, *expected.encode(), EOS]
        rows[i, : len(full)] = full
        starts[i] = len(ids)
    return rows, starts


def _as_tensors(rows: list[np.ndarray], starts: list[np.ndarray]) -> Examples:
    return Examples(torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(starts)))
