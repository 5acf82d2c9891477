"""The oracle: what a fleet would take that knew every arrival and woke for nothing, at once.

Each second it has ceil(rows needed to serve every arrival without wait / row cap) workers. Rows are packed full,
adapters side by side, so each worker has the fewest distinct ones; its pace is the same step-time model. The rows
needed in a second are the mean of those in it, and a job that is done is not counted to the second's end: both make
the oracle cheaper than any real fleet without wait.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medley.dispatcher.simulation.traces import Trace
from medley.dispatcher.simulation.workers import Shape


def oracle(trace: Trace, shape: Shape) -> NDArray[np.int64]:
    """Workers of each second, from 0 until the last job is done; their sum is GPU-seconds."""
    cap, model = shape.max_num_seqs, shape.step_time
    first = np.searchsorted(trace.arrived_s, np.arange(int(trace.arrived_s[-1]) + 2, dtype=np.float64))
    active = np.empty(0, np.int64)
    left = trace.output_tokens.astype(np.float64)
    num_workers: list[int] = []
    second = 0
    while second < len(first) - 1 or len(active):
        if second < len(first) - 1:
            new = np.arange(first[second], first[second + 1])
            active = np.concatenate([active, new])
        else:
            new = np.empty(0, np.int64)
        if not len(active):
            num_workers.append(0)
            second += 1
            continue
        adapters = trace.adapter[active]
        order = np.argsort(adapters, kind="stable")
        active, adapters = active[order], adapters[order]
        seat = np.arange(len(active)) // cap
        sizes = np.bincount(seat)
        is_first = np.ones(len(active), bool)
        is_first[1:] = (adapters[1:] != adapters[:-1]) | (seat[1:] != seat[:-1])
        distinct = np.bincount(seat, is_first & (adapters >= 0), len(sizes))
        step_s = (
            model.base_s + model.row_s * sizes + model.lora_s * np.minimum(1.0, distinct) + model.adapter_s * distinct
        )
        prompts_s = trace.prompt_tokens[new].sum() * model.prompt_token_s / len(sizes)
        pace = max(0.0, 1.0 - prompts_s) / step_s[seat]  # steps a second
        there_s = np.minimum(1.0, second + 1.0 - trace.arrived_s[active])
        needed_s = left[active] / np.maximum(pace, 1e-9)
        num_workers.append(int(np.ceil(np.minimum(there_s, needed_s).sum() / cap)))
        left[active] -= pace * there_s
        active = active[left[active] > 0]
        second += 1
    return np.array(num_workers, np.int64)
