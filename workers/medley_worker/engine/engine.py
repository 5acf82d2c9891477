"""The engine: requests in, tokens out, one forward pass a step over rows of many adapters.

A synchronous class without threads. It owns the requests in flight and joins scheduler, forward pass and adapter
memory; it knows nothing of jobs, sockets or databases.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np

from medley.spec.errors import ErrorCode
from medley.spec.jobs import Checkpoint, FinishReason
from medley.spec.sampling import SEED_LIMIT
from medley.spec.wire import AdapterRef, EngineConfig, EngineStats
from medley_worker.engine.assembly import Parts, assemble
from medley_worker.engine.findings import findings_for
from medley_worker.engine.grammars import Grammars
from medley_worker.engine.harvest import finished, harvest
from medley_worker.engine.offline import generate
from medley_worker.engine.pipeline import Drawn, Pipeline
from medley_worker.engine.plans import StepPlan
from medley_worker.engine.requests import Completion, Limits, Request, RequestOutput, check_request, ended
from medley_worker.engine.sequences import AdapterKey, AlreadyInFlight, Refused, RequestId, Sequence
from medley_worker.engine.sizing import EngineSizes
from medley_worker.engine.stats import Counters

LOAD_WAIT_S = 0.05  # that a step with nothing to run waits for an adapter, before its caller may do something else


class Engine:
    """Continuous batching over one base model and any number of LoRA adapters.

    on_entering: called with the ids of requests before the first work on them that could end the process (the
    load of an adapter, the first step), so that the caller can say whom to suspect.
    """

    def __init__(self, config: EngineConfig, on_rank_death: Callable[[str], None] | None = None) -> None:
        """Load the model. Raises UnsupportedModel, or ValueError naming a field of `config`.

        on_rank_death: called on a thread when another rank of the model has died, with the reason. By default `step`
        raises RankDied.
        """
        self.config = config
        self.on_entering: Callable[[list[RequestId]], None] | None = None
        self._open: Parts | None = assemble(config, self._announce, on_rank_death)
        self._is_asleep = False
        self._pipeline = Pipeline(self._parts.forward, self._parts.rows, self._parts.scheduler)
        self._grammars = Grammars(Path(config.model_dir), self.vocab_size, self._parts.model.eos_token_ids)
        self._sequences: dict[RequestId, Sequence] = {}
        self._outputs: list[RequestOutput] = []  # of requests that ended outside a step
        self._order = 0
        self._random = random.Random(config.seed)
        self._counters = Counters()
        self._limits = Limits(self._parts.model.vocab_size, self.sizes.max_model_len)

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_bytes: int | None = None,
        adapter_bytes: int | None = None,
        adapter_slots: int | None = None,
        load_format: Literal["safetensors", "random"] = "safetensors",
        seed: int = 0,
        adapter_host_bytes: int | None = None,
        max_tpot_ms: float | None = None,
        batch_invariant: bool = False,
        tensor_parallel: int = 1,
        sleeps: bool = False,
        gpu_share: float | None = None,
    ) -> Engine:
        """An engine over the Hugging Face folder `model_dir`.

        max_num_batched_tokens: budget of a step. kv_cache_bytes, adapter_bytes: None sizes them from the device.
        adapter_slots: room for this many adapters of the largest rank. load_format "random" needs config.json
        alone. seed: of random weights, and of the seeds drawn for requests that bring none. adapter_host_bytes:
        memory for adapters on the host. max_tpot_ms: what the time per output token is held to, by running fewer
        rows at once. batch_invariant: bits that depend on no neighbour on CUDA too, at a cost. tensor_parallel: devices
        that share the model, `device` and those after it, each with a process of its own. sleeps: `sleep` will be
        called. gpu_share: of a GPU's memory, where others run on it; None takes what is free.
        """
        return cls(
            EngineConfig(
                model_dir=str(model_dir),
                device=device,
                dtype=dtype,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_bytes=kv_cache_bytes,
                adapter_bytes=adapter_bytes,
                adapter_slots=adapter_slots,
                load_format=load_format,
                seed=seed,
                adapter_host_bytes=adapter_host_bytes,
                max_tpot_ms=max_tpot_ms,
                batch_invariant=batch_invariant,
                tensor_parallel=tensor_parallel,
                sleeps=sleeps,
                gpu_share=gpu_share,
            )
        )

    @property
    def _parts(self) -> Parts:
        if self._open is None:
            raise RuntimeError("the engine is closed")
        return self._open

    @property
    def sizes(self) -> EngineSizes:
        return self._parts.sizes

    @property
    def vocab_size(self) -> int:
        return self._parts.model.vocab_size

    @property
    def can_sleep(self) -> bool:
        """Whether `sleep` gives the devices' memory back: asked for by `sleeps`, and possible on each of them."""
        return self._parts.memory.can_sleep

    @property
    def is_asleep(self) -> bool:
        return self._is_asleep

    @property
    def device_bytes(self) -> int:
        """Of the memory of all its devices, held by its processes now; 0 on a CPU."""
        ranks = self._parts.ranks
        return self._parts.usage.num_bytes + (0 if ranks is None else ranks.followers.device_bytes)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._sequences) or bool(self._outputs) or self._pipeline.num_in_flight > 0

    def add_adapter(self, name: str, adapter_dir: str | Path) -> None:
        """Make the PEFT adapter in `adapter_dir` known as `name`. Its weights are read when first used.

        Raises ValueError for a name in use, AdapterRefused (a ValueError) with all that is wrong with the files,
        Refused for an adapter that needs more memory than there is, OSError.
        """
        self._parts.names.add(name, Path(adapter_dir))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory. Raises KeyError for an unknown name, ValueError while in use."""
        self._parts.names.remove(name, self._in_use)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run `requests` together; their completions in the same order.

        Raises ValueError, naming the first bad request, before any is run; RuntimeError while requests of
        `add_request` are in flight.
        """
        return generate(self, list(requests))

    def add_request(
        self,
        request_id: RequestId,
        request: Request,
        checkpoint: Checkpoint | None = None,
        priority: int = 0,
        *,
        stream: bool = True,
        is_sampling_checked: bool = False,
    ) -> None:
        """Queue a request. It goes on after the tokens of `checkpoint`.

        priority: higher goes first. stream: report tokens as they come; otherwise only at the end.
        is_sampling_checked: its sampling parameters were held against their limits before, as the service does.
        Raises Refused for what the model cannot serve, AlreadyInFlight for an id in flight (both ValueErrors),
        RuntimeError while asleep.
        """
        if self._is_asleep:
            raise RuntimeError("the engine is asleep; wake() first")
        if request_id in self._sequences:
            raise AlreadyInFlight(f"request {request_id!r} is in flight already")
        check_request(request, checkpoint, self._limits, is_sampling_checked=is_sampling_checked)
        sampling = request.sampling
        prompt = np.array(request.prompt_token_ids, dtype=np.int32)
        sequence = Sequence(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            seed=self._random.randrange(SEED_LIMIT) if sampling.seed is None else sampling.seed,
            adapter=self._parts.names.key_of(request.adapter, self._in_use),
            priority=priority,
            order=self._order,
            is_streamed=stream,
            findings=findings_for(prompt, request.num_continuation, sampling),
        )
        self._order += 1
        if not sequence.is_drawn and len(prompt) == 1:  # nothing is before its only token
            self._outputs.append(finished(sequence, FinishReason.LENGTH))
            return
        if checkpoint is not None and sequence.resume(checkpoint):
            reason = ended(request, checkpoint, self._parts.model.eos_token_ids, self.sizes.max_model_len)
            if reason is not None:
                self._outputs.append(finished(sequence, reason))
                return
        grammar = sampling.grammar if sequence.is_drawn else None
        if grammar is not None and not self._parts.model.eos_token_ids:
            raise Refused(ErrorCode.INVALID_GRAMMAR, f"{grammar.kind}: the model has no end token to end a text with")
        self._sequences[request_id] = sequence
        if grammar is None:
            self._parts.scheduler.add(sequence)
        else:
            self._grammars.add(sequence, grammar)

    def step(self) -> list[RequestOutput]:
        """Run one step: admit, launch, and read what was launched `depth` steps before.

        Returns what is new for requests that are streamed or ended. Raises RankDied where another rank of the model has
        died; the engine is of no use then but to be closed.
        """
        ranks = self._parts.ranks
        with nullcontext() if ranks is None else ranks.followers.watched():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        started = time.perf_counter()
        outputs = self.take_outputs()
        if self._grammars.num_waiting:
            self._take_guided(outputs)
        if self._pipeline.num_in_flight and self._parts.scheduler.must_settle:
            self._settle(outputs)
        plan = self._parts.scheduler.schedule()
        for sequence, error in plan.failed:
            del self._sequences[sequence.request_id]
            outputs.append(finished(sequence, None, error))
        self._counters.preemptions += plan.num_preempted
        if plan.is_empty:
            if not outputs and not self._pipeline.num_in_flight and self._parts.scheduler.num_waiting:
                self._parts.residency.wait(LOAD_WAIT_S)
            elif not outputs and not self._pipeline.num_in_flight and self._grammars.num_waiting:
                self._grammars.wait(LOAD_WAIT_S)
            self._settle(outputs)
        else:
            self._announce([s for s in plan.entering if not s.is_announced])
            self._pipeline.launch(plan, started)
            self._count(plan)
            while self._pipeline.has_excess:
                self._take(self._pipeline.collect(), outputs)
        self._counters.step_s += time.perf_counter() - started
        return outputs

    def take_outputs(self) -> list[RequestOutput]:
        """What is new without a step: the ends that came to light since the last one."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort(self, request_ids: Iterable[RequestId]) -> None:
        """Forget these requests, of which nothing more is reported; unknown ids are ignored."""
        gone = set(request_ids)
        for request_id in gone:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._remove(sequence)
        if not self._sequences:
            self._settle(self._outputs)  # of nobody: so that an engine without requests has no work
        self._outputs = [output for output in self._outputs if output.request_id not in gone]

    def release(self, request_ids: Iterable[RequestId] | None = None) -> dict[RequestId, Checkpoint]:
        """Give these requests (None: all) back with what they have generated; unknown ids are left out.

        So are those that end with the tokens in flight: `take_outputs`, or the next step, reports them.
        """
        self._settle(self._outputs)
        released: dict[RequestId, Checkpoint] = {}
        for request_id in list(self._sequences) if request_ids is None else request_ids:
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                self._remove(sequence)
                released[request_id] = sequence.checkpoint()
        return released

    def sleep(self) -> None:
        """Give the devices' memory back: weights stay on the host, KV cache and adapters' tiles nowhere.

        Addresses stay, and with them what was captured. Raises RuntimeError with requests in flight, where `can_sleep`
        is false, or, as OSError too, where the host has no room for the weights; the engine stays awake then.
        """
        if self._is_asleep:
            return
        if not self.can_sleep:
            raise RuntimeError("this engine cannot sleep: it was built without `sleeps`, or on a device without a way")
        if self.has_work:
            raise RuntimeError("sleep() wants an engine without requests in flight; release() them")
        self._parts.residency.evict_all()
        self._parts.memory.sleep()
        self._is_asleep = True

    def wake(self) -> None:
        """Have the memory again, with the weights in it, at the same addresses, on every rank.

        Raises RuntimeError where a device has not that much any more, none is taken then and it may be tried again;
        RankDied.
        """
        if self._is_asleep:
            self._parts.memory.wake()
            self._is_asleep = False

    def prepare_grammars(self) -> None:
        """Load what structured output needs, which takes seconds for a large vocabulary; else its first use does."""
        self._grammars.prepare()

    def set_upcoming(self, adapters: Iterable[AdapterRef]) -> None:
        """Adapters that come after those of the requests in line, nearest first: the last to be evicted."""
        paths: dict[AdapterKey, Path] = {(ref.tenant, ref.revision): Path(ref.path) for ref in adapters}
        self._parts.residency.set_paths(paths)
        self._parts.scheduler.set_upcoming(list(paths))

    def forget(self, adapters: Iterable[AdapterRef]) -> None:
        """Drop these adapters from device and host memory, but for those of requests in flight."""
        gone = {(ref.tenant, ref.revision) for ref in adapters} - self._in_use()
        self._parts.scheduler.forget_upcoming(gone)  # or they would be read again
        for key in gone:
            self._parts.residency.remove(key)

    def stats(self) -> EngineStats:
        """Totals since the engine started, and what it holds now."""
        counters, parts = self._counters, self._parts
        residency = parts.residency.stats()
        return EngineStats(
            steps=counters.steps,
            step_s=counters.step_s,
            forward_s=self._pipeline.launch_s + self._pipeline.wait_s,
            host_s=counters.step_s - self._forward_wait_s,
            rows=counters.rows,
            adapters=counters.adapters,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=counters.preemptions,
            adapter_loads=residency.loads,
            adapter_evictions=residency.evictions,
            adapter_load_s=residency.load_s,
            num_running=parts.rows.num_used,
            num_waiting=parts.scheduler.num_waiting + self._grammars.num_waiting,
            pages_used=parts.pages.num_used,
            num_pages=parts.pages.num_pages,
            tiles_used=residency.tiles_used,
            num_tiles=residency.num_tiles,
            device_bytes=self.device_bytes,
            resident=residency.revisions,
            num_devices=self.config.tensor_parallel,
        )

    def in_rows(self) -> tuple[list[RequestId], list[RequestId]]:
        """The requests that hold rows now: those that decode, and those whose prompts are being computed."""
        is_decoding = self._parts.rows.is_decoding
        found: tuple[list[RequestId], list[RequestId]] = ([], [])
        for sequence in self._sequences.values():
            if sequence.row is not None:
                found[0 if is_decoding[sequence.row] else 1].append(sequence.request_id)
        return found

    def close(self) -> None:
        """Drop every request and all memory; the engine is of no use afterwards. May be called twice."""
        if self._open is not None:
            parts = self._open
            is_whole = parts.ranks is None or parts.ranks.followers.death is None
            if is_whole:  # else the steps in flight never end
                self.abort(list(self._sequences))
            self._grammars.close()
            parts.residency.close()
            if parts.ranks is not None:
                parts.ranks.close(parts.forward)
            self._open = None

    def check_integrity(self) -> None:
        """Every owner is whole and agrees with the requests in flight. For tests."""
        self._parts.scheduler.check_integrity()
        self._parts.residency.check_integrity()
        in_rows = sum(s.row is not None for s in self._sequences.values())
        assert in_rows == self._parts.rows.num_used, "a row has no request"
        num_waiting = self._parts.scheduler.num_waiting + self._grammars.num_waiting
        assert len(self._sequences) - in_rows == num_waiting, "a request is in no line"

    @property
    def _forward_wait_s(self) -> float:
        """Seconds in which the engine waited for the forward pass. One without depth computes while it launches."""
        pipeline = self._pipeline
        return pipeline.wait_s if pipeline.depth else pipeline.launch_s + pipeline.wait_s

    def _take_guided(self, outputs: list[RequestOutput]) -> None:
        """Requests whose grammar has been compiled go into the line."""
        ready, failed = self._grammars.take()
        for sequence in ready:
            self._parts.scheduler.add(sequence)
        for sequence, error in failed:
            del self._sequences[sequence.request_id]
            outputs.append(finished(sequence, None, error))

    def _remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is."""
        if self._grammars.holds(sequence):
            self._grammars.remove(sequence)
        else:
            self._parts.scheduler.remove(sequence)

    def _settle(self, outputs: list[RequestOutput]) -> None:
        """Read every step in flight."""
        while self._pipeline.num_in_flight:
            self._take(self._pipeline.collect(), outputs)

    def _take(self, drawn: Drawn, outputs: list[RequestOutput]) -> None:
        """End the rows that are done; report them, and the new tokens of those that are streamed."""
        pace = self._parts.pace
        if pace is not None:
            pace.observe(drawn.time.num_decode_rows, drawn.time.num_prompt_tokens, drawn.time.elapsed_s)
        self._counters.generated_tokens += len(drawn.rows)
        taken = harvest(drawn, self._parts.rows, self._parts.scheduler)
        for output in taken:
            if output.is_finished:
                del self._sequences[output.request_id]
        outputs += taken

    def _count(self, plan: StepPlan) -> None:
        counters = self._counters
        counters.steps += 1
        counters.rows += len(plan.decode_rows) + len(plan.chunks)
        counters.adapters += self._parts.scheduler.num_adapters_in(plan)
        counters.prompt_tokens += sum(chunk.num_tokens for chunk in plan.chunks)

    def _announce(self, sequences: Seq[Sequence]) -> None:
        if sequences:
            for sequence in sequences:
                sequence.is_announced = True
            if self.on_entering is not None:
                self.on_entering([sequence.request_id for sequence in sequences])

    def _in_use(self) -> set[AdapterKey | None]:
        return {sequence.adapter for sequence in self._sequences.values()}
