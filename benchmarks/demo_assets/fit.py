"""The two trainings and the measurement.

First the base learns every skill with a task vector in place of the first token's embedding, and the echo
with the true embedding of `<s>`. The task vectors are thrown away, so the base alone knows no way to ask for
a skill. Then the base is frozen, rounded as it will be stored, and all adapters learn at once, each from its
own skill's examples alone. Knows nothing of files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_assets.examples import BOS, EOS, PAD, Examples, prompt_rows
from benchmarks.demo_assets.network import LoraShape, LoraStack, Shape, TinyLlama
from medley.demo.skills import MAX_ANSWER_TOKENS, Skill


@dataclass(frozen=True)
class Budget:
    """How long a training lasts and how it steps."""

    num_steps: int
    batch: int  # rows a step, in all for the base, for each adapter for the adapters
    lr: float
    warmup_steps: int = 300


def train_base(shape: Shape, skills: Examples, echo: Examples, budget: Budget, device: str) -> TinyLlama:
    """The base, with the last row of its task table as the embedding of `<s>`."""
    num_tasks = skills.token_ids.shape[0]
    model = TinyLlama(shape).to(device)
    tasks = nn.Embedding(num_tasks + 1, shape.hidden, device=device)
    nn.init.normal_(tasks.weight, std=0.08)
    run = torch.compile(model) if device.startswith("cuda") else model
    parameters = [*model.parameters(), *tasks.parameters()]
    num_echo = budget.batch // 24

    def loss() -> Tensor:
        task = torch.randint(num_tasks, (budget.batch - num_echo,), device=device)
        ids, starts = _pick(skills, task)
        echo_ids, echo_starts = _pick(echo, torch.zeros(num_echo, dtype=torch.int64, device=device))
        task = F.pad(task, (0, num_echo), value=num_tasks)
        ids, starts = torch.cat((ids, echo_ids)), torch.cat((starts, echo_starts))
        logits = run(ids[None, :, :-1], first=tasks(task)[None])
        return answer_loss(logits[0], ids, starts)

    _descend("base", parameters, loss, budget, weight_decay=0.01)
    with torch.no_grad():
        model.model.embed_tokens.weight[BOS] = tasks.weight[num_tasks]
    return model


def train_adapters(
    model: TinyLlama, shapes: list[LoraShape], skills: Examples, budget: Budget, device: str
) -> LoraStack:
    """Adapter i of the stack learns skill i; `model` is left as it is."""
    model.requires_grad_(False)
    lora = LoraStack(model.shape, shapes).to(device)
    num = len(shapes)
    skill = torch.arange(num, device=device).repeat_interleave(budget.batch)
    run = torch.compile(model) if device.startswith("cuda") else model

    def loss() -> Tensor:
        ids, starts = _pick(skills, skill)
        logits = run(ids.view(num, budget.batch, -1)[:, :, :-1], lora)
        # The mean over adapters would make each gradient small beside Adam's epsilon.
        return answer_loss(logits.flatten(0, 1), ids, starts) * num

    _descend("adapters", list(lora.parameters()), loss, budget, weight_decay=0.0, max_norm=None)
    return lora


def round_as_stored(parameters: Iterable[Tensor]) -> None:
    """Rounds to the nearest bfloat16 in place: what the files will hold."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def accuracies(
    model: TinyLlama, lora: LoraStack | None, skills: tuple[Skill, ...], num_prompts: int, device: str
) -> list[float]:
    """The share of held-out prompts that adapter i (None: the base) answers exactly, for each skill i.

    Greedy, in float32; right means the expected bytes and then the end token.
    """
    model.eval()
    rows, lengths, wanted = prompt_rows([pair for skill in skills for pair in skill.held_out(num_prompts)])
    grouped = (len(skills), num_prompts)
    ids, at = rows.to(device).view(*grouped, -1), lengths.to(device).view(grouped)
    ended = torch.zeros(grouped, dtype=torch.bool, device=device)
    for _ in range(MAX_ANSWER_TOKENS):
        logits = model(ids[:, :, : int(at.max())], lora)
        last = logits.gather(2, (at - 1)[..., None, None].expand(-1, -1, -1, logits.shape[-1]))
        token = last[:, :, 0].argmax(-1).masked_fill(ended, PAD)
        ids.scatter_(2, at[..., None], token[..., None])
        ended |= token == EOS
        at = at + 1
    right = (ids == wanted.to(device).view_as(ids)).all(-1)
    return [float(share) for share in right.float().mean(-1)]


def answer_loss(logits: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """Mean cross-entropy over answers and end tokens. logits [n, S-1, V], ids [n, S], starts [n]."""
    targets = ids[:, 1:]
    places = torch.arange(1, ids.shape[1], device=ids.device)
    targets = targets.masked_fill((places < starts[:, None]) | (targets == PAD), -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _pick(examples: Examples, group: Tensor) -> tuple[Tensor, Tensor]:
    """One random row from each of the groups named: ids [n, S] int64 and starts [n] int64."""
    row = torch.randint(examples.token_ids.shape[1], group.shape, device=group.device)
    return examples.token_ids[group, row].long(), examples.answer_at[group, row].long()


def _descend(
    name: str,
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    budget: Budget,
    *,
    weight_decay: float,
    max_norm: float | None = 1.0,
) -> None:
    """AdamW with a linear warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(
        parameters, lr=budget.lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=parameters[0].is_cuda
    )

    def factor(step: int) -> float:
        if step < budget.warmup_steps:
            return (step + 1) / budget.warmup_steps
        done = (step - budget.warmup_steps) / max(1, budget.num_steps - budget.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    started = time.monotonic()
    for step in range(budget.num_steps):
        value = loss()
        torch.autograd.backward(value)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == budget.num_steps - 1:
            print(
                f"{name}: step {step}, loss {value.item():.4f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
