"""Configuration of every server process, read from the environment once, at the entry point.

This is the only file of the control plane that reads the environment. It yields one frozen `Settings` that is
passed down; it opens nothing and imports no server package. It fails closed: a bad value raises `ConfigError`
that names the key, the value (never a secret's) and what was wanted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

MIB = 1 << 20
# Where `medley up` keeps everything unless told otherwise.
DEFAULT_DATA_DIR = Path(".medley")
# The keys whose values hold passwords: errors never show them.
SECRET_KEYS = frozenset(
    {
        "MEDLEY_DATABASE_URL",
        "MEDLEY_REDIS_URL",
        "MEDLEY_STORE_URL",
        "MEDLEY_API_PASSWORD",
        "MEDLEY_WORK_PASSWORD",
    }
)
LOG_FORMATS = frozenset({"line", "bare", "json"})

T = TypeVar("T")


class ConfigError(Exception):
    """A key of the environment is missing or holds what it must not."""

    def __init__(self, key: str, got: str | None, wanted: str) -> None:
        shown = "nothing" if got is None else "<secret>" if key in SECRET_KEYS else repr(got)
        super().__init__(f"{key}: got {shown}, wanted {wanted}")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold; checked before parsing."""

    max_body_bytes: int = 256 * MIB
    max_prompt_bytes: int = 256 << 10
    max_jobs_per_request: int = 1_000_000
    max_adapter_bytes: int = 1024 * MIB


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a GPU worker builds its engine; None lets the engine size the value from the device."""

    device: str = "cpu"
    dtype: str = "float32"
    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    adapter_bytes: int | None = None
    adapter_slots: int | None = None
    load_format: str = "safetensors"
    forward: str = "model"  # "null" replaces the forward pass, to measure all that is around it
    seed: int = 0
    adapter_host_bytes: int | None = None
    max_tpot_ms: float | None = None  # None: the most tokens a second
    batch_invariant: bool = False
    starts_asleep: bool = True  # asleep until the dispatcher wakes it: the model is not loaded


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One process's configuration. `database_url` is that of the process's own role."""

    database_url: str
    redis_url: str
    store_url: str
    model: str | None
    pool: str = "default"
    host: str = "127.0.0.1"
    port: int = 8700
    listen_fd: int | None = None  # an already listening socket that a supervisor hands down
    lease_s: float = 10.0
    tick_s: float = 1.0
    limits: Limits = Limits()
    worker: WorkerSettings = WorkerSettings()
    health_file: Path | None = None  # touched on each turn of the process's loop
    log_format: str = "line"
    log_level: str = "info"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read all keys. Raises `ConfigError` for the first that is missing or bad."""
        read = _Reader(os.environ if environ is None else environ)
        defaults = cls(database_url="", redis_url="", store_url="", model=None)
        return cls(
            database_url=read.url("MEDLEY_DATABASE_URL", {"postgresql", "postgresql+psycopg"}),
            redis_url=read.url("MEDLEY_REDIS_URL", {"redis", "rediss", "unix"}),
            store_url=read.url("MEDLEY_STORE_URL", {"file"}),
            model=read.text("MEDLEY_MODEL"),
            pool=read.text("MEDLEY_POOL") or defaults.pool,
            host=read.text("MEDLEY_HOST") or defaults.host,
            port=read.whole("MEDLEY_PORT", defaults.port, low=0, high=65535),
            listen_fd=read.optional_whole("MEDLEY_LISTEN_FD", low=0),
            lease_s=read.seconds("MEDLEY_LEASE_S", defaults.lease_s),
            tick_s=read.seconds("MEDLEY_TICK_S", defaults.tick_s),
            limits=_limits(read),
            worker=_worker(read),
            health_file=_path(read.text("MEDLEY_HEALTH_FILE")),
            log_format=read.choice("MEDLEY_LOG_FORMAT", defaults.log_format, LOG_FORMATS),
            log_level=read.choice("MEDLEY_LOG_LEVEL", defaults.log_level, {"debug", "info", "warning", "error"}),
        )


def database_url_from_env(environ: Mapping[str, str] | None = None) -> str | None:
    """MEDLEY_DATABASE_URL alone, for commands that need only a database; None where it is not set."""
    read = _Reader(os.environ if environ is None else environ)
    if read.text("MEDLEY_DATABASE_URL") is None:
        return None
    return read.url("MEDLEY_DATABASE_URL", {"postgresql", "postgresql+psycopg"})


def log_format_from_env(environ: Mapping[str, str] | None = None) -> str:
    """MEDLEY_LOG_FORMAT alone, for commands that run once."""
    read = _Reader(os.environ if environ is None else environ)
    return read.choice("MEDLEY_LOG_FORMAT", "line", LOG_FORMATS)


def inherited_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a supervisor hands to its children: its own, less the keys that it sets itself.

    Keys about the engine, limits and timing pass through, so that `MEDLEY_LEASE_S=3 medley up` works.
    """
    env = dict(os.environ if environ is None else environ)
    for key in ("DATABASE_URL", "REDIS_URL", "STORE_URL", "LISTEN_FD", "HOST", "PORT", "HEALTH_FILE"):
        env.pop(f"MEDLEY_{key}", None)
    return env


def runtime_root() -> Path:
    """Where short-lived sockets go: XDG_RUNTIME_DIR where it serves, else the system's own /tmp.

    Root uses /tmp: another account must be able to walk to the sockets, and /run/user/0 is closed. Paths of
    sockets end at 107 bytes, so a long TMPDIR is no place for them.
    """
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() != 0 and xdg and len(xdg) <= 40 and os.access(xdg, os.W_OK | os.X_OK):
        return Path(xdg)
    return Path("/tmp")


def _limits(read: _Reader) -> Limits:
    default = Limits()
    return Limits(
        max_body_bytes=read.whole("MEDLEY_MAX_BODY_BYTES", default.max_body_bytes, low=1),
        max_prompt_bytes=read.whole("MEDLEY_MAX_PROMPT_BYTES", default.max_prompt_bytes, low=1),
        max_jobs_per_request=read.whole("MEDLEY_MAX_JOBS_PER_REQUEST", default.max_jobs_per_request, low=1),
        max_adapter_bytes=read.whole("MEDLEY_MAX_ADAPTER_BYTES", default.max_adapter_bytes, low=1),
    )


def _worker(read: _Reader) -> WorkerSettings:
    default = WorkerSettings()
    dtypes = {"float32", "float16", "bfloat16"}
    return WorkerSettings(
        device=read.text("MEDLEY_DEVICE") or default.device,
        dtype=read.choice("MEDLEY_DTYPE", default.dtype, dtypes),
        max_num_seqs=read.whole("MEDLEY_MAX_NUM_SEQS", default.max_num_seqs, low=1),
        max_model_len=read.optional_whole("MEDLEY_MAX_MODEL_LEN", low=1),
        max_num_batched_tokens=read.optional_whole("MEDLEY_MAX_NUM_BATCHED_TOKENS", low=1),
        kv_cache_bytes=read.optional_whole("MEDLEY_KV_CACHE_BYTES", low=1),
        adapter_bytes=read.optional_whole("MEDLEY_ADAPTER_BYTES", low=1),
        adapter_slots=read.optional_whole("MEDLEY_ADAPTER_SLOTS", low=1),
        load_format=read.choice("MEDLEY_LOAD_FORMAT", default.load_format, {"safetensors", "random"}),
        forward=read.choice("MEDLEY_FORWARD", default.forward, {"model", "null"}),
        seed=read.whole("MEDLEY_SEED", default.seed, low=0),
        adapter_host_bytes=read.optional_whole("MEDLEY_ADAPTER_HOST_BYTES", low=0),
        max_tpot_ms=read.optional_milliseconds("MEDLEY_MAX_TPOT_MS"),
        batch_invariant=read.flag("MEDLEY_BATCH_INVARIANT", default.batch_invariant),
        starts_asleep=read.choice("MEDLEY_START", "asleep", {"asleep", "active"}) == "asleep",
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class _Reader:
    """Typed look-ups in one environment; an empty value counts as not set (compose passes those)."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, key: str) -> str | None:
        return self._environ.get(key) or None

    def url(self, key: str, schemes: set[str]) -> str:
        value = self.text(key)
        wanted = "a URL that begins with " + " or ".join(f"{s}://" for s in sorted(schemes))
        if value is None or urlsplit(value).scheme not in schemes:
            raise ConfigError(key, value, wanted)
        return value

    def choice(self, key: str, default: str, allowed: AbstractSet[str]) -> str:
        value = self.text(key) or default
        if value not in allowed:
            raise ConfigError(key, value, "one of " + ", ".join(sorted(allowed)))
        return value

    def whole(self, key: str, default: int, *, low: int, high: int | None = None) -> int:
        value = self.optional_whole(key, low=low, high=high)
        return default if value is None else value

    def optional_whole(self, key: str, *, low: int, high: int | None = None) -> int | None:
        bound = f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}")
        value = self._parsed(key, int, bound)
        if value is not None and (value < low or (high is not None and value > high)):
            raise ConfigError(key, self.text(key), bound)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self.choice(key, str(default).lower(), {"true", "false"}) == "true"

    def seconds(self, key: str, default: float) -> float:
        value = self._above_zero(key, "seconds", 3600)
        return default if value is None else value

    def optional_milliseconds(self, key: str) -> float | None:
        return self._above_zero(key, "milliseconds", 3_600_000)

    def _above_zero(self, key: str, unit: str, high: float) -> float | None:
        wanted = f"{unit} above 0 and at most {high}"
        value = self._parsed(key, float, wanted)
        if value is not None and not 0 < value <= high:
            raise ConfigError(key, self.text(key), wanted)
        return value

    def _parsed(self, key: str, parse: Callable[[str], T], wanted: str) -> T | None:
        text = self.text(key)
        if text is None:
            return None
        try:
            return parse(text)
        except ValueError:
            raise ConfigError(key, text, wanted) from None
