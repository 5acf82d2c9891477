"""The real `openai` client through the whole service: every process of `medley up`, real adapters, real answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import ADAPTERS, MODEL
from chatting import chatting_model
from harness import evaluate
from openai_service import completion_line, create, read_lines, wait_for
from tokenizers import Tokenizer

from medley.client import Client
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS
from medley.local.stack import LocalStack

OURS = SKILLS[:3]
NUM_PROMPTS = 4
NUM_QUESTIONS = 12


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("stack")
    with LocalStack(folder / "data", model=chatting_model(folder)) as stack:
        yield stack


@pytest.fixture
def tenant(stack: LocalStack) -> Iterator[tuple[openai.OpenAI, Client]]:
    key = stack.add_tenant("acme")
    base_url = f"{stack.url}/openai/v1"
    with Client(stack.url, key) as native, openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        yield client, native


def test_one_file_runs_on_many_adapters_and_answers_as_the_native_interface_does(
    tenant: tuple[openai.OpenAI, Client], tmp_path: Path
) -> None:
    client, native = tenant
    folder = tmp_path / "adapters"
    folder.mkdir()
    for skill in OURS:
        (folder / skill.name).symlink_to(ADAPTERS / skill.name, target_is_directory=True)
    native.adapters.add_folder(folder)
    asked = [(skill, prompt, expected) for skill in OURS for prompt, expected in skill.held_out(NUM_PROMPTS)]
    fields: dict[str, Any] = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
    lines = [completion_line(f"{i}", skill.name, prompt, **fields) for i, (skill, prompt, _) in enumerate(asked)]
    ended = wait_for(client, create(client, lines).id, "completed", "failed")
    assert ended.status == "completed", ended.errors
    found = read_lines(client, ended.output_file_id)
    texts = [line["response"]["body"]["choices"][0]["text"] for line in found]
    assert texts == [expected for _, _, expected in asked]
    assert {line["response"]["body"]["choices"][0]["finish_reason"] for line in found} == {"stop"}
    skill, prompt, _ = asked[0]
    alone = client.completions.create(model=skill.name, prompt=prompt, logprobs=0, **fields)
    assert alone.choices[0].text == texts[0]
    assert alone.choices[0].logprobs is not None
    assert "".join(alone.choices[0].logprobs.tokens or ()).startswith(texts[0])
    assert native.submit(prompt, adapter=skill.name, max_tokens=MAX_ANSWER_TOKENS).result(timeout=60).text == texts[0]


def test_lm_evaluation_harness_finds_the_scores_of_its_own_backend(
    stack: LocalStack, tenant: tuple[openai.OpenAI, Client], tmp_path: Path
) -> None:
    """Of an adapter, by log-likelihoods and by what it writes; the other backend is transformers + PEFT."""
    _, native = tenant
    skill, other = SKILLS[:2]
    native.adapters.add(skill.name, ADAPTERS / skill.name)
    right = skill.held_out(NUM_QUESTIONS)
    wrong = other.held_out(NUM_QUESTIONS)
    questions = [
        {"prompt": prompt, "choices": [answer, answer[::-1] + "a", unlike]}
        for (prompt, answer), (_, unlike) in zip(right, wrong, strict=True)
    ]
    common = {"tokenizer": str(MODEL), "add_bos_token": True}
    served = {
        "model": skill.name,
        "base_url": f"{stack.url}/openai/v1/completions",
        "tokenizer_backend": "huggingface",
        "max_length": 256,
    }
    loaded = {"pretrained": str(MODEL), "peft": str(ADAPTERS / skill.name), "dtype": "float32"}
    runs = {
        "ours": {"model": "local-completions", "model_args": common | served},
        "theirs": {"model": "hf", "model_args": common | loaded},
    }
    found = evaluate(tmp_path, questions, runs, {"OPENAI_API_KEY": stack.add_tenant("acme")})
    ours, theirs = found["ours"], found["theirs"]
    assert ours["scores"] == theirs["scores"]
    assert min(ours["scores"].values()) > 0.5, "the adapter knows the answers"
    assert ours["answers"]["write"] == theirs["answers"]["write"]
    for mine, judged in zip(ours["answers"]["choose"], theirs["answers"]["choose"], strict=True):
        assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in judged], abs=1e-3)
        assert [is_greedy for _, is_greedy in mine] == [is_greedy for _, is_greedy in judged]


def test_a_chat_reaches_the_model_with_the_templates_special_tokens_and_no_others(
    tenant: tuple[openai.OpenAI, Client],
) -> None:
    client, _ = tenant
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="chatty", messages=messages, max_tokens=2, temperature=0)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    rendered = "<s>[user]hello</s>\n[assistant]"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(rendered, add_special_tokens=False).ids)
    # The same tokens as ids, which nothing is added to, have the same answer.
    ids = tokenizer.encode(rendered, add_special_tokens=False).ids
    same = client.completions.create(model="chatty", prompt=ids, max_tokens=2, temperature=0)
    assert same.choices[0].text == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="chatty", prompt=[7] * 300, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
