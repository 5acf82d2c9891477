"""Chats as the model's own template writes them: Jinja in a sandbox, with what transformers gives to templates.

The template comes from the model's folder, which the operator chose, and never from a tenant; what tenants send is
data in it. Rendering is bounded in output and time, since how long a template takes depends on that data. Knows
nothing of jobs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medley.api.openai.bodies import Message
from medley.spec.errors import Fault

MAX_TEMPLATE_BYTES = 1 << 20  # published ones have some KB
MAX_CONFIG_BYTES = 64 << 20  # tokenizer_config.json may list every added token
RENDER_S = 2.0  # a long chat takes some milliseconds
CONFIG_NAME, TEMPLATE_NAME, TOKENS_NAME = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates, where a model has several
# What a template is given by its caller; chat_template_kwargs may not stand in for these.
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


class UnusableTemplate(ValueError):
    """The model's chat template cannot be read; the text says why and where."""


class TemplateRefuses(Exception):
    """The template, or a bound, refuses this chat. `field`: what of the request is at fault."""

    def __init__(self, message: str, field: str = "messages") -> None:
        super().__init__(message)
        self.field = field


class _TooLong(Exception):
    """The time for a rendering has passed."""


class ChatTemplate:
    """The templates of one model. Safe to use from several threads."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """sources: name -> text; `default`, and perhaps `tool_use`. Raises UnusableTemplate."""
        self._environment = _Environment()
        self._special_tokens = dict(special_tokens)
        try:
            self._templates = {name: self._environment.from_string(text) for name, text in sources.items()}
            variables = {
                name: meta.find_undeclared_variables(self._environment.parse(text)) for name, text in sources.items()
            }
        except TemplateSyntaxError as error:
            raise UnusableTemplate(f"the chat template, line {error.lineno}: {error.message}") from error
        self.takes_tools = any("tools" in names for names in variables.values())

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate | None:
        """The template in a model's folder, None where it has none. Raises UnusableTemplate."""
        config = _read_object(model_dir / CONFIG_NAME)
        sources = _sources(model_dir, config)
        if not sources:
            return None
        special_tokens = _special_tokens(_read_object(model_dir / TOKENS_NAME)) | _special_tokens(config)
        return cls(sources, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any],
        max_bytes: int,
    ) -> str:
        """The prompt, special tokens included. Raises TemplateRefuses.

        options: the request's chat_template_kwargs. max_bytes: of the prompt as UTF-8.
        """
        if taken := sorted(options.keys() & (_OURS | self._special_tokens.keys())):
            raise TemplateRefuses(f"other names than {', '.join(taken)}", "chat_template_kwargs")
        name = TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT
        variables = {
            **self._special_tokens,
            **options,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        num_bytes = 0
        try:
            with self._environment.within(RENDER_S):
                for part in self._templates[name].generate(variables):
                    parts.append(part)
                    num_bytes += len(part.encode())
                    if num_bytes > max_bytes:
                        raise TemplateRefuses(f"a chat that renders to at most {max_bytes} bytes")
        except (TemplateError, SecurityError) as error:
            raise TemplateRefuses(f"what the model's template takes: {error.message or type(error).__name__}") from None
        except _TooLong:
            raise TemplateRefuses(f"a chat that renders within {RENDER_S:g} s") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # A template that meets data it was not written for, such as arguments that are no object.
            raise TemplateRefuses(f"what the model's template takes; it failed with {type(error).__name__}") from None
        return "".join(parts)


def template_messages(messages: Sequence[Message], faults: list[Fault]) -> list[dict[str, Any]]:
    """Messages as templates are written for: text as one string, a tool call's arguments as an object, what is null
    left out (many would write "None"), reasoning under both of the names that are in use.
    """
    plain = []
    for i, message in enumerate(messages):
        shown: dict[str, Any] = {k: v for k, v in msgspec.to_builtins(message).items() if v is not None}
        if isinstance(message.content, list):
            shown["content"] = "\n".join(part.text for part in message.content)
        if message.reasoning_content is not None:
            shown["thinking"] = message.reasoning_content
        for k, call in enumerate(shown.get("tool_calls") or ()):
            try:
                call["function"]["arguments"] = msgspec.json.decode(call["function"]["arguments"])
            except (ValueError, RecursionError):
                field = f"messages[{i}].tool_calls[{k}].function.arguments"
                faults.append(Fault(field=field, got="text that is no JSON", wanted="an object as JSON"))
        plain.append(shown)
    return plain


def _sources(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """{name: text}: the file of its own first, as transformers reads them."""
    path = model_dir / TEMPLATE_NAME
    if path.is_file():
        found: Any = path.read_bytes()[: MAX_TEMPLATE_BYTES + 1].decode(errors="replace")
    else:
        found = config.get("chat_template")
    if isinstance(found, str):
        sources = {DEFAULT: found}
    elif isinstance(found, list):
        sources = {str(item["name"]): str(item["template"]) for item in found if {"name", "template"} <= item.keys()}
    elif found is None:
        return {}
    else:
        raise UnusableTemplate(f"{CONFIG_NAME}: chat_template: got {type(found).__name__}, wanted a text or a list")
    if any(len(text) > MAX_TEMPLATE_BYTES for text in sources.values()):
        raise UnusableTemplate(f"the chat template has more than {MAX_TEMPLATE_BYTES} bytes")
    if DEFAULT not in sources:
        raise UnusableTemplate(f"{CONFIG_NAME}: chat_template: none of {', '.join(sources)} is called {DEFAULT}")
    return sources


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnusableTemplate(f"{path.name} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnusableTemplate(f"{path.name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnusableTemplate(f"{path.name}: got {type(value).__name__}, wanted an object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{bos_token: "<s>", ...}: each stands as a text, or as an object that describes it."""
    found = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which each look-up and call also looks at the clock."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self._time = threading.local()

    def within(self, seconds: float) -> _Within:
        """Bounds the processor time that this thread renders for in the block. Raises _TooLong from the rendering."""
        return _Within(self._time, time.thread_time() + seconds)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_time()
        return super().getitem(obj, argument)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._check_time()
        return super().call(*args, **kwargs)

    def _check_time(self) -> None:
        # Outside of `within` a template is only compiled.
        if time.thread_time() > getattr(self._time, "until", float("inf")):
            raise _TooLong


class _Within:
    def __init__(self, local: threading.local, until: float) -> None:
        self._local, self._until = local, until

    def __enter__(self) -> None:
        self._local.until = self._until

    def __exit__(self, *_: object) -> None:
        del self._local.until


class _Generation(Extension):
    """{% generation %}: marks, for training, what the model is to learn. Here its content alone counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
