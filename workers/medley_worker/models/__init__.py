"""Decoder architectures: weights in, logits out. Nothing about requests, schedules or adapters' files."""

from medley_worker.models.batch import ForwardBatch, build_batch
from medley_worker.models.decoder import Decoder
from medley_worker.models.kv import KVCache
from medley_worker.models.loading import load_model

__all__ = ["Decoder", "ForwardBatch", "KVCache", "build_batch", "load_model"]
