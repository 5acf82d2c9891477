"""The engine on CPU against transformers + PEFT: the demo model, 32 adapters at once, greedy, KV caches on both sides.

Three ways over the same prompts in the same process, taking turns: our mixed batch; PEFT's `set_adapter` loop (each
adapter's rows as one batch, adapters resident); PEFT's mixed batch (`adapter_names`). Each way runs with one torch
thread and with one a core, and its best round counts.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import record
from medley.demo.skills import SKILLS
from medley_worker import Engine, Request, SamplingParams

ASSETS = Path(__file__).resolve().parents[1] / "app" / "medley" / "demo" / "assets"


class Peft:
    """transformers + PEFT with all adapters loaded."""

    def __init__(self, names: list[str]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32)
        folder = ASSETS / "adapters"
        self.model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def loop(self, prompts: dict[str, torch.Tensor], num_tokens: int) -> int:
        """Each adapter's prompts as one batch, one adapter after another. Returns the tokens generated."""
        total = 0
        for name, ids in prompts.items():
            self.model.set_adapter(name)
            total += self._generate(ids, num_tokens)
        return total

    @torch.inference_mode()
    def mixed(self, prompts: dict[str, torch.Tensor], num_tokens: int) -> int:
        """All prompts as one batch, each row with its adapter."""
        names = [name for name, ids in prompts.items() for _ in range(ids.shape[0])]
        return self._generate(torch.cat(list(prompts.values())), num_tokens, adapter_names=names)

    def _generate(self, ids: torch.Tensor, num_tokens: int, **options: Any) -> int:
        out = self.model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **options,
        )
        return int((out.shape[1] - ids.shape[1]) * ids.shape[0])


def ours(names: list[str], max_num_seqs: int) -> Engine:
    engine = Engine.load(str(ASSETS / "model"), max_num_seqs=max_num_seqs, adapter_slots=len(names))
    for name in names:
        engine.add_adapter(name, str(ASSETS / "adapters" / name))
    return engine


@click.command()
@click.option("--adapters", default=32, show_default=True)
@click.option("--rows", "rows_each", default=1, show_default=True, help="Prompts of each adapter.")
@click.option("--prompt-len", default=16, show_default=True)
@click.option("--tokens", "num_tokens", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(adapters: int, rows_each: int, prompt_len: int, num_tokens: int, rounds: int) -> None:
    """Measure tokens/s of the three ways and write the result."""
    warnings.filterwarnings("ignore")
    names = [skill.name for skill in SKILLS[:: max(1, len(SKILLS) // adapters)]][:adapters]
    generator = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(97, 122, (rows_each, prompt_len), generator=generator) for n in names}
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    requests = [
        Request(prompt_token_ids=row.tolist(), adapter=name, sampling=sampling)
        for name, ids in prompts.items()
        for row in ids
    ]
    engine, peft = ours(names, len(requests)), Peft(names)
    ways: dict[str, Callable[[], int]] = {
        "medley, mixed batch": lambda: sum(len(r.token_ids) for r in engine.generate(requests)),
        "transformers + PEFT, set_adapter loop": lambda: peft.loop(prompts, num_tokens),
        "transformers + PEFT, mixed batch (adapter_names)": lambda: peft.mixed(prompts, num_tokens),
    }
    best = measure(ways, rounds)
    fastest_peer = max(rate for way, (rate, _) in best.items() if not way.startswith("medley"))
    rows = [
        {
            "way": way,
            "adapters": len(names),
            "rows": len(requests),
            "prompt_len": prompt_len,
            "new_tokens": num_tokens,
            "threads": threads,
            "tok_s": round(rate, 1),
            "over_fastest_peer": round(rate / fastest_peer, 2),
        }
        for way, (rate, threads) in best.items()
    ]
    path = record.write("engine", f"python -m benchmarks.engine_cpu {' '.join(sys.argv[1:])}".strip(), rows)
    for row in rows:
        record.say(f"{row['way']}: {row['tok_s']} tok/s ({row['over_fastest_peer']} of the faster peer)")
    record.say(f"wrote {path}")


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[float, int]]:
    """(tokens/s, threads) of each way: one round to warm up, then the best of `rounds`, the ways taking turns."""
    best = dict.fromkeys(ways, (0.0, 0))
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for number in range(rounds + 1):
            for way, run in ways.items():
                started = time.perf_counter()
                tokens = run()
                if number:
                    best[way] = max(best[way], (tokens / (time.perf_counter() - started), threads))
    return best


if __name__ == "__main__":
    main()
