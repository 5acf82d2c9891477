"""The bodies of completions and chat completions as typed structs, and which of their fields are served.

A field that OpenAI or vLLM has and this service does not is refused with the reason, unless it stands at the value
that asks for nothing; one that nobody has is refused by name. What values mean is `requests`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from medley.api.job_bodies import NumSamples, TokenId
from medley.spec.errors import Fault

MAX_JOBS = 2_048  # of one request: prompts times samples
MAX_MESSAGES = 4_096
MAX_TOOLS = 256

# Lists hold one kind only, which `requests` sees to: no JSON reader can tell the kinds of lists apart.
PromptValue = str | Annotated[list[str | int | list[TokenId]], Meta(min_length=1)]


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both have. None takes the default, as absence does."""

    model: Annotated[str, Meta(min_length=1)]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: NumSamples | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's: the other fields of this service's sampling, by vLLM's names.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # Known and not served, see `_NOT_SERVED`.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_logprobs: Any = None
    logits_processors: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None
    service_tier: Any = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema by OpenAI's form. The text is always held to it, strict or not; name and description say nothing
    to the model.
    """

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text must be, by vLLM's names; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None


class CompletionBody(_Body, kw_only=True, forbid_unknown_fields=True):
    prompt: PromptValue
    logprobs: int | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str  # JSON


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat; their client sends back what it got, so empty fields of answers are taken too."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ChatBody(_Body, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: Any = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    chat_template: Any = None
    documents: Any = None
    parallel_tool_calls: bool | None = None
    modalities: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    store: Any = None
    metadata: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


_STRUCTURED = "null: use response_format, or structured_outputs with json, regex or choice"
# Field -> (the values besides null that ask for nothing, what is wanted).
_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guided_json": ((), _STRUCTURED),
    "guided_regex": ((), _STRUCTURED),
    "guided_choice": ((), _STRUCTURED),
    "guided_grammar": ((), _STRUCTURED),
    "prompt_logprobs": ((), "null: use echo beside logprobs, of a completion"),
    "logits_processors": (([],), "null: no code of a tenant's runs here"),
    "include_stop_str_in_output": ((False,), "false: stop strings are cut from the text"),
    "skip_special_tokens": ((True,), "true: special tokens are left out of the text"),
    "spaces_between_special_tokens": ((True, False), "null"),
    "truncate_prompt_tokens": ((), "null: a prompt is run whole or refused"),
    "use_beam_search": ((False,), "false: there is no beam search"),
    "service_tier": (("auto", "default"), "auto or default: there is one tier"),
    "best_of": ((1,), "1: every sample is returned, ask for n"),
    "suffix": (("",), "null: the model does not fill in the middle"),
    "tool_choice": (("auto", "none"), "auto or none: the model's text is not held to a tool"),
    "continue_final_message": ((False,), "false: the model answers with a new message"),
    "chat_template": ((), "null: chat is rendered by the model's own template alone"),
    "documents": (([],), "null: put documents into the messages"),
    "modalities": ((["text"],), 'null or ["text"]: the model writes text alone'),
    "audio": ((), "null: the model writes text alone"),
    "functions": (([],), "null: use tools"),
    "function_call": (("auto", "none"), "null: use tools"),
    "prediction": ((), "null: there are no predicted outputs"),
    "reasoning_effort": ((), "null: use chat_template_kwargs where the model's template knows such a switch"),
    "verbosity": ((), "null: say in the prompt how long the answer is to be"),
    "web_search_options": ((), "null: there is no web search"),
    "store": ((False,), "false: use a batch, which keeps its results"),
    "metadata": (({},), "null: use a batch, which keeps its metadata"),
    "moderation": ((), "null: there is no moderation"),
    "prompt_cache_options": ((), "null: there is no such cache"),
    "prompt_cache_retention": ((), "null: there is no such cache"),
}


def _names_of(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    return tuple(f.name for f in msgspec.structs.fields(kind) if f.name in _NOT_SERVED)


_GETTERS: dict[type, tuple[tuple[str, ...], attrgetter[Any]]] = {
    kind: (_names_of(kind), attrgetter(*_names_of(kind))) for kind in (CompletionBody, ChatBody)
}


def not_served(body: CompletionBody | ChatBody) -> Iterator[Fault]:
    """A fault for each field that asks for what is not served."""
    names, get = _GETTERS[type(body)]
    for name, value in zip(names, get(body), strict=True):
        if value is None:
            continue
        allowed, wanted = _NOT_SERVED[name]
        # Compared with the type, since 1 is True in Python.
        if not any(type(value) is type(one) and value == one for one in allowed):
            yield Fault(field=name, got=repr(value)[:80], wanted=wanted)
