"""What a decode step takes at the least: every operation at the bandwidth or the arithmetic rate of the device."""

from __future__ import annotations

from collections.abc import Sequence

from medley.spec.base_models import BaseModel, linear_sites

BANDWIDTH = 4.24e12  # bytes/s: a reduction of 4 GB on one H200 (measured)
FLOPS = 750e12  # FLOP/s: what large bf16 products reach on one H200
ITEMSIZE = 2  # bf16


def step_floor_s(
    model: BaseModel,
    batch: int,
    *,
    ctx: float,
    adapter_rows: Sequence[int] = (),
    rank: int = 0,
    bandwidth: float = BANDWIDTH,
    flops: float = FLOPS,
) -> float:
    """Seconds of one decode step of `batch` rows: the sum over its operations of max(bytes / bandwidth, FLOPs / flops).

    The operations are each linear layer, lm_head, each layer's attention, and each linear layer's LoRA update; their
    bytes are weights, each read once (of an adapter that several rows share, too), and the KV cache at a mean context
    of `ctx` tokens. Activations, norms, embedding and sampling count as nothing.

    adapter_rows: how many rows each adapter has, all of `rank` on all seven projections; other rows have none.
    """

    def op(num_bytes: float, num_flops: float) -> float:
        return max(num_bytes / bandwidth, num_flops / flops)

    layer_s = 0.0
    for site in linear_sites(model):
        weights = site.in_features * site.out_features
        layer_s += op(weights * ITEMSIZE, 2 * batch * weights)
        lora = (site.in_features + site.out_features) * rank
        layer_s += op(len(adapter_rows) * lora * ITEMSIZE, 2 * sum(adapter_rows) * lora)
    kv_numbers = batch * ctx * 2 * model.num_kv_heads * model.head_dim
    # q k^T and p v: two products of 2 FLOPs for each query head, position and channel.
    layer_s += op(kv_numbers * ITEMSIZE, batch * ctx * 4 * model.num_heads * model.head_dim)
    head = model.hidden_size * model.vocab_size
    return model.num_layers * layer_s + op(head * ITEMSIZE, 2 * batch * head)
