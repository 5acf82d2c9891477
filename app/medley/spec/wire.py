"""Messages between a worker's shell and its engine process.

Frames are a 4-byte little-endian length and a msgspec MessagePack body; each body is one message of the two
tagged unions below. A job is known by `key`, which holds its id and attempt, so that a late message about an
earlier attempt can never be taken for the present one.

The engine writes `Running` before it computes the first step that holds the jobs named there. If the process
dies, the jobs that were named and have not been reported `Finished` or `Released` are the suspects.
"""

from __future__ import annotations

import struct
from uuid import UUID

import msgspec

from medley.spec.errors import JobError
from medley.spec.jobs import Checkpoint, Details, FinishReason
from medley.spec.sampling import SamplingParams

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")


class JobKey(msgspec.Struct, frozen=True, array_like=True, gc=False):
    job: UUID
    attempt: int


class AdapterRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An adapter revision: whose it is, which, and the folder on this host that holds its two files."""

    tenant: UUID
    revision: UUID
    path: str


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is built. None lets the engine size the value from the device. Sizes in bytes.

    adapter_host_bytes: host memory for adapters that are read and not on the device, or may leave it.
    max_tpot_ms: what the time per output token is held to, None: the most tokens a second.
    batch_invariant: tokens and log-probabilities depend on no neighbour, bit by bit; slower on CUDA. A CPU in float32
    gives that always.
    tensor_parallel: devices of this host that share the model, from `device` on; sizes in bytes are those of each.
    sleeps: Sleep will be asked for, so what is large lies in memory that can be given back.
    gpu_share: of the device's memory, all that this engine takes of it; None: what is free. A CPU has no such limit.
    """

    model_dir: str
    device: str = "cpu"
    dtype: str = "float32"
    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    adapter_bytes: int | None = None
    adapter_slots: int | None = None
    load_format: str = "safetensors"  # or "random"
    forward: str = "model"  # or "null": tokens without a forward pass, for measuring all that is around it
    seed: int = 0
    adapter_host_bytes: int | None = None
    max_tpot_ms: float | None = None
    batch_invariant: bool = False
    tensor_parallel: int = 1
    sleeps: bool = False
    gpu_share: float | None = None


# Shell to engine ---------------------------------------------------------------------------------------------


class WorkItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One job for the engine. `want_progress`: send `Progress` each step (jobs with stop strings).

    num_continuation: the last so many of prompt_token_ids are a continuation to be scored, and nothing is generated.
    """

    key: JobKey
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterRef | None
    sampling: SamplingParams
    checkpoint: Checkpoint | None = None
    want_progress: bool = False
    priority: int = 0
    num_continuation: int = 0


class Add(msgspec.Struct, frozen=True, tag=True):
    items: tuple[WorkItem, ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget these jobs; nothing more is reported for them."""

    keys: tuple[JobKey, ...]


class Release(msgspec.Struct, frozen=True, tag=True):
    """Give these jobs back with what they have generated (None: all); each is answered by `Released`.

    Or by `Finished`, if it ends with the step that runs.
    """

    keys: tuple[JobKey, ...] | None = None


class Upcoming(msgspec.Struct, frozen=True, tag=True):
    """The adapters that come next, nearest first, so that loads overlap steps and eviction is by next use."""

    adapters: tuple[AdapterRef, ...]


class Forget(msgspec.Struct, frozen=True, tag=True):
    """These adapters are no more: nothing of them is to stay in the engine's memory. One that a job uses stays."""

    adapters: tuple[AdapterRef, ...]


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Give the devices' memory back, weights apart from their host copy; answered by `Asleep`.

    The engine holds no jobs, and gets none before it is woken. One that cannot sleep ends.
    """


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Be as before the sleep, without adapters on the device; answered by `Awake`. One that cannot wake ends."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToEngine = Add | Abort | Release | Upcoming | Forget | Sleep | Wake | Shutdown


# Engine to shell ---------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded. What it has room for, in rows, tokens, KV pages and adapter tiles.

    can_sleep: `Sleep` may be asked for; not so where the device has no virtual memory.
    """

    max_num_seqs: int
    max_model_len: int
    num_pages: int
    page_size: int
    num_tiles: int
    vocab_size: int
    load_s: float
    can_sleep: bool = False


class Running(msgspec.Struct, frozen=True, tag=True):
    """These jobs enter the step that runs next."""

    keys: tuple[JobKey, ...]


class Progress(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    """New tokens of a job that asked for progress. details: of these tokens; the prompt's come with the first."""

    key: JobKey
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    details: Details | None = None


class Finished(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    """A job's end: its generated tokens (a scoring job's continuation) with their log-probabilities, or an error."""

    key: JobKey
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    error: JobError | None = None
    details: Details | None = None


class Released(msgspec.Struct, frozen=True, tag=True):
    key: JobKey
    checkpoint: Checkpoint


class Asleep(msgspec.Struct, frozen=True, tag=True):
    """device_bytes: of the devices' memory, still held by the engine's processes."""

    device_bytes: int
    sleep_s: float


class Awake(msgspec.Struct, frozen=True, tag=True):
    wake_s: float


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Totals since the engine started, and what it holds now. Sent each second and at the end."""

    steps: int = 0
    step_s: float = 0.0  # seconds inside step()
    forward_s: float = 0.0  # of which launching the model and waiting for it
    host_s: float = 0.0  # of which not waiting for the model
    rows: int = 0  # sum over steps of the sequences in the step
    adapters: int = 0  # sum over steps of the distinct adapters in the step
    prompt_tokens: int = 0  # computed, recompute included
    generated_tokens: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_load_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    pages_used: int = 0
    num_pages: int = 0
    tiles_used: int = 0
    num_tiles: int = 0
    device_bytes: int = 0  # of its devices' memory, held by its processes; 0 on a CPU
    resident: tuple[UUID, ...] = ()  # adapter revisions in device memory
    num_devices: int = 1  # that share the model
    device_total_bytes: int = 0  # of its devices' memory, 0 on a CPU


class Batch(msgspec.Struct, frozen=True, tag=True):
    """The jobs that hold rows now: those that decode, and those whose prompts are being computed. Sent each second."""

    decoding: tuple[JobKey, ...] = ()
    prefilling: tuple[JobKey, ...] = ()


FromEngine = Ready | Running | Progress | Finished | Released | Asleep | Awake | EngineStats | Batch

to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One frame: length and body. Raises ValueError for a body over MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes exceeds {MAX_FRAME_BYTES}; send fewer items")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into message bodies; feed it whatever arrived."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Every body that is complete now. Raises ValueError for an announced length over MAX_FRAME_BYTES."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame announces {length} bytes, the limit is {MAX_FRAME_BYTES}")
            if len(self._buffer) - start - 4 < length:
                break
            bodies.append(bytes(self._buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        del self._buffer[:start]
        return bodies
