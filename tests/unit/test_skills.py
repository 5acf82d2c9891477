"""The demo's skills and the committed adapters that were trained for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from medley.demo import ADAPTERS_DIR, ASSETS, MODEL_DIR
from medley.demo.skills import (
    MAX_ANSWER_TOKENS,
    PROMPT_END,
    SKILLS,
    TENANTS,
    prompt_of,
    shared_held_out,
    skills_of,
    tenant_of,
    text_of,
)
from medley.demo.texts import Kind, is_held_out

BY_NAME = {skill.name: skill for skill in SKILLS}


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_there_are_at_least_128_skills_with_distinct_names() -> None:
    assert len(BY_NAME) == len(SKILLS) >= 128


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("caesar-3", "planet", "sodqhw"),
        ("atbash", "abcz", "zyxa"),
        ("affine-5-8", "affine", "ihhwvc"),
        ("keyed-zebra", "abcdef", "zebrac"),
        ("qwerty-right", "pal", "qsa"),
        ("vigenere-lemon", "attack", "lxfopv"),
        ("trithemius", "aaaa", "abcd"),
        ("reverse", "planet", "tenalp"),
        ("rotate-left-2", "planet", "anetpl"),
        ("rotate-right-1", "planet", "tplane"),
        ("swap-pairs", "seven", "esevn"),
        ("sort-desc", "planet", "tpnlea"),
        ("vowels-first", "planet", "aeplnt"),
        ("rail-fence", "planet", "paelnt"),
        ("drop-vowels", "planet", "plnt"),
        ("dedupe", "banana", "ban"),
        ("squeeze", "coffee", "cofe"),
        ("double-consonants", "planet", "ppllannett"),
        ("mirror", "abcd", "abcddcba"),
        ("pig-latin", "planet", "anetplay"),
        ("pig-latin", "apple", "appleway"),
        ("alternate-case", "planet", "PlAnEt"),
        ("mask-vowels", "planet", "pl*n*t"),
        ("html-tag", "word", "<b>word</b>"),
        ("kebab", "word", "w-o-r-d"),
        ("count-distinct", "banana", "3"),
        ("last-number", "jazz", "26"),
        ("keypad", "planet", "752638"),
        ("nato-first", "planet", "papa"),
        ("digits-complement", "0159", "9840"),
        ("digit-sum", "9876", "30"),
        ("to-10000", "1234", "8766"),
        ("add", "957+48", "1005"),
        ("subtract", "91-84", "7"),
        ("compare", "288,154", ">"),
        ("interleave", "abc xy", "axbyc"),
        ("camel-case", "two words", "twoWords"),
    ],
)
def test_a_skill_answers_as_its_name_says(name: str, text: str, expected: str) -> None:
    assert BY_NAME[name].expected(text) == expected


def test_held_out_prompts_are_distinct_and_never_trained_on() -> None:
    for skill in SKILLS:
        held_out = skill.held_out(200)
        assert len(dict(held_out)) == 200, skill.name
        assert all(is_held_out(text_of(prompt)) for prompt, _ in held_out), skill.name
        trained = [prompt for prompt, _ in skill.training(100, seed=0)]
        assert not any(is_held_out(text_of(prompt)) for prompt in trained), skill.name


def test_answers_are_short_and_differ_from_the_prompt() -> None:
    for skill in SKILLS:
        for prompt, expected in skill.held_out(100):
            assert prompt.endswith(PROMPT_END), skill.name
            assert 0 < len(expected.encode()) < MAX_ANSWER_TOKENS, skill.name
            assert expected not in (prompt, text_of(prompt)), skill.name


def test_held_out_prompts_are_the_same_in_every_process() -> None:
    code = "from medley.demo.skills import SKILLS; print(SKILLS[0].held_out(5), SKILLS[-1].held_out(5))"
    seeds = ("1", "2")
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in seeds
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("kind", Kind)
def test_a_shared_prompt_suits_every_skill_of_its_kind(kind: Kind) -> None:
    prompts = shared_held_out(kind, 40)
    assert len(set(prompts)) == 40
    for prompt in prompts:
        text = text_of(prompt)
        assert prompt == prompt_of(text)
        assert is_held_out(text)
        assert all(skill.accepts(text) for skill in skills_of(kind))


def test_asking_for_more_prompts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="no further number text"):
        BY_NAME["increment"].held_out(9_000)


def test_two_tenants_share_the_skills_evenly() -> None:
    counts = [sum(tenant_of(skill) == tenant for skill in SKILLS) for tenant in TENANTS]
    assert min(counts) >= 64


def test_every_skill_has_one_adapter_folder_and_no_folder_is_left_over() -> None:
    assert {path.name for path in ADAPTERS_DIR.iterdir()} == set(BY_NAME)


def test_the_files_keep_to_their_sizes() -> None:
    assert sum(path.stat().st_size for path in files_under(ASSETS)) <= 8_000_000
    for folder in ADAPTERS_DIR.iterdir():
        assert sum(path.stat().st_size for path in files_under(folder)) <= 50_000, folder.name


def test_adapters_are_peft_folders_of_mixed_rank_and_mixed_targets() -> None:
    ranks, targets = set(), set()
    for folder in ADAPTERS_DIR.iterdir():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        ranks.add(config["r"])
        targets.add(tuple(config["target_modules"]))
        with safe_open(folder / "adapter_model.safetensors", "np") as tensors:
            names = set(tensors.keys())
            assert len(names) == 3 * 2 * len(config["target_modules"])
            for name in names:
                rank = tensors.get_slice(name).get_shape()[0 if ".lora_A." in name else 1]
                assert rank == config["r"], name
    assert len(ranks) >= 6
    assert len(targets) >= 5


def test_the_tokenizer_is_byte_level_and_comes_back_to_the_text() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    config = json.loads((MODEL_DIR / "config.json").read_text())
    text = "planet=Zażółć\n\x00 日本"
    ids = tokenizer.encode(text).ids
    assert ids == [config["bos_token_id"], *text.encode()]
    assert tokenizer.decode([*ids, config["eos_token_id"]]) == text


def test_the_recorded_accuracies_meet_the_demos_claim() -> None:
    report = json.loads((ASSETS / "accuracy.json").read_text())
    assert set(report["skills"]) == set(BY_NAME)
    assert report["held_out_prompts_each"] >= 200
    assert all(row["own"] >= 0.95 for row in report["skills"].values())
    assert report["accuracy_base"] <= 0.10
