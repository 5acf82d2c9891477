"""The identity of an adapter revision: SHA-256 over both of its files, the same for client, store and worker.

Owns the order and framing of what is hashed, and knows nothing of where the files lie.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import BinaryIO

CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class RevisionHash:
    """Hashes a revision while its weights stream by: u64 length and bytes of the configuration, then of the weights.

    Lengths are little-endian and stand before the bytes, so that no other split of the same bytes hashes alike.
    """

    def __init__(self, config_bytes: bytes, weights_bytes: int) -> None:
        """weights_bytes: how many bytes of weights will follow through `update`."""
        self._left_bytes = weights_bytes
        head = len(config_bytes).to_bytes(8, "little") + config_bytes + weights_bytes.to_bytes(8, "little")
        self._hash = hashlib.sha256(head)

    def update(self, chunk: bytes) -> None:
        self._left_bytes -= len(chunk)
        self._hash.update(chunk)

    def hexdigest(self) -> str:
        """64 hexadecimal digits. Raises ValueError when the weights were longer or shorter than announced."""
        if self._left_bytes:
            raise ValueError(f"the weights differ by {abs(self._left_bytes)} bytes from the announced length")
        return self._hash.hexdigest()

    def matches(self, digest: str) -> bool:
        """Whether what was hashed is the revision `digest`, whole."""
        return self._left_bytes == 0 and self._hash.hexdigest() == digest


def revision_digest(config_bytes: bytes, weights: BinaryIO) -> str:
    """The digest of two files; `weights` is seekable and read from its start in chunks."""
    weights_bytes = weights.seek(0, os.SEEK_END)
    weights.seek(0)
    digest = RevisionHash(config_bytes, weights_bytes)
    while chunk := weights.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None
