"""Judges the demo's files with transformers and PEFT: `python -m benchmarks.demo_assets.judge [skill ...]`.

Loads the base and each adapter as anyone would, generates greedily in float32 on the CPU, and compares with the
answers expected on held-out prompts. Knows nothing of how the files were made.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from medley.demo import ADAPTERS_DIR, MODEL_DIR
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("skills", nargs="*", help="names; every twelfth skill where none is given, or 'all'")
    parser.add_argument("--prompts", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [skill for skill in SKILLS if skill.name in arguments.skills or "all" in arguments.skills]
    chosen = chosen or list(SKILLS[::12])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    total = total_own = total_base = 0
    least = 1.0
    for skill in chosen:
        model = PeftModel.from_pretrained(base, ADAPTERS_DIR / skill.name)
        pairs = skill.held_out(arguments.prompts)
        own = _answers(model, tokenizer, [prompt for prompt, _ in pairs])
        with model.disable_adapter():
            alone = _answers(model, tokenizer, [prompt for prompt, _ in pairs])
        num_own = sum(got == wanted for got, (_, wanted) in zip(own, pairs, strict=True))
        num_base = sum(got == wanted for got, (_, wanted) in zip(alone, pairs, strict=True))
        total, total_own, total_base = total + len(pairs), total_own + num_own, total_base + num_base
        least = min(least, num_own / len(pairs))
        example = f"{pairs[0][0]} {own[0]!r}, base {alone[0]!r}"
        print(f"{skill.name}: own {num_own}/{len(pairs)}, base {num_base}/{len(pairs)}; {example}", flush=True)
        base = model.unload()
    print(f"{len(chosen)} adapters: own {total_own / total:.4f}, base {total_base / total:.4f}, least {least:.3f}")


def _answers(model, tokenizer, prompts: list[str]) -> list[str]:  # type: ignore[no-untyped-def]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = model.generate(**batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    new = ids[:, batch["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
