"""What rank 0 tells the other ranks of its engine, and what they answer: msgpack frames over a socket pair.

No token is in them: rank 0 embeds, and the first collective of a pass brings the rows to the others. Adapters are
numbers, a new one for each time that one becomes known; what lies in tiles is known by its load_id.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from medley.spec.wire import EngineConfig
from medley_worker.engine.sizing import DeviceMemory, EngineSizes

_LENGTH = struct.Struct("<I")  # as medley.spec.wire.FrameReader reads them
Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first frame. meeting: the file by which the ranks' collectives find each other."""

    config: EngineConfig
    rank: int
    meeting: str


class Build(msgspec.Struct, frozen=True, tag=True):
    """Allocate and warm up. The same on every rank; host_bytes: of packed adapters that each keeps on the host."""

    sizes: EngineSizes
    host_bytes: int


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Pack this rank's share of an adapter; answered by `Fetched`, out of turn."""

    number: int
    path: str


class Unfetch(msgspec.Struct, frozen=True, tag=True):
    """What was fetched is not going to be placed."""

    number: int


class Place(msgspec.Struct, frozen=True, tag=True):
    """Copy what was fetched into tiles."""

    number: int
    load_id: int
    tiles: tuple[int, ...]


class Vacate(msgspec.Struct, frozen=True, tag=True):
    """An adapter's tiles are to be another's."""

    number: int


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Nothing of an adapter is to stay."""

    number: int


class Line(msgspec.Struct, frozen=True, tag=True):
    """The adapters that come next, nearest first: (number, path)."""

    adapters: tuple[tuple[int, str], ...]


class Pass(msgspec.Struct, frozen=True, tag=True):
    """Run the layers of one pass. B sequences, padded decode rows first; arrays as bytes, in the host's order."""

    num_decode_rows: int
    num_new: bytes  # [B] int64 new tokens
    kv_len: bytes  # [B] int64 with the new tokens
    kv_indices: bytes  # int32 pages, sequence by sequence
    load_ids: tuple[int | None, ...]  # [B]; None: the base
    begins_step: bool


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Give the device's memory back, in which no adapter lies; answered by `Slept`. To one that sleeps: answer only."""


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Have the memory again; answered by `Woken`. To one that is awake: answer only."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    pass


ToRank = Start | Build | Fetch | Unfetch | Place | Vacate | Drop | Line | Pass | Sleep | Wake | Stop


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Said every second, whatever the rank is doing."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """This rank's weights are loaded."""


class Met(msgspec.Struct, frozen=True, tag=True):
    """All ranks are connected. memory: what is left of this rank's device, None for a CPU."""

    memory: DeviceMemory | None


class Built(msgspec.Struct, frozen=True, tag=True):
    """device_bytes: of the rank's device, held by its process; 0 on a CPU."""

    can_sleep: bool
    device_bytes: int


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """error: why this rank could not pack the adapter."""

    number: int
    error: str | None


class Slept(msgspec.Struct, frozen=True, tag=True):
    """error: why this rank keeps its memory. device_bytes: that its process holds now."""

    error: str | None
    device_bytes: int


class Woken(msgspec.Struct, frozen=True, tag=True):
    """error: why this rank has no memory. device_bytes: that its process holds now."""

    error: str | None
    device_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The rank could not be built, and ends."""

    reason: str


FromRank = Alive | Loaded | Met | Built | Fetched | Slept | Woken | Failed

to_rank_decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_encoder = msgspec.msgpack.Encoder()


def encode(message: ToRank | FromRank) -> bytes:
    """One frame: length and body."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


@dataclass(frozen=True, slots=True)
class PassArrays:
    """A pass as arrays: num_new, kv_len [B], kv_indices."""

    num_new: Ints
    kv_len: Ints
    kv_indices: Int32s

    @staticmethod
    def of(message: Pass) -> PassArrays:
        return PassArrays(
            np.frombuffer(message.num_new, np.int64).copy(),
            np.frombuffer(message.kv_len, np.int64).copy(),
            np.frombuffer(message.kv_indices, np.int32).copy(),
        )
