"""A few sequences stepped by hand through a decoder: pages, chunks and adapters without an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medley_worker.engine.adapters import AdapterCache
from medley_worker.models import Decoder, build_batch

PAGE_SIZE = 8


@dataclass
class Sequence:
    """A sequence with its pages; `num_computed` of its tokens are in the cache."""

    token_ids: list[int]
    adapter: str | None = None
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0


class Stepper:
    """Computes chosen chunks of chosen sequences in one forward pass."""

    def __init__(self, decoder: Decoder, cache: AdapterCache | None = None, num_pages: int = 512) -> None:
        self.decoder, self.cache = decoder, cache
        self.kv = decoder.new_kv_cache(num_pages, PAGE_SIZE)
        self._free = list(range(num_pages))[::-1]

    def shuffle_pages(self, seed: int) -> None:
        """Make pages scattered, as they are after many requests."""
        np.random.default_rng(seed).shuffle(self._free)

    def step(self, work: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Compute the next `n` tokens of each sequence, decode rows first. Returns logits [n, V] each."""
        token_ids: list[int] = []
        num_tokens = [n for _, n in work]
        for sequence, n in work:
            token_ids += sequence.token_ids[sequence.num_computed : sequence.num_computed + n]
            sequence.num_computed += n
            while len(sequence.pages) * PAGE_SIZE < sequence.num_computed:
                sequence.pages.append(self._free.pop())
        table = np.zeros((len(work), max(len(s.pages) for s, _ in work)), dtype=np.int64)
        for i, (sequence, _) in enumerate(work):
            table[i, : len(sequence.pages)] = sequence.pages
        num_decode = next((i for i, n in enumerate(num_tokens) if n > 1), len(work))
        keys = [None if s.adapter is None else ("t", s.adapter) for s, _ in work]
        lora = None if self.cache is None else self.cache.lora_batch(keys, num_tokens)
        batch = build_batch(
            token_ids=token_ids,
            qo_indptr=np.concatenate(([0], np.cumsum(num_tokens))),
            kv_len=[s.num_computed for s, _ in work],
            page_table=table,
            num_decode_rows=num_decode,
            logit_rows=np.arange(len(token_ids)),
            page_size=PAGE_SIZE,
            lora=lora,
        )
        return list(torch.split(self.decoder.forward(batch, self.kv), num_tokens))

    def logits(self, sequences: list[Sequence], chunks: list[int]) -> list[Tensor]:
        """Every logit of every sequence, computed together in steps of these sizes (the last one repeats)."""
        parts: list[list[Tensor]] = [[] for _ in sequences]
        step = 0
        while any(s.num_computed < len(s.token_ids) for s in sequences):
            size = chunks[min(step, len(chunks) - 1)]
            left = [(i, min(size, len(s.token_ids) - s.num_computed)) for i, s in enumerate(sequences)]
            left = sorted(((i, n) for i, n in left if n), key=lambda item: item[1] > 1)
            for (i, _), part in zip(left, self.step([(sequences[i], n) for i, n in left]), strict=True):
                parts[i].append(part)
            step += 1
        return [torch.cat(part) for part in parts]
