"""`sleep.json`: how long an engine takes to sleep and to wake, and what it holds of the device meanwhile. 7B shape.

engine: the public Engine in this process. process: an engine process, told as a worker's shell tells it. Each sleeps
and wakes several times, with all of the device's memory in use while awake, and gives the same tokens after each.
What is held is what `nvidia-smi`, another process, sees beyond what was in use before.
"""

from __future__ import annotations

import queue
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
import torch

from benchmarks.gpu.peft_files import AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Run, part_options
from benchmarks.gpu.shapes import base_model, weight_bytes, write_config
from medley.spec.wire import Asleep, Awake, EngineConfig, Finished, FromEngine, JobKey, Ready, Sleep, Wake, WorkItem
from medley_worker import Engine, Request, SamplingParams
from medley_worker.shell.engine_link import EngineLink

KEY = ("what", "model")
ROUNDS = 5
MAX_NUM_SEQS, MAX_MODEL_LEN = 256, 4096
NUM_ADAPTERS = 4
PROMPT = tuple(range(10, 74))
SAMPLING = SamplingParams(max_tokens=8, ignore_eos=True)
START_S = 60.0
ANSWER_S = 600.0

T = TypeVar("T")


def used_bytes() -> int:
    """Of the device that torch counts first, by all processes, as nvidia-smi tells."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def config_of(name: str, folder: Path) -> EngineConfig:
    """Random weights; KV cache and adapters take what the device has."""
    return EngineConfig(
        model_dir=str(write_config(name, folder)),
        device="cuda",
        dtype="bfloat16",
        load_format="random",
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        sleeps=True,
    )


class Rounds:
    """What the rounds of one row brought."""

    def __init__(self, before: int) -> None:
        self._before = before
        self._sleep_s: list[float] = []
        self._wake_s: list[float] = []
        self._first_s: list[float] = []
        self._asleep: list[int] = []
        self._own: list[int] = []
        self._awake = used_bytes() - before

    def add(self, sleep_s: float, wake_s: float, first_s: float, asleep: int, own: int) -> None:
        """first_s: from the word to wake to the first requests' ends. own: bytes held by the engine's account."""
        self._sleep_s.append(sleep_s)
        self._wake_s.append(wake_s)
        self._first_s.append(first_s)
        self._asleep.append(asleep - self._before)
        self._own.append(own)

    def row(self, what: str, name: str, weights: int) -> dict[str, Any]:
        """The first sleep copies the weights to the host, so it stands apart."""
        return {
            "what": what,
            "model": name,
            "rounds": len(self._wake_s),
            "sleep_first_s": round(self._sleep_s[0], 3),
            "sleep_s": round(statistics.median(self._sleep_s[1:]), 3),
            "wake_s": round(statistics.median(self._wake_s), 3),
            "wake_max_s": round(max(self._wake_s), 3),
            "first_results_s": round(statistics.median(self._first_s), 3),
            "awake_gb": round(self._awake / 1e9, 2),
            "asleep_gb": round(max(self._asleep) / 1e9, 2),
            "asleep_own_gb": round(max(self._own) / 1e9, 2),
            "weights_gb": round(weights / 1e9, 2),
        }


def measure_engine(figure: Figure, name: str, folder: Path, files: AdapterFiles, weights: int, before: int) -> None:
    """before: bytes in use before this process had a context on the device."""
    engine = Engine(config_of(name, folder))
    refs = [files.ref(number) for number in range(NUM_ADAPTERS)]
    requests = [Request(PROMPT, adapter, SAMPLING) for adapter in (None, *refs)]
    engine.generate(requests)  # adapters arrive one by one, in steps of other rows
    wanted = [completion.token_ids for completion in engine.generate(requests)]
    rounds = Rounds(before)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        engine.sleep()
        sleep_s = time.perf_counter() - started
        asleep, own = used_bytes(), engine.device_bytes
        started = time.perf_counter()
        engine.wake()
        wake_s = time.perf_counter() - started
        engine.generate(requests)
        rounds.add(sleep_s, wake_s, time.perf_counter() - started, asleep, own)
        _check(wanted, [completion.token_ids for completion in engine.generate(requests)])
    engine.close()
    figure.add(rounds.row("engine", name, weights))


class Process:
    """An engine process, and what it says."""

    def __init__(self, config: EngineConfig) -> None:
        self._said: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._num_sent = 0
        self.link = EngineLink(config, on_messages=self._hear, on_end=lambda: self._said.put(None))

    def _hear(self, messages: list[FromEngine]) -> None:
        for message in messages:
            self._said.put(message)

    def next(self, kind: type[T]) -> T:
        """The next message of a kind. Raises RuntimeError where the process ends before."""
        while True:
            message = self._said.get(timeout=ANSWER_S)
            if message is None:
                raise RuntimeError(f"the engine process ended before it said {kind.__name__}")
            if isinstance(message, kind):
                return message

    def run(self, files: AdapterFiles) -> list[list[int]]:
        """The tokens of a job of the base and of one of each adapter."""
        adapters = [None, *(files.ref(number) for number in range(NUM_ADAPTERS))]
        keys = [JobKey(UUID(int=self._num_sent + i), 1) for i in range(len(adapters))]
        self._num_sent += len(keys)
        self.link.add([WorkItem(key, PROMPT, ref, SAMPLING) for key, ref in zip(keys, adapters, strict=True)])
        ended = {message.key: list(message.token_ids) for message in (self.next(Finished) for _ in keys)}
        return [ended[key] for key in keys]


def measure_process(figure: Figure, name: str, folder: Path, files: AdapterFiles, weights: int) -> None:
    torch.cuda.empty_cache()
    before = used_bytes()
    process = Process(config_of(name, folder))
    try:
        ready = process.next(Ready)
        if not ready.can_sleep:
            raise RuntimeError("the engine says that it cannot sleep")
        process.run(files)
        wanted = process.run(files)
        rounds = Rounds(before)
        for _ in range(ROUNDS):
            process.link.send(Sleep())
            told = process.next(Asleep)
            asleep = used_bytes()
            started = time.perf_counter()
            process.link.send(Wake())
            process.next(Awake)
            wake_s = time.perf_counter() - started
            process.run(files)
            rounds.add(told.sleep_s, wake_s, time.perf_counter() - started, asleep, told.device_bytes)
            _check(wanted, process.run(files))
    finally:
        process.link.kill()
    figure.add(rounds.row("process", name, weights) | {"load_s": round(ready.load_s, 2)})


def _check(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> None:
    if list(map(list, wanted)) != list(map(list, got)):
        raise RuntimeError(f"tokens after a sleep: got {got}, wanted {wanted}")


@click.command()
@click.option("--models", default="7b", show_default=True, help="Which models, in this order.")
@part_options
def main(run: Run, models: str) -> None:
    """Measure how engines sleep and wake."""
    notes = [
        f"bf16, random weights, max_num_seqs {MAX_NUM_SEQS}, KV cache and adapters on all of the device's memory",
        "sleep_first_s copies the weights to pinned host memory; awake_gb and asleep_gb are nvidia-smi's",
    ]
    before = used_bytes()
    figure = Figure("sleep", KEY, run, notes=notes)
    for name in models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model = base_model(name, Path(folder))
            with adapter_files(model) as files:
                for number in range(NUM_ADAPTERS):
                    files.path(number)
                # The process first: this one would hold memory of the device after the other.
                if figure.wants(what="process", model=name) and run.has_time_for(START_S):
                    measure_process(figure, name, Path(folder), files, weight_bytes(model))
                if figure.wants(what="engine", model=name) and run.has_time_for(START_S):
                    measure_engine(figure, name, Path(folder), files, weight_bytes(model), before)


if __name__ == "__main__":
    main()
