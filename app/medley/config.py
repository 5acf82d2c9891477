"""Configuration of every server process, read from the environment once, at the entry point.

This is the only file of the control plane that reads the process's environment (`environment` says how, `config_scale`
what of it is about starting and stopping machines). It yields one frozen `Settings` that is passed down; it opens
nothing and imports no server package. It fails closed: a bad value raises `ConfigError` that names the key, the value
(never a secret's) and what was wanted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from medley.config_scale import ScaleSettings, read_scale
from medley.connection_urls import (
    SSL_MODES,
    encryption_weakness,
    is_default,
    password_weakness,
    with_password,
    with_query,
)
from medley.environment import SECRET_KEYS, ConfigError, Environment

MIB = 1 << 20
# Where `medley up` keeps everything unless told otherwise.
DEFAULT_DATA_DIR = Path(".medley")
# How a remote store is reached: for the processes that reach it, and not for their children.
STORE_KEYS = ("STORE_ENDPOINT", "STORE_REGION", "STORE_ACCESS_KEY", "STORE_SECRET_KEY")
LOG_FORMATS = frozenset({"line", "bare", "json"})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold; checked before parsing."""

    max_body_bytes: int = 256 * MIB
    max_prompt_bytes: int = 256 << 10
    max_jobs_per_request: int = 1_000_000
    max_adapter_bytes: int = 1024 * MIB
    max_file_bytes: int = 512 * MIB


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What one tenant may have at a time, unless `medley tenants limit` says otherwise of it."""

    queued_jobs: int = 10_000_000  # that have not ended
    queued_bytes: int = 16 * 1024 * MIB  # of prompts, in batches that have not finished
    adapters: int = 10_000
    storage_bytes: int = 1024 * 1024 * MIB  # of adapters' files, every revision's, and of files for batches
    requests_per_s: float = 500.0  # on the average of ten seconds


@dataclass(frozen=True, kw_only=True)
class StoreAccess:
    """Where an S3-compatible store answers and who asks. None is left to the client: AWS's own address, and the
    machine's own role.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)


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
    gpu_share: float | None = None  # of its GPU's memory, where workers share one; None: what is free of it
    max_tpot_ms: float | None = None  # None: the most tokens a second
    batch_invariant: bool = False
    tensor_parallel: int = 1  # devices that share the model, `device` and those after it
    store_cache_dir: Path | None = None  # of adapters that a remote store holds; None: below the temporary folder
    store_cache_bytes: int = 20 << 30
    engine_stall_s: float = 300.0  # an engine that is silent for longer is taken for dead: no step takes this long
    starts_asleep: bool = True  # asleep until the dispatcher wakes it
    # What an engine does while the worker is asleep. "off": there is none. "host": it has its weights in host memory.
    # "warm": the same, and one is loaded before the worker is first woken. None: "host" on CUDA, "off" on a CPU.
    sleep: str | None = None

    @property
    def keeps_engine(self) -> bool:
        """Whether an engine stays while the worker is asleep."""
        return self.device.startswith("cuda") if self.sleep is None else self.sleep != "off"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One process's configuration. `database_url` is that of the process's own role."""

    database_url: str
    redis_url: str
    store_url: str
    model: str | None
    model_name: str | None = None  # by which OpenAI's clients name the base; None: its folder's name
    completion_wait_s: float = 300.0  # how long a completion over HTTP may wait for its jobs
    pool: str = "default"
    host: str = "127.0.0.1"
    port: int = 8700
    trusted_proxies: str | None = None  # addresses, with commas, whose X-Forwarded-For says who calls
    listen_fd: int | None = None  # an already listening socket that a supervisor hands down
    lease_s: float = 10.0
    tick_s: float = 1.0
    limits: Limits = Limits()
    quotas: Quotas = Quotas()
    worker: WorkerSettings = WorkerSettings()
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    webhook_loopback: bool = False  # webhooks may lead to this machine, and be plain HTTP: `medley up` and tests
    health_file: Path | None = None  # touched on each turn of the process's loop
    log_format: str = "line"
    log_level: str = "info"

    @property
    def base_name(self) -> str:
        """The base model's name among OpenAI's models."""
        return self.model_name or (Path(self.model).resolve().name if self.model else "base")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read all keys. Raises `ConfigError` for the first that is missing or bad."""
        read = Environment(os.environ if environ is None else environ)
        defaults = cls(database_url="", redis_url="", store_url="", model=None)
        return cls(
            database_url=_database_url(read),
            redis_url=_redis_url(read),
            store_url=read.url("MEDLEY_STORE_URL", {"file", "s3"}),
            model=read.text("MEDLEY_MODEL"),
            model_name=read.text("MEDLEY_MODEL_NAME"),
            completion_wait_s=read.seconds("MEDLEY_COMPLETION_WAIT_S", defaults.completion_wait_s),
            pool=read.text("MEDLEY_POOL") or defaults.pool,
            host=read.text("MEDLEY_HOST") or defaults.host,
            port=read.whole("MEDLEY_PORT", defaults.port, low=0, high=65535),
            trusted_proxies=read.text("MEDLEY_TRUSTED_PROXIES"),
            listen_fd=read.optional_whole("MEDLEY_LISTEN_FD", low=0),
            lease_s=read.seconds("MEDLEY_LEASE_S", defaults.lease_s),
            tick_s=read.seconds("MEDLEY_TICK_S", defaults.tick_s),
            limits=_limits(read),
            quotas=_quotas(read),
            worker=_worker(read),
            scale=read_scale(read),
            webhook_loopback=read.flag("MEDLEY_WEBHOOK_LOOPBACK", defaults.webhook_loopback),
            health_file=_path(read.text("MEDLEY_HEALTH_FILE")),
            log_format=read.choice("MEDLEY_LOG_FORMAT", defaults.log_format, LOG_FORMATS),
            log_level=read.choice("MEDLEY_LOG_LEVEL", defaults.log_level, {"debug", "info", "warning", "error"}),
        )


def database_url_from_env(environ: Mapping[str, str] | None = None) -> str | None:
    """MEDLEY_DATABASE_URL and what belongs to it, for commands that need only a database; None where it is not set."""
    read = Environment(os.environ if environ is None else environ)
    if read.secret("MEDLEY_DATABASE_URL") is None:
        return None
    return _database_url(read)


def redis_url_from_env(environ: Mapping[str, str] | None = None) -> str | None:
    """MEDLEY_REDIS_URL and what belongs to it, for commands that can do without; None where it is not set."""
    read = Environment(os.environ if environ is None else environ)
    return None if read.secret("MEDLEY_REDIS_URL") is None else _redis_url(read)


def role_passwords_from_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The passwords that the first migration gives to its roles, by key; those that are set."""
    read = Environment(os.environ if environ is None else environ)
    found = {key: read.secret(key) for key in ("MEDLEY_API_PASSWORD", "MEDLEY_WORK_PASSWORD")}
    for key, password in found.items():
        if password is not None and is_default(password) and not read.allows_weak_secrets:
            raise ConfigError(key, password, _NO_DEFAULT)
    return {key: password for key, password in found.items() if password is not None}


def store_access_from_env(environ: Mapping[str, str] | None = None) -> StoreAccess:
    """How an S3-compatible store is reached. Keys may stand in files: MEDLEY_STORE_SECRET_KEY_FILE and so on.

    Raises ConfigError, also for one key without the other.
    """
    read = Environment(os.environ if environ is None else environ)
    access_key, secret_key = read.secret("MEDLEY_STORE_ACCESS_KEY"), read.secret("MEDLEY_STORE_SECRET_KEY")
    if (access_key is None) != (secret_key is None):
        missing = "MEDLEY_STORE_ACCESS_KEY" if access_key is None else "MEDLEY_STORE_SECRET_KEY"
        raise ConfigError(missing, None, "both keys of the store, or neither")
    endpoint = None
    if read.text("MEDLEY_STORE_ENDPOINT") is not None:
        endpoint = read.url("MEDLEY_STORE_ENDPOINT", {"http", "https"})
    return StoreAccess(
        endpoint=endpoint, region=read.text("MEDLEY_STORE_REGION"), access_key=access_key, secret_key=secret_key
    )


def store_url_from_env(environ: Mapping[str, str] | None = None) -> str | None:
    """MEDLEY_STORE_URL alone, for commands that need no more of the service; None where it is not set."""
    read = Environment(os.environ if environ is None else environ)
    if read.text("MEDLEY_STORE_URL") is None:
        return None
    return read.url("MEDLEY_STORE_URL", {"file"})


def log_format_from_env(environ: Mapping[str, str] | None = None) -> str:
    """MEDLEY_LOG_FORMAT alone, for commands that run once."""
    read = Environment(os.environ if environ is None else environ)
    return read.choice("MEDLEY_LOG_FORMAT", "line", LOG_FORMATS)


def device_from_env(environ: Mapping[str, str]) -> tuple[str, int, float | None]:
    """Where a worker computes, on how many devices, and with which share of their memory.

    MEDLEY_DEVICE, MEDLEY_TENSOR_PARALLEL and MEDLEY_GPU_SHARE.
    """
    worker = _worker(Environment(environ))
    return worker.device, worker.tensor_parallel, worker.gpu_share


def inherited_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a supervisor hands to its children: its own, less the keys that it sets itself.

    Keys about the engine, limits and timing pass through, so that `MEDLEY_LEASE_S=3 medley up` works.
    """
    env = dict(os.environ if environ is None else environ)
    own = {f"MEDLEY_{key}" for key in ("LISTEN_FD", "HOST", "PORT", "HEALTH_FILE")} | SECRET_KEYS
    own |= {f"MEDLEY_{key}" for key in STORE_KEYS}
    own |= {key for key in env if key.startswith(("MEDLEY_DATABASE_", "MEDLEY_REDIS_"))}
    for key in own | {f"{key}_FILE" for key in SECRET_KEYS}:
        env.pop(key, None)
    return env


def scale_secret_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The scale hook's secret, or its file, as a supervisor hands it to the dispatcher alone."""
    env = os.environ if environ is None else environ
    keys = ("MEDLEY_SCALE_HOOK_SECRET", "MEDLEY_SCALE_HOOK_SECRET_FILE")
    return {key: env[key] for key in keys if key in env}


def runtime_root() -> Path:
    """Where short-lived sockets go: XDG_RUNTIME_DIR where it serves, else the system's own /tmp.

    Root uses /tmp: another account must be able to walk to the sockets, and /run/user/0 is closed. Paths of
    sockets end at 107 bytes, so a long TMPDIR is no place for them.
    """
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() != 0 and xdg and len(xdg) <= 40 and os.access(xdg, os.W_OK | os.X_OK):
        return Path(xdg)
    return Path("/tmp")


_NO_DEFAULT = "a password that is neither empty nor a default one (or MEDLEY_ALLOW_WEAK_SECRETS=true)"


def _database_url(read: Environment) -> str:
    url = read.url("MEDLEY_DATABASE_URL", {"postgresql", "postgresql+psycopg"})
    url = _add_password(read, url, "MEDLEY_DATABASE")
    fields = {
        "sslmode": read.optional_choice("MEDLEY_DATABASE_SSLMODE", SSL_MODES),
        "sslrootcert": read.text("MEDLEY_DATABASE_SSLROOTCERT"),  # "system": the machine's own authorities
        "sslcert": read.text("MEDLEY_DATABASE_SSLCERT"),
        "sslkey": read.text("MEDLEY_DATABASE_SSLKEY"),
    }
    return _judged(read, with_query(url, fields), "MEDLEY_DATABASE_URL")


def _redis_url(read: Environment) -> str:
    url = read.url("MEDLEY_REDIS_URL", {"redis", "rediss", "unix"})
    url = _add_password(read, url, "MEDLEY_REDIS")
    fields = {
        "ssl_ca_certs": read.text("MEDLEY_REDIS_CA"),
        "ssl_certfile": read.text("MEDLEY_REDIS_CERT"),
        "ssl_keyfile": read.text("MEDLEY_REDIS_KEY"),
    }
    if urlsplit(url).scheme == "rediss":
        # Said outright, as libraries differ in what they take for granted.
        if "ssl_cert_reqs" not in urlsplit(url).query:
            fields["ssl_cert_reqs"] = "required"
    elif any(fields.values()):
        raise ConfigError("MEDLEY_REDIS_URL", url, "rediss://, since a certificate is given")
    return _judged(read, with_query(url, fields), "MEDLEY_REDIS_URL")


def _add_password(read: Environment, url: str, prefix: str) -> str:
    password = read.secret(f"{prefix}_PASSWORD")
    try:
        return with_password(url, password)
    except ValueError:
        raise ConfigError(f"{prefix}_PASSWORD", password, f"nothing, since {prefix}_URL holds a password") from None


def _judged(read: Environment, url: str, key: str) -> str:
    """Refuses what would leave the deployment open. The URLs of `medley up` name private sockets, so they pass."""
    if password_weakness(url) is not None and not read.allows_weak_secrets:
        raise ConfigError(key, url, _NO_DEFAULT)
    wanted = encryption_weakness(url, read.plaintext_hosts)
    if wanted is not None:
        raise ConfigError(key, url, wanted)
    return url


def _limits(read: Environment) -> Limits:
    default = Limits()
    return Limits(
        max_body_bytes=read.whole("MEDLEY_MAX_BODY_BYTES", default.max_body_bytes, low=1),
        max_prompt_bytes=read.whole("MEDLEY_MAX_PROMPT_BYTES", default.max_prompt_bytes, low=1),
        max_jobs_per_request=read.whole("MEDLEY_MAX_JOBS_PER_REQUEST", default.max_jobs_per_request, low=1),
        max_adapter_bytes=read.whole("MEDLEY_MAX_ADAPTER_BYTES", default.max_adapter_bytes, low=1),
        max_file_bytes=read.whole("MEDLEY_MAX_FILE_BYTES", default.max_file_bytes, low=1),
    )


def _quotas(read: Environment) -> Quotas:
    default = Quotas()
    return Quotas(
        queued_jobs=read.whole("MEDLEY_QUOTA_QUEUED_JOBS", default.queued_jobs, low=0),
        queued_bytes=read.whole("MEDLEY_QUOTA_QUEUED_BYTES", default.queued_bytes, low=0),
        adapters=read.whole("MEDLEY_QUOTA_ADAPTERS", default.adapters, low=0),
        storage_bytes=read.whole("MEDLEY_QUOTA_STORAGE_BYTES", default.storage_bytes, low=0),
        requests_per_s=read.per_second("MEDLEY_QUOTA_REQUESTS_PER_S", default.requests_per_s),
    )


def _worker(read: Environment) -> WorkerSettings:
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
        gpu_share=read.optional_share("MEDLEY_GPU_SHARE"),
        max_tpot_ms=read.optional_milliseconds("MEDLEY_MAX_TPOT_MS"),
        batch_invariant=read.flag("MEDLEY_BATCH_INVARIANT", default.batch_invariant),
        tensor_parallel=read.whole("MEDLEY_TENSOR_PARALLEL", default.tensor_parallel, low=1),
        store_cache_dir=_path(read.text("MEDLEY_STORE_CACHE_DIR")),
        store_cache_bytes=read.whole("MEDLEY_STORE_CACHE_BYTES", default.store_cache_bytes, low=1),
        engine_stall_s=read.seconds("MEDLEY_ENGINE_STALL_S", default.engine_stall_s),
        starts_asleep=read.choice("MEDLEY_START", "asleep", {"asleep", "active"}) == "asleep",
        sleep=read.optional_choice("MEDLEY_SLEEP", {"off", "host", "warm"}),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
