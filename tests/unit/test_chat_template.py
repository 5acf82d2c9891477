"""Chats as templates write them: as transformers does for the shapes that are in use, and within bounds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from medley.api.openai import chat_template
from medley.api.openai.bodies import Message
from medley.api.openai.chat_template import ChatTemplate, TemplateRefuses, UnusableTemplate, template_messages
from medley.spec.errors import Fault

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MAX_BYTES = 100_000

# The shapes of published templates, in our words: headers with dates, ChatML with tools, alternation with checks.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have these functions:\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are helpful.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message["role"] in ("user", "assistant") and not message.get("tool_calls") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message["content"] %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- continue %}
    {%- elif message.get("tool_calls") %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- {"name": call.function.name, "arguments": call.function.arguments} | tojson(sort_keys=true) }}
            {{- ", " if not loop.last }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
BLOCKS = """{% for m in messages %}
  {% if m.role == 'assistant' %}
    {% generation %}
    {{ m.content }}{{ eos_token }}
    {% endgeneration %}
  {% else %}
    {{ m.role | upper }}: {{ m.content }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}"""

USER = {"role": "user", "content": " Who is <b>Ada</b> & 'Bob'? é🙂 "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": [
        {"role": "system", "content": "Be brief. "},
        USER,
        {"role": "assistant", "content": " A person. "},
        {"role": "user", "content": "Again"},
    ],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"z": 1, "a": "é"}'}}
            ],
        },
        {"role": "tool", "content": "found", "tool_call_id": "c1"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "é <x>", "parameters": {"type": "object"}}}]


def judge() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")), **TOKENS)


def render(source: str, chat: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    faults: list[Fault] = []
    messages = template_messages(msgspec.convert(chat, list[Message]), faults)
    assert faults == []
    add = options.pop("add_generation_prompt", True)
    template = ChatTemplate({"default": source}, TOKENS)
    return template.render(messages, tools=tools, add_generation_prompt=add, options=options, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", ["LLAMA3", "QWEN25", "MISTRAL", "BLOCKS"])
def test_a_chat_renders_as_transformers_renders_it(source: str, chat: str, tools: Any) -> None:
    # transformers takes a tool call's arguments as an object, which is how templates are written.
    plain = json.loads(json.dumps(CHATS[chat]))
    for message in plain:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    for add in (True, False):
        expected = judge().apply_chat_template(
            plain, chat_template=globals()[source], tools=tools, add_generation_prompt=add, tokenize=False
        )
        assert render(globals()[source], CHATS[chat], tools, add_generation_prompt=add) == expected


def test_a_templates_own_switches_are_passed_on() -> None:
    expected = judge().apply_chat_template(
        CHATS["one"], chat_template=QWEN25, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert render(QWEN25, CHATS["one"], enable_thinking=False) == expected
    assert "<think>" in expected


def test_parts_of_a_text_are_lines_of_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "[INST] a\nb[/INST]" in render(MISTRAL, [{"role": "user", "content": parts}])


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    twice = [USER, USER]
    with pytest.raises(TemplateRefuses, match="roles must alternate"):
        render(MISTRAL, twice)
    with pytest.raises(TemplateRefuses, match="no attribute 'content'"):
        render(MISTRAL, [{"role": "user", "content": None}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10000000) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[0].__init__.__globals__['os'] }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateRefuses):
        render(source, [USER])


def test_what_renders_too_long_or_for_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateRefuses, match=f"at most {MAX_BYTES} bytes"):
        render(echo, [{"role": "user", "content": "é" * (MAX_BYTES // 2 + 1)}])
    monkeypatch.setattr(chat_template, "RENDER_S", 0.05)
    slow = "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% set d = c.content %}"
    slow += "{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateRefuses, match=r"within 0\.05 s"):
        render(slow, [USER] * 1000)


def test_only_templates_that_read_tools_take_them() -> None:
    assert ChatTemplate({"default": QWEN25}, TOKENS).takes_tools
    assert not ChatTemplate({"default": BLOCKS}, TOKENS).takes_tools
    both = ChatTemplate({"default": BLOCKS, "tool_use": "{{ tools | tojson }}"}, TOKENS)
    rendered = both.render([], tools=[{"a": 1}], add_generation_prompt=True, options={}, max_bytes=MAX_BYTES)
    assert rendered == '[{"a": 1}]'


def test_a_folder_says_which_template_and_special_tokens_there_are(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config: dict[str, Any] = {"bos_token": {"content": "<a>"}, "eos_token": "<b>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ bos_token }}1"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<c>"}))

    def rendered() -> str:
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        return template.render([], tools=None, add_generation_prompt=True, options={}, max_bytes=MAX_BYTES)

    assert rendered() == "<a>1"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}2"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert rendered() == "<b>2"
    (tmp_path / "chat_template.jinja").write_text("{{ pad_token }}3{{ unk_token }}")
    assert rendered() == "<c>3"


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}"])
def test_a_template_that_cannot_be_read_says_where(source: str) -> None:
    with pytest.raises(UnusableTemplate, match=re.escape("line 1")):
        ChatTemplate({"default": source}, TOKENS)
