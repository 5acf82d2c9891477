"""FlashInfer's paged attention: its wrappers, the workspaces they share, and their plans.

A plan is made on the host and copied to the device from pinned memory, in stream order; so one device workspace
serves every row bucket, and two pinned ones (`PlanMemory`) let a step be planned while the one before it waits.
It knows tensors of page numbers, no requests and no layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, fast_decode_plan
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley_worker.ops.memory import Memory, PlainMemory
from medley_worker.ops.paged import Kernel, check_supported, takes_tensor_cores, window_left, workspace_bytes

INT_WORKSPACE_BYTES = 8 << 20  # FlashInfer's own size
# One module for chunks and, with tensor cores, for decode rows; FlashInfer's FA3 plans for each head and step.
PREFILL_BACKEND = "fa2"


class PlanMemory:
    """Pinned memory from which one step's plans are copied; not to be written again before that step has run."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.decode = {window: _pinned() for window in windows}
        self.prefill = {window: _pinned() for window in windows}


class PagedAttention:
    """The planned kernels of one model, by row bucket and window.

    | memory | whose |
    | kv_indptr, kv_indices, last_page_len on the device | the caller's; decode kernels read them where they lie |
    | workspaces | this object's; the large one lies in `memory`, plans in torch's own, which stays during a sleep |
    | pinned plans | the step's, see PlanMemory |

    kv_indptr: [R+1], last_page_len: [R], kv_indices: [K], int32, R at least the largest bucket.
    Raises ValueError, naming the field, for a model that FlashInfer has no kernel for.
    """

    def __init__(
        self,
        config: BaseModel,
        dtype: torch.dtype,
        *,
        page_size: int,
        buckets: Sequence[int],
        kv_indptr: Tensor,
        kv_indices: Tensor,
        last_page_len: Tensor,
        is_invariant: bool = False,
        memory: Memory | None = None,
    ) -> None:
        check_supported(config, dtype)
        self._config, self._dtype, self._page_size = config, dtype, page_size
        self._is_invariant = is_invariant
        # Only the tensor core kernel can be told not to split a row's keys.
        self._has_tensor_cores = is_invariant or takes_tensor_cores(config)
        self._kv_indptr, self._kv_indices, self._last_page_len = kv_indptr, kv_indices, last_page_len
        self._device = kv_indices.device
        num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        num_bytes = workspace_bytes(config, max(buckets), num_sms)
        self._workspace = (memory or PlainMemory(self._device)).cleared((num_bytes,), torch.uint8)
        self.windows = tuple(dict.fromkeys(config.layer_windows))
        pinned = PlanMemory(self.windows)
        self._decode: dict[int, dict[int | None, Any]] = {bucket: {} for bucket in buckets}
        self._prefill: dict[int | None, Any] = {}
        for window in self.windows:
            workspace = torch.zeros(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
            for bucket in buckets:
                self._decode[bucket][window] = self._new_decode(bucket, window, workspace, pinned.decode[window])
            self._prefill[window] = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=PREFILL_BACKEND)
        torch.cuda.synchronize(self._device)  # `pinned` goes

    def _new_decode(self, bucket: int, window: int | None, workspace: Tensor, pinned: Tensor) -> Any:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._has_tensor_cores,
            paged_kv_indptr_buffer=self._kv_indptr[: bucket + 1],
            paged_kv_indices_buffer=self._kv_indices,
            paged_kv_last_page_len_buffer=self._last_page_len[:bucket],
        )
        wrapper._int_workspace_buffer = workspace
        wrapper._pin_memory_int_workspace_buffer = pinned
        # Builds and loads the kernels; `fast_decode_plan` only plans.
        wrapper.plan(
            torch.arange(bucket + 1, dtype=torch.int32),
            torch.zeros(bucket, dtype=torch.int32),
            torch.ones(bucket, dtype=torch.int32),
            *self._shape(),
            window_left=window_left(window),
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            disable_split_kv=self._is_invariant,
        )
        return wrapper

    def _shape(self) -> tuple[int, int, int, int]:
        config = self._config
        return config.num_heads, config.num_kv_heads, config.head_dim, self._page_size

    def decode_kernels(self, bucket: int) -> Mapping[int | None, Kernel]:
        """By window, for `bucket` decode rows; planned by `plan_decode`."""
        return self._decode[bucket]

    def prefill_kernels(self) -> Mapping[int | None, Kernel]:
        """By window; planned by `plan_prefill`."""
        return self._prefill

    def plan_decode(self, bucket: int, kv_indptr: Tensor, last_page_len: Tensor, memory: PlanMemory) -> None:
        """Plan `bucket` decode rows. kv_indptr: [bucket+1], last_page_len: [bucket], int32 on the host.

        The device's kv_indptr, kv_indices and last_page_len hold the same step when the kernels run.
        """
        for window, wrapper in self._decode[bucket].items():
            wrapper._pin_memory_int_workspace_buffer = memory.decode[window]
            # `plan` would copy its arguments to the device again, page numbers with a wait.
            fast_decode_plan(
                wrapper,
                kv_indptr,
                self._kv_indices,
                last_page_len,
                *self._shape(),
                window_left=window_left(window),
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
                disable_split_kv=self._is_invariant,
                global_override_indptr_cpu=kv_indptr,
            )

    def plan_prefill(
        self, qo_indptr: Tensor, kv_indptr: Tensor, last_page_len: Tensor, kv_len: Tensor, memory: PlanMemory
    ) -> None:
        """Plan C chunks. qo_indptr, kv_indptr: [C+1], last_page_len, kv_len: [C], int32 in pinned memory.

        qo_indptr starts at 0, kv_indptr where the chunks' pages start. Like `memory`, they are read by copies
        that may still be under way when this returns.
        """
        for window, wrapper in self._prefill.items():
            wrapper._pin_memory_int_workspace_buffer = memory.prefill[window]
            wrapper.plan(
                qo_indptr,
                kv_indptr,
                self._kv_indices,
                last_page_len,
                *self._shape(),
                causal=True,
                window_left=window_left(window),
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
                seq_lens=kv_len,
                disable_split_kv=self._is_invariant,
            )


def _pinned() -> Tensor:
    """Zeros: without split keys FlashInfer's kernel reads entries that no plan wrote, and they must be valid rows."""
    return torch.zeros(INT_WORKSPACE_BYTES, dtype=torch.uint8).pin_memory()
