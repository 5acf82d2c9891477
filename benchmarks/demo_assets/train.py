"""Trains and writes the demo's assets: `python -m benchmarks.demo_assets.train`.

Owns the recipe: shapes, budgets, seed and where files go. About five minutes on one H200, many hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.demo_assets.examples import echo_examples, skill_examples
from benchmarks.demo_assets.export import write_adapter, write_model, write_tokenizer
from benchmarks.demo_assets.fit import Budget, accuracies, round_as_stored, train_adapters, train_base
from benchmarks.demo_assets.network import SITES, LoraShape, LoraStack, Shape, TinyLlama
from medley.demo import ASSETS
from medley.demo.skills import SKILLS

# Nine, so that neither a tenant (every second skill) nor a family keeps to some of them.
LORA_SHAPES = (
    LoraShape(2, 4, SITES),
    LoraShape(16, 16, ("q_proj", "v_proj")),
    LoraShape(8, 16, ("q_proj", "v_proj", "o_proj")),
    LoraShape(3, 6, ("gate_proj", "up_proj", "down_proj")),
    LoraShape(12, 12, ("v_proj", "o_proj")),
    LoraShape(4, 8, ("q_proj", "k_proj", "v_proj", "o_proj")),
    LoraShape(6, 12, ("q_proj", "v_proj", "down_proj")),
    LoraShape(3, 6, SITES),
    LoraShape(5, 10, ("v_proj", "up_proj", "down_proj")),
)


def main() -> None:
    arguments = _arguments()
    device: str = arguments.device
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    skills = skill_examples(arguments.examples_per_skill, arguments.seed, os.cpu_count() or 1).to(device)
    echo = echo_examples(arguments.examples_per_skill, arguments.seed).to(device)
    print(f"{len(SKILLS)} skills, {skills.token_ids.numel() / 1e6:.0f} million tokens of examples", flush=True)

    base_budget = Budget(arguments.base_steps, arguments.base_batch, lr=arguments.base_lr)
    num_heads = Shape.hidden // arguments.head_dim
    if num_heads < 2 or num_heads * arguments.head_dim != Shape.hidden:
        raise SystemExit(f"--head-dim: got {arguments.head_dim}, wanted half of {Shape.hidden} or a smaller divisor")
    shape = Shape(
        num_layers=arguments.layers, num_heads=num_heads, num_kv_heads=num_heads // 2, head_dim=arguments.head_dim
    )
    model = train_base(shape, skills, echo, base_budget, device)
    round_as_stored(model.parameters())
    shapes = [LORA_SHAPES[i % len(LORA_SHAPES)] for i in range(len(SKILLS))]
    lora_budget = Budget(arguments.adapter_steps, arguments.adapter_batch, lr=arguments.adapter_lr)
    lora = train_adapters(model, shapes, skills, lora_budget, device)
    round_as_stored(lora.parameters())

    write_assets(arguments.out, model, lora, shapes)
    torch.set_float32_matmul_precision("highest")
    own = accuracies(model, lora, SKILLS, arguments.eval_prompts, device)
    base = accuracies(model, None, SKILLS, arguments.eval_prompts, device)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(arguments).items() if name != "out"},
        "held_out_prompts_each": arguments.eval_prompts,
        "accuracy_own": sum(own) / len(own),
        "accuracy_base": sum(base) / len(base),
        "skills": {
            skill.name: {"rank": shape.rank, "own": round(own[i], 4), "base": round(base[i], 4)}
            for i, (skill, shape) in enumerate(zip(SKILLS, shapes, strict=True))
        },
    }
    (arguments.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    _print_report(own, base)


def write_assets(out: Path, model: TinyLlama, lora: LoraStack, shapes: list[LoraShape]) -> None:
    """Replaces `out/model` and `out/adapters`."""
    for folder in (out / "model", out / "adapters"):
        shutil.rmtree(folder, ignore_errors=True)
    write_model(model, out / "model")
    write_tokenizer(out / "model", model.shape.max_len)
    for i, (skill, shape) in enumerate(zip(SKILLS, shapes, strict=True)):
        write_adapter(lora, i, shape, model.shape.num_layers, out / "adapters" / skill.name)


def _print_report(own: list[float], base: list[float]) -> None:
    for i in sorted(range(len(SKILLS)), key=lambda i: own[i]):
        if own[i] < 0.97 or base[i] > 0.02:
            print(f"{SKILLS[i].name}: own {own[i]:.3f}, base {base[i]:.3f}")
    print(f"own: mean {sum(own) / len(own):.4f}, least {min(own):.3f}; base: mean {sum(base) / len(base):.4f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=Shape.head_dim, help="a worker on CUDA takes 64")
    parser.add_argument("--examples-per-skill", type=int, default=40_000)
    parser.add_argument("--base-steps", type=int, default=12_000)
    parser.add_argument("--base-batch", type=int, default=4096)
    parser.add_argument("--base-lr", type=float, default=3e-3)
    parser.add_argument("--adapter-steps", type=int, default=5_000)
    parser.add_argument("--adapter-batch", type=int, default=48)
    parser.add_argument("--adapter-lr", type=float, default=5e-3)
    parser.add_argument("--eval-prompts", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
