"""Completions, chats and models by the real `openai` client, with workers that answer; and each of its errors."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from typing import Any
from uuid import UUID

import openai
import pytest
from api_server import Api, running_api
from chatting import chatting_model
from openai_service import (
    Serving,
    client_of,
    close_clients,
    completion_line,
    create,
    limited_client,
    read_lines,
    upload,
    wait_for,
)
from sqlalchemy import text
from waiting import wait_until

from medley.config import Limits
from medley.local.embedded import EmbeddedServers
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Details, FinishReason, JobState

LIMITS = Limits(max_body_bytes=1 << 20, max_prompt_bytes=1000)
CHAT: Any = [{"role": "user", "content": "hello"}]
DEEP = reduce(lambda inner, _: {"a": inner}, range(40), {})


@pytest.fixture(scope="module")
def api(module_database: Any, embedded: EmbeddedServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """On a model that can chat."""
    folder = tmp_path_factory.mktemp("serving")
    model, store_url = str(chatting_model(folder)), (folder / "store").as_uri()
    with running_api(module_database, embedded.redis_url, store_url, limits=LIMITS, model=model) as api:
        yield api


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


def tenant_of(api: Api) -> UUID:
    """The default tenant."""
    return api.tenant_id(api.as_tenant().get("/v1/tenant").json()["name"])


def inputs(api: Api) -> list[dict[str, Any]]:
    """The inputs of the jobs of the default tenant, in order."""
    tenant = tenant_of(api)
    statement = text("SELECT * FROM job_inputs WHERE tenant_id = :id ORDER BY job_id")
    with api.ledger.working() as conn:
        return [dict(row._mapping) for row in conn.execute(statement, {"id": tenant})]


def test_a_completion_is_answered_when_its_job_has_ended(api: Api) -> None:
    api.upload("add")
    with Serving(api, text=" world", finish_reason=FinishReason.STOP):
        found = client_of(api).completions.create(
            model="add",
            prompt="hello",
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            stop="x",
            seed=3,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"3": -1},
            user="me",
            extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True},
        )
    assert (found.object, found.model) == ("text_completion", "add")
    assert found.id.startswith("cmpl-")
    (choice,) = found.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, " world", "stop", None)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 2, 5)
    (job,) = inputs(api)
    assert (job["prompt"], job["adapter"], job["seed"], job["is_templated"]) == ("hello", "add", 3, None)
    assert job["sampling"] == {
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"3": -1.0},
        "stop": ["x"],
        "ignore_eos": True,
    }
    api.ledger.check()


@pytest.mark.parametrize(
    ("prompt", "stored"),
    [
        ("text", [("text", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2, 3], [(None, [1, 2, 3])]),
        ([[1, 2], [3]], [(None, [1, 2]), (None, [3])]),
    ],
)
def test_a_prompt_is_a_text_texts_token_ids_or_lists_of_them(api: Api, prompt: Any, stored: list[Any]) -> None:
    with Serving(api):
        found = client_of(api).completions.create(model="chatty", prompt=prompt, n=2)
    assert [choice.index for choice in found.choices] == list(range(2 * len(stored)))
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3 * len(stored), 4 * len(stored))
    assert [(job["prompt"], job["prompt_token_ids"]) for job in inputs(api)] == [one for one in stored for _ in "12"]


def test_defaults_are_those_that_openai_documents(api: Api) -> None:
    with Serving(api):
        client_of(api).completions.create(model="chatty", prompt="x")
        client_of(api).chat.completions.create(model="chatty", messages=CHAT)
    completion, chat = inputs(api)
    assert completion["sampling"] == {"max_tokens": 16, "temperature": 1.0}
    assert chat["sampling"] == {"max_tokens": 256, "temperature": 1.0}, "as long as the model allows"


def test_the_log_probability_of_each_token_is_shown_where_it_is_asked_for(api: Api) -> None:
    with Serving(api):
        completion = client_of(api).completions.create(model="chatty", prompt="x", logprobs=0)
        chat = client_of(api).chat.completions.create(model="chatty", messages=CHAT, logprobs=True, top_logprobs=0)
    shown = completion.choices[0].logprobs
    assert shown is not None
    assert shown.token_logprobs == [pytest.approx(-0.1)] * 2
    assert (shown.tokens, shown.text_offset, shown.top_logprobs) == (["\x07", "\x07"], [0, 1], None)
    listed = chat.choices[0].logprobs
    assert listed is not None
    assert listed.content is not None
    assert [(one.token, one.bytes, one.top_logprobs) for one in listed.content] == [("\x07", [7], [])] * 2


def test_alternatives_stand_beside_each_token_and_its_own_is_among_them(api: Api) -> None:
    details = Details(top_token_ids=(7, 65, 65, 255), top_logprobs=(-0.1, -2.5, -0.05, -3.5))
    with Serving(api, details=details):
        completion = client_of(api).completions.create(model="chatty", prompt="x", logprobs=2)
        chat = client_of(api).chat.completions.create(model="chatty", messages=CHAT, logprobs=True, top_logprobs=2)
    shown = completion.choices[0].logprobs
    assert shown is not None
    assert shown.top_logprobs is not None
    assert [list(place) for place in shown.top_logprobs] == [["\x07", "A"], ["A", "\x07", "bytes:\\xff"]]
    # Who asks whether a token is the likeliest compares numbers.
    assert shown.token_logprobs is not None
    assert shown.token_logprobs[0] == max(shown.top_logprobs[0].values())
    listed = chat.choices[0].logprobs
    assert listed is not None
    assert listed.content is not None
    assert [[(top.token, top.bytes) for top in one.top_logprobs] for one in listed.content] == [
        [("\x07", [7]), ("A", [65])],
        [("A", [65]), ("bytes:\\xff", [255])],
    ]
    assert [job["sampling"]["top_logprobs"] for job in inputs(api)] == [2, 2]


@pytest.mark.parametrize(("prompt", "text"), [("hé", "hé"), ([256, 104, 195, 169], "<s>hé")])
def test_an_echo_repeats_the_prompt_with_its_log_probabilities(api: Api, prompt: Any, text: str) -> None:
    details = Details(
        top_token_ids=(7, 8),
        top_logprobs=(-0.1, -0.1),
        prompt_token_ids=(256, 104, 195, 169),
        prompt_logprobs=(-1.0, -2.0, -3.0),
        prompt_top_token_ids=(104, 65, 66),
        prompt_top_logprobs=(-1.0, -0.5, -2.0),
    )
    with Serving(api, text="ok", details=details):
        found = client_of(api).completions.create(model="chatty", prompt=prompt, echo=True, logprobs=1, max_tokens=2)
        plain = client_of(api).completions.create(model="chatty", prompt=prompt, echo=True)
    (choice,) = found.choices
    assert (choice.text, plain.choices[0].text, plain.choices[0].logprobs) == (text + "ok", text + "ok", None)
    shown = choice.logprobs
    assert shown is not None
    assert shown.tokens == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9", "\x07", "\x07"]
    assert shown.token_logprobs == [None, -1.0, -2.0, -3.0, pytest.approx(-0.1), pytest.approx(-0.1)]
    assert shown.top_logprobs is not None
    assert [place and list(place) for place in shown.top_logprobs] == [
        None,
        ["h"],
        ["A", "bytes:\\xc3"],
        ["B", "bytes:\\xa9"],
        ["\x07"],
        ["\x07", "\x08"],
    ]
    begin = len(text) - 2
    assert shown.text_offset == [0, begin, begin + 1, begin + 2, begin + 2, begin + 3]
    sampling = inputs(api)[0]["sampling"]
    assert (sampling["prompt_logprobs"], sampling["top_logprobs"]) == (1, 1)
    assert "prompt_logprobs" not in inputs(api)[1]["sampling"]


def test_a_prompt_may_be_scored_alone(api: Api) -> None:
    details = Details(prompt_token_ids=(104, 105), prompt_logprobs=(-1.0,))
    with Serving(api, text="", num_tokens=0, details=details, finish_reason=FinishReason.SCORED):
        found = client_of(api).completions.create(
            model="chatty", prompt=[104, 105], echo=True, logprobs=0, max_tokens=0
        )
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == ("hi", "length")
    assert choice.logprobs is not None
    assert (choice.logprobs.token_logprobs, choice.logprobs.top_logprobs) == ([None, -1.0], None)


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"b": 1}},
                }
            },
            {"json_schema": '{"b":1}'},
        ),
        ({"extra_body": {"structured_outputs": {"json": '{"b": 1}'}}}, {"json_schema": '{"b": 1}'}),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]+"}}}, {"regex": "[0-9]+"}),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, {"choice": ["a", "b"]}),
    ],
)
def test_what_a_text_must_be_is_held_by_the_worker(api: Api, fields: Any, stored: dict[str, Any]) -> None:
    with Serving(api):
        client_of(api).chat.completions.create(**{"model": "chatty", "messages": CHAT, "max_tokens": 3, **fields})
    (job,) = inputs(api)
    assert job["sampling"] == {"max_tokens": 3, "temperature": 1.0, **stored}


def test_what_is_over_a_quota_is_refused_as_openai_refuses(api: Api) -> None:
    client = limited_client(api, queued_jobs=2, storage_bytes=10)
    for refused in (
        lambda: client.completions.create(model="chatty", prompt="x", n=3),
        lambda: upload(client, b"x" * 11),
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            refused()
        assert (caught.value.code, caught.value.type) == ("quota_exceeded", "rate_limit_error")
        assert int(caught.value.response.headers["retry-after"]) > 0
    assert inputs(api) == []
    assert list(client.files.list()) == []
    client = limited_client(api, requests_per_s=0.1)
    client.models.list()

    def ask_twice() -> None:
        """Where Redis does not answer in time, one is let in by a count of the process's own."""
        client.models.list()
        client.models.list()

    with pytest.raises(openai.RateLimitError) as limited:
        ask_twice()
    assert limited.value.code == "rate_limited"
    api.ledger.check()


def test_a_chat_is_rendered_by_the_models_template_and_tokenised_as_it_stands(api: Api) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    with Serving(api, text="hi", finish_reason=FinishReason.LENGTH):
        found = client_of(api).chat.completions.create(
            model="chatty",
            messages=messages,
            tools=tools,
            max_completion_tokens=3,
            extra_body={"chat_template_kwargs": {"shout": True}},
        )
        again = client_of(api).chat.completions.create(
            model="chatty",
            messages=[*messages, found.choices[0].message.model_dump(), *CHAT],  # type: ignore[list-item]
        )
    assert (found.object, found.choices[0].message.role) == ("chat.completion", "assistant")
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("hi", "length")
    first, second = inputs(api)
    assert first["prompt"] == (f"<s>[system]be brief</s>\n[user]a\nb</s>\ntools={json.dumps(tools)}\nLOUD[assistant]")
    assert first["is_templated"]
    assert second["prompt"].endswith("[assistant]hi</s>\n[user]hello</s>\n[assistant]")
    assert again.id != found.id


def test_a_stream_is_the_whole_answer_in_one_piece(api: Api) -> None:
    with Serving(api, text="all at once", finish_reason=FinishReason.STOP):
        chunks = list(
            client_of(api).chat.completions.create(
                model="chatty", messages=CHAT, n=2, stream=True, stream_options={"include_usage": True}
            )
        )
        texts = list(client_of(api).completions.create(model="chatty", prompt="x", stream=True))
    *spoken, last = chunks
    said = [(c.choices[0].index, c.choices[0].delta.content) for c in spoken if c.choices[0].delta.content]
    assert said == [(0, "all at once"), (1, "all at once")]
    assert [c.choices[0].finish_reason for c in spoken] == [None, "stop"] * 2
    assert last.usage is not None
    assert (last.choices, last.usage.total_tokens) == ([], 7)
    assert "".join(c.choices[0].text for c in texts) == "all at once"
    assert texts[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ["a", 1]}, ["prompt"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": ""}, ["prompt"]),
        ({"prompt": ["a", "b\0"]}, ["prompt[1]"]),
        ({"prompt": "x" * 1001}, ["prompt"]),
        ({"prompt": [-1]}, ["prompt"]),
        ({"max_tokens": 0, "temperature": -1, "n": 0, "seed": -1}, ["n", "max_tokens", "temperature", "seed"]),
        ({"logprobs": 21, "best_of": 3, "echo": True, "suffix": "x"}, ["best_of", "suffix", "logprobs"]),
        ({"extra_body": {"colour": 1, "guided_json": {}}}, ["colour", "guided_json"]),
        ({"n": 128, "prompt": ["x"] * 17}, ["prompt"]),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name_all_at_once(
    api: Api, fields: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(api).completions.create(**{"model": "chatty", "prompt": "x", **fields})
    assert isinstance(caught.value.body, dict)
    assert [fault["field"].partition(".")[0] for fault in caught.value.body["faults"]] == named
    assert caught.value.param == caught.value.body["faults"][0]["field"]
    assert caught.value.type == "invalid_request_error"
    assert inputs(api) == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "pirate", "content": "x"}]}, ["messages"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["messages"]),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, ["messages"]),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, None),
        ({"max_tokens": 1, "max_completion_tokens": 2}, ["max_tokens"]),
        ({"top_logprobs": 2, "tool_choice": "required"}, ["tool_choice", "top_logprobs"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format.json_schema"]),
        ({"response_format": {"type": "yaml"}}, ["response_format.type"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": DEEP}}}},
            ["response_format.json_schema.schema"],
        ),
        ({"extra_body": {"structured_outputs": {"regex": ""}}}, ["structured_outputs.regex"]),
        ({"extra_body": {"structured_outputs": {}}}, ["structured_outputs"]),
        (
            {"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"regex": "a"}}},
            ["structured_outputs"],
        ),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, ["chat_template"]),
        ({"extra_body": {"chat_template_kwargs": {"bos_token": "x"}}}, ["chat_template_kwargs"]),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_name(api: Api, fields: Any, named: list[str] | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(api).chat.completions.create(**{"model": "chatty", "messages": CHAT, **fields})
    assert isinstance(caught.value.body, dict)
    fields_named = [fault["field"] for fault in caught.value.body["faults"]]
    if named is None:
        assert fields_named == ["messages[0].tool_calls[0].function.arguments"]
    else:
        assert [field.partition("[")[0] for field in fields_named] == named
    assert inputs(api) == []


def test_values_that_ask_for_nothing_are_taken(api: Api) -> None:
    with Serving(api):
        client_of(api).chat.completions.create(
            model="chatty",
            messages=CHAT,
            response_format={"type": "text"},
            tool_choice="none",
            modalities=["text"],
            store=False,
            service_tier="auto",
            n=1,
        )
        client_of(api).completions.create(model="chatty", prompt="x", echo=False, best_of=1, suffix="")


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (ErrorCode.PROMPT_TOO_LONG, openai.BadRequestError),
        (ErrorCode.ADAPTER_UNAVAILABLE, openai.InternalServerError),
        (ErrorCode.NUMERICAL, openai.InternalServerError),
    ],
)
def test_a_job_that_fails_is_an_error_of_its_kind(
    api: Api, code: ErrorCode, raised: type[openai.APIStatusError]
) -> None:
    error = JobError(code=code, message="why")
    with Serving(api, state=JobState.FAILED, error=error, text=None), pytest.raises(raised) as caught:
        client_of(api).completions.create(model="chatty", prompt="x")
    assert "why" in caught.value.message
    assert caught.value.code == {"prompt_too_long": "context_length_exceeded"}.get(code.value, code.value)


def body_of(prompt: str) -> str:
    return json.dumps({"model": "chatty", "prompt": prompt})


def ask_and_go(api: Api, prompt: str, **headers: str) -> None:
    """Asks for a completion, and cuts the connection once the request waits."""
    host, port = api.url.removeprefix("http://").split(":")
    body = body_of(prompt)
    shown = {"Host": host, **api.headers(), **headers, "Content-Length": str(len(body))}
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        lines = ["POST /openai/v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in shown.items())]
        connection.sendall("\r\n".join([*lines, "", body]).encode())
        wait_until(lambda: api.num_waiting() == 1)
    wait_until(lambda: api.num_waiting() == 0)


def states(api: Api) -> list[str]:
    mine = [job["job_id"] for job in inputs(api)]
    jobs = api.ledger.jobs()
    return [jobs[job].state for job in mine]


def test_a_client_that_goes_takes_its_jobs_with_it_but_for_an_idempotency_key(api: Api) -> None:
    ask_and_go(api, "gone")
    wait_until(lambda: states(api) == ["cancelled"])
    headers = {"Idempotency-Key": "again"}
    ask_and_go(api, "kept", **headers)
    assert states(api) == ["cancelled", "queued"]
    with Serving(api, text="still there"):
        again = api.as_tenant().post("/openai/v1/completions", content=body_of("kept"), headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["choices"][0]["text"] == "still there"
    assert [job["prompt"] for job in inputs(api)] == ["gone", "kept"]
    api.ledger.check()


def test_many_wait_at_once_and_each_gets_its_own(api: Api) -> None:
    num = 40
    found: dict[int, int] = {}

    def ask(i: int) -> None:
        answer = client_of(api).completions.create(model="chatty", prompt="x", n=1 + i % 3)
        found[i] = len(answer.choices)

    client_of(api)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(num)]
    for thread in threads:
        thread.start()
    wait_until(lambda: api.num_waiting() == num)
    with Serving(api):
        for thread in threads:
            thread.join()
    assert found == {i: 1 + i % 3 for i in range(num)}


def test_chats_run_as_a_batch_too(api: Api) -> None:
    client = client_of(api)
    line = completion_line("1", "chatty")
    body = {"model": "chatty", "messages": CHAT, "logprobs": True}
    chat = {**line, "url": "/v1/chat/completions", "body": body}
    refused = {**chat, "custom_id": "2", "body": {"model": "chatty", "messages": [{"role": "pirate", "content": "x"}]}}
    with Serving(api, text="arr"):
        batch = create(client, [chat], endpoint="/v1/chat/completions")
        ended = wait_for(client, batch.id, "completed")
        failed = wait_for(client, create(client, [chat, refused], endpoint="/v1/chat/completions").id, "failed")
    (found,) = read_lines(client, ended.output_file_id)
    shown = found["response"]["body"]
    assert (shown["object"], shown["choices"][0]["message"]["content"]) == ("chat.completion", "arr")
    assert len(shown["choices"][0]["logprobs"]["content"]) == 2
    assert inputs(api)[0]["prompt"] == "<s>[user]hello</s>\n[assistant]"
    assert [(e.line, e.param) for e in failed.errors.data] == [(2, "body.messages")]
    assert "pirate" in failed.errors.data[0].message


def test_a_request_that_does_not_end_in_time_is_a_timeout_and_its_jobs_are_cancelled(
    module_database: Any, embedded: EmbeddedServers, tmp_path: Any
) -> None:
    with running_api(module_database, embedded.redis_url, tmp_path.as_uri()) as api:
        services = api._app.state.services
        services.settings = replace(services.settings, completion_wait_s=0.2)
        with pytest.raises(openai.InternalServerError) as caught:
            client_of(api).with_options(max_retries=5).completions.create(model="model", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert [row.state for row in api.ledger.jobs().values()] == ["cancelled"], "it is not sent again"
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client_of(api).chat.completions.create(model="model", messages=CHAT)
        api.ledger.check()


def test_a_stop_lets_completions_go_to_be_sent_again(
    module_database: Any, embedded: EmbeddedServers, tmp_path: Any
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running_api(module_database, embedded.redis_url, tmp_path.as_uri()) as api:
            client = client_of(api)
            waiting = pool.submit(client.completions.create, model="model", prompt="a")
            wait_until(lambda: api.num_waiting() == 1)
        with pytest.raises(openai.InternalServerError) as caught:
            waiting.result(timeout=10)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
