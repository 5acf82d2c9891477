"""Real shells under test: a tiny model with a tokenizer, shell processes, and a stand-in for the dispatcher.

The stand-in claims by the dispatcher's own statements, at the word of the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psutil
from ledger import claim_lanes, reserve
from safetensors.numpy import save_file
from sqlalchemy import Row, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from medley.celery_app import make_celery, worker_queue
from medley.db import adapters, batches, leaders, tenants, workers
from medley.db.connections import make_engine, tenant_transaction, transaction
from medley.db.new_jobs import NewJob, append_jobs
from medley.db.workers import WorkerState
from medley.spec.ids import uuid7
from medley.store import Store

POOL = "default"
BOS, EOS = 256, 257
VOCAB = 258
HIDDEN = 32
WAIT_S = 180.0  # several engines one after another, each of which imports torch, on a busy machine


def make_model(folder: Path) -> Path:
    """A Llama of two layers without weight files (load_format "random"), and a byte-level tokenizer."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def put_adapter(store: Store, folder: Path, *, rank: int, seed: int) -> str:
    """A random adapter of the queries, large enough to change every answer. Returns its digest."""
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{path}.lora_A.weight"] = random.standard_normal((rank, HIDDEN)).astype(np.float32)
        weights[f"{path}.lora_B.weight"] = random.standard_normal((HIDDEN, rank)).astype(np.float32)
    file = folder / f"adapter{seed}.safetensors"
    save_file(weights, file)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    return store.put(json.dumps(config).encode(), file)


@dataclass
class ShellProcess:
    """One `python -m medley_worker.shell`."""

    process: subprocess.Popen[bytes]
    worker: UUID
    log_path: Path

    def engine_pid(self) -> int:
        """The process id of its engine."""
        children = psutil.Process(self.process.pid).children()
        (pid,) = (c.pid for c in children if "medley_worker.engine.process" in c.cmdline())
        return pid

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def log(self) -> str:
        return self.log_path.read_text()


class Site:
    """A database, a Redis, a store, one tenant, and the shells that a test starts on them."""

    def __init__(self, database: Any, redis_url: str, store_url: str, model: Path, folder: Path) -> None:
        self._database = database
        self._redis_url = redis_url
        self._store_url = store_url
        self._model = model
        self._folder = folder
        self._work = make_engine(database.url("medley_work"), name="test", pool_size=2)
        self._api = make_engine(database.url("medley_api"), name="test", pool_size=2)
        self._celery = make_celery(redis_url, consumes=True)  # which waits longer for a Redis that is held up
        self._shells: list[ShellProcess] = []
        owner = make_engine(database.url("medley_owner"), name="test", pool_size=1)
        with transaction(owner) as conn:
            tenants.add_tenant(conn, "acme")
            self.tenant: UUID = conn.execute(text("SELECT id FROM tenants")).scalar_one()
        owner.dispose()
        self.store = Store.open(store_url)
        self._leader = uuid7()

    def close(self) -> None:
        for shell in self._shells:
            if shell.process.poll() is None:
                shell.send(signal.SIGCONT)
                shell.process.kill()
                shell.process.wait()
        self._work.dispose()
        self._api.dispose()
        self._celery.close()

    def reconnect(self) -> None:
        """Forget connections to a server that has gone."""
        self._work.dispose()
        self._api.dispose()

    # Shells

    def start_shell(self, *, active: bool = True, **environ: str) -> ShellProcess:
        """A registered shell; with `active` its engine is loaded."""
        log_path = self._folder / f"shell{len(self._shells)}.log"
        env = dict(os.environ) | {
            "MEDLEY_DATABASE_URL": self._database.url("medley_work"),
            "MEDLEY_REDIS_URL": self._redis_url,
            "MEDLEY_STORE_URL": self._store_url,
            "MEDLEY_MODEL": str(self._model),
            "MEDLEY_LOAD_FORMAT": "random",
            "MEDLEY_MAX_NUM_SEQS": "8",
            "MEDLEY_LEASE_S": "10",  # a machine that is busy holds a shell up for seconds
            "OMP_NUM_THREADS": "1",
        }
        before = {row.id for row in self.workers()}
        with log_path.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "medley_worker.shell"], env=env | environ, stdout=out, stderr=out
            )
        shell = ShellProcess(process, UUID(int=0), log_path)
        self._shells.append(shell)
        self.wait_until("a registered shell", lambda: bool({row.id for row in self.workers()} - before))
        (shell.worker,) = {row.id for row in self.workers()} - before
        if active:
            self.desire(shell, WorkerState.ACTIVE)
            self.wait_state(shell, "active")
        return shell

    def workers(self) -> Sequence[Row[Any]]:
        with transaction(self._work) as conn:
            return conn.execute(text("SELECT * FROM workers")).all()

    def desire(self, shell: ShellProcess, state: WorkerState) -> None:
        """What the dispatcher does: the row says it, an empty message rings."""
        with transaction(self._work) as conn:
            workers.desire(conn, shell.worker, state)
        self.ring(shell, [])

    def wait_state(self, shell: ShellProcess, state: str) -> None:
        self.wait_until(
            f"worker {state}", lambda: any(row.id == shell.worker and row.state == state for row in self.workers())
        )

    def wait_until(self, what: str, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> float:
        """Polls until `holds`; returns the seconds it took."""
        started = time.monotonic()
        while not holds():
            assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s} s\n{self.logs()}"
            time.sleep(0.02)
        return time.monotonic() - started

    def logs(self) -> str:
        return "\n".join(f"--- {shell.log_path.name}\n{shell.log()[-4000:]}" for shell in self._shells)

    # Jobs

    def add_revision(self, name: str, *, seed: int, digest: str | None = None) -> UUID:
        """An adapter of the tenant; its files are in the store unless a digest is given."""
        digest = digest or put_adapter(self.store, self._folder, rank=4, seed=seed)
        new = adapters.NewRevision(digest=digest, max_rank=4, num_tiles=1, size_bytes=1)
        with tenant_transaction(self._api, self.tenant) as conn:
            revision, _ = adapters.add_revision(conn, self.tenant, name, new)
        return revision

    def digest_of(self, revision: UUID) -> str:
        with transaction(self._work) as conn:
            statement = text("SELECT digest FROM adapter_revisions WHERE id = :id")
            digest: str = conn.execute(statement, {"id": revision}).scalar_one()
        return digest

    def forget_revision(self, revision: UUID) -> None:
        """What the deletion of its tenant leaves of it."""
        with transaction(self._work) as conn:
            conn.execute(text("DELETE FROM adapter_revisions WHERE id = :id"), {"id": revision})

    def submit(self, *jobs: dict[str, Any], deadline_in_s: float | None = None) -> UUID:
        """One batch; a job is {prompt | prompt_token_ids, continuation?, revision?, ...sampling}. Greedy, past ends."""
        with tenant_transaction(self._api, self.tenant) as conn:
            deadline_at = None
            if deadline_in_s is not None:
                statement = text("SELECT clock_timestamp() + make_interval(secs => :s)")
                deadline_at = conn.execute(statement, {"s": deadline_in_s}).scalar_one()
            batch = batches.NewBatch(uuid7(), self.tenant, POOL, deadline_at=deadline_at)
            batches.open_batch(conn, batch, total=len(jobs))
            append_jobs(conn, batch, [_new_job(dict(job)) for job in jobs])
            reserve(conn, batch, len(jobs))
        return batch.id

    def claim(self, shell: ShellProcess, limit: int = 1_000) -> list[UUID]:
        """Assign what waits to the shell, without a word to it."""
        with transaction(self._work) as conn:
            term = leaders.lead(conn, POOL, self._leader, term_s=60)
            assert term is not None
            leaders.hold_term(conn, POOL, self._leader, term)
            lanes = conn.execute(text("SELECT DISTINCT lane FROM jobs WHERE state = 'queued'")).scalars().all()
            return [c.job for c in claim_lanes(conn, POOL, shell.worker, [(lane, limit) for lane in lanes])]

    def ring(self, shell: ShellProcess, jobs: Sequence[UUID]) -> None:
        """What the dispatcher sends after a claim."""
        self._celery.send_task("medley.run_jobs", args=[[job.hex for job in jobs]], queue=worker_queue(shell.worker))

    def announce(self, shell: ShellProcess, revisions: Sequence[UUID]) -> None:
        """What the dispatcher sends of adapters to come."""
        ids = [revision.hex for revision in revisions]
        self._celery.send_task("medley.expect", args=[ids], queue=worker_queue(shell.worker))

    def reclaim(self) -> int:
        """What the leader does about lapsed leases."""
        with transaction(self._work) as conn:
            workers.mark_gone(conn, POOL)
            return workers.reclaim(conn, POOL)

    def lapse(self, shell: ShellProcess) -> None:
        """The shell's lease ends now, not when its time is over."""
        statement = text("UPDATE workers SET lease_until = clock_timestamp() - interval '1 ms' WHERE id = :id")
        with transaction(self._work) as conn:
            conn.execute(statement, {"id": shell.worker})

    def results(self, batch: UUID) -> list[Row[Any]]:
        """The results of the batch in the order of its jobs."""
        statement = (
            "SELECT r.*, r.job_id AS id, i.custom_id, i.seed FROM job_results r"
            " JOIN job_inputs i ON i.job_id = r.job_id WHERE r.batch_id = :b ORDER BY r.job_id"
        )
        with transaction(self._work) as conn:
            return list(conn.execute(text(statement), {"b": batch}))

    def jobs(self, batch: UUID) -> list[Row[Any]]:
        with transaction(self._work) as conn:
            return list(conn.execute(text("SELECT * FROM jobs WHERE batch_id = :b ORDER BY id"), {"b": batch}))

    def checkpoints(self) -> dict[UUID, list[int]]:
        with transaction(self._work) as conn:
            return {row.job_id: row.token_ids for row in conn.execute(text("SELECT * FROM checkpoints"))}

    def wait_results(self, batch: UUID, count: int, timeout_s: float = WAIT_S) -> list[Row[Any]]:
        self.wait_until(f"{count} results", lambda: len(self.results(batch)) >= count, timeout_s)
        return self.results(batch)

    def run(self, shell: ShellProcess, *jobs: dict[str, Any]) -> list[Row[Any]]:
        """Submit, claim, ring, and wait for every result."""
        batch = self.submit(*jobs)
        self.ring(shell, self.claim(shell))
        return self.wait_results(batch, len(jobs))

    def execute(self, change: Callable[..., object], *arguments: object) -> object:
        """One of `medley.db`'s changes in a transaction of the tenant's."""
        with tenant_transaction(self._api, self.tenant) as conn:
            return change(conn, *arguments)

    def generated(self, shell: ShellProcess) -> int:
        """Tokens that the worker says it has generated, up to a renewal ago."""
        (stats,) = [row.stats for row in self.workers() if row.id == shell.worker]
        return int(stats.get("generated_tokens", 0))

    def wait_computing(self, shell: ShellProcess, cpu_s: float = 0.1) -> None:
        """Until the engine has computed this long, which is some dozens of steps."""
        engine = psutil.Process(shell.engine_pid())
        until_s = engine.cpu_times().user + cpu_s
        self.wait_until("a computing engine", lambda: engine.cpu_times().user >= until_s)

    def wait_idle(self, shell: ShellProcess) -> None:
        """Until the engine has computed nothing for half a second."""
        engine = psutil.Process(shell.engine_pid())

        def is_idle() -> bool:
            before_s = engine.cpu_times().user
            time.sleep(0.5)
            return engine.cpu_times().user == before_s

        self.wait_until("an idle engine", is_idle)


def _new_job(job: dict[str, Any]) -> NewJob:
    prompt, token_ids, revision = job.pop("prompt", None), job.pop("prompt_token_ids", None), job.pop("revision", None)
    seed = job.pop("seed", 1)
    continuation, continuation_ids = job.pop("continuation", None), job.pop("continuation_token_ids", None)
    sampling = {"max_tokens": 8, "ignore_eos": True} | job
    return NewJob(
        prompt=prompt,
        prompt_token_ids=token_ids,
        revision=revision,
        adapter=None,
        sampling=json.dumps(sampling),
        max_tokens=sampling["max_tokens"],
        seed=seed,
        continuation=continuation,
        continuation_token_ids=continuation_ids,
    )
