"""Adapters that PEFT saves are accepted with PEFT's own ranks and scales; its other kinds are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_configs import CONFIGS, TINY

from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME, AdapterRefused, read_adapter
from medley.spec.base_models import BaseModel, read_base_model
from medley.spec.intake import check_upload

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.set_num_threads(1)


def save_with_peft(folder: Path, model_type: str = "llama", **options: Any) -> BaseModel:
    """A fresh model with an adapter that PEFT makes and saves; returns the base as Medley reads it."""
    config = CONFIGS[model_type](**TINY)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_config(config), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    model.save_pretrained(folder)
    config.save_pretrained(folder / "base")
    return read_base_model(folder / "base", need_weights=False)


def scales_in_peft(folder: Path, model_type: str) -> dict[tuple[int, str], tuple[int, float]]:
    """(layer, site) -> (rank, scale) after PEFT has loaded what it saved."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[model_type](**TINY))
    model = PeftModel.from_pretrained(model, folder)
    found: dict[tuple[int, str], tuple[int, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1])
            found[layer, parts[-1]] = (module.r["default"], module.scaling["default"])
    return found


PATTERNS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "target_modules": SEVEN,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3, "^model.layers.0.self_attn.k_proj": 128},
    "alpha_pattern": {"mlp.down_proj": 5, "model.layers.0.self_attn.q_proj": 0.5},
}
SAVED: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 128, "lora_alpha": 1, "target_modules": SEVEN},
    {"r": 1, "target_modules": ["down_proj"], "lora_dropout": 0.1},
    {"r": 6, "lora_alpha": 7, "use_rslora": True, "target_modules": SEVEN},
    {"r": 4, "target_modules": "all-linear", "init_lora_weights": False},
    {"r": 4, "target_modules": ["self_attn.o_proj", "model.layers.1.mlp.up_proj"], "init_lora_weights": "gaussian"},
    {"r": 4, "target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "layers"},
    {"r": 4, "target_modules": ["model.layers.0.mlp.up_proj", "k_proj"], "layers_to_transform": 1},
    # Two keys fit one name: the first of them in the file counts, and PEFT sorts the file.
    {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 8}},
    {"r": 4, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 8, "layers.1.self_attn.q_proj": 2}},
    {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
]


# Each kind on one family in turn, and the one with all patterns on every family.
@pytest.mark.parametrize(
    ("model_type", "options"),
    [*zip(list(CONFIGS) * len(SAVED), SAVED, strict=False), *((model_type, PATTERNS) for model_type in CONFIGS)],
)
def test_what_peft_saves_is_accepted_at_the_ranks_and_scales_of_peft(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    base = save_with_peft(tmp_path, model_type, **options)
    adapter = read_adapter(tmp_path, base)
    ours = {(target.layer, target.site): (target.rank, target.scale) for target in adapter.targets}
    theirs = scales_in_peft(tmp_path, model_type)
    assert ours == theirs
    assert adapter.max_rank == max(rank for rank, _ in theirs.values())
    assert adapter.dtype == "F32"
    assert adapter.size_bytes == (tmp_path / WEIGHTS_NAME).stat().st_size
    with (tmp_path / WEIGHTS_NAME).open("rb") as weights:
        assert check_upload((tmp_path / CONFIG_NAME).read_bytes(), weights, base) == (adapter, [])


def test_targets_come_by_layer_and_then_in_the_order_of_the_forward_pass(tmp_path: Path) -> None:
    base = save_with_peft(tmp_path, target_modules=SEVEN[::-1])
    targets = read_adapter(tmp_path, base).targets
    assert [(target.layer, target.site) for target in targets] == [(i, site) for i in range(2) for site in SEVEN]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_as_peft_saves_it_is_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    config = CONFIGS["llama"](**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config)
    get_peft_model(model, LoraConfig(r=2, target_modules=SEVEN)).to(dtype).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "base")
    adapter = read_adapter(tmp_path, read_base_model(tmp_path / "base", need_weights=False))
    assert adapter.dtype == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of some of these itself
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "adapter_config.use_dora"),
        ({"bias": "all"}, "adapter_config.bias"),
        ({"lora_bias": True}, "adapter_config.lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.modules_to_save"),
        ({"init_lora_weights": "pissa"}, "adapter_config.init_lora_weights"),
        ({"init_lora_weights": "olora"}, "adapter_config.init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "adapter_config.trainable_token_indices"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "adapter_config.layer_replication"),
        ({"exclude_modules": ["k_proj"]}, "adapter_config.exclude_modules"),
        ({"target_modules": r".*\.q_proj"}, "adapter_config.target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens'"),
        ({"r": 129}, "a rank from 1 to 128"),
        ({"rank_pattern": {"q_proj": 200}}, "adapter_config.rank_pattern.q_proj"),
        ({"rank_pattern": {r".*\d.self_attn.q_proj": 2}}, "no regular expressions"),
        ({"alpha_pattern": {"(q|k)_proj": 2}}, "no regular expressions"),
    ],
)
def test_other_kinds_that_peft_saves_are_refused_by_name(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    base = save_with_peft(tmp_path, **{"r": 4, "target_modules": SEVEN} | options)
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(tmp_path, base)
    assert says in str(caught.value)
