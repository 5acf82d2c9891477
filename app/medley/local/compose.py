"""compose.yaml, made from the table of processes: `python -m medley.local.compose > compose.yaml`.

A test compares the file in the repository with what this prints, so the two cannot drift. It knows images,
volumes and secrets; what a process is and needs comes from `processes.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from medley.local.postgres_server import DISCREET, SHARED_BUFFERS_MB
from medley.local.processes import PROCESSES, Health, ProcessSpec

_HEADER = """\
# Medley on one or more hosts. Made from app/medley/local/processes.py: change that, then run
#   python -m medley.local.compose > compose.yaml
#
# Needed in the environment (or .env): MEDLEY_MODEL_DIR, the base model's folder on this host.
# Needed in the folder MEDLEY_SECRETS_DIR (./secrets): a file for each password. To draw them:
#   mkdir -m 700 secrets; for name in superuser owner api work redis; do
#     openssl rand -hex 32 > secrets/${name}_password; done; chmod 444 secrets/*
# Adapters lie in the volume `store`, or where MEDLEY_STORE_URL says: s3://bucket/prefix, with MEDLEY_STORE_ENDPOINT,
# MEDLEY_STORE_REGION, MEDLEY_STORE_ACCESS_KEY and MEDLEY_STORE_SECRET_KEY.
# PostgreSQL and Redis are spoken to unencrypted on compose's own network (MEDLEY_PLAINTEXT_HOSTS). For servers
# elsewhere set MEDLEY_DATABASE_SSLMODE=verify-full, MEDLEY_DATABASE_SSLROOTCERT, a rediss:// URL and MEDLEY_REDIS_CA.
# Start:  docker compose --profile gpu up --build   (or --profile cpu)
# A key:  docker compose run --rm migrate medley tenants add NAME
"""
_PORT = 8700
_MODEL = "/model"
_STORE = "/var/lib/medley/store"
_BEAT = "/tmp/medley.beat"
_SECRETS = "/run/secrets"
_PASSWORDS = {"medley_owner": "owner_password", "medley_api": "api_password", "medley_work": "work_password"}
_SUPERUSER_PASSWORD, _REDIS_PASSWORD = "superuser_password", "redis_password"
# Of the CUDA version that torch's own wheels are built for: FlashInfer links what it builds to this one's runtime.
_CUDA_BASE = "nvidia/cuda:13.0.2-devel-ubuntu24.04"
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_STORE_KEYS = (
    "MEDLEY_STORE_ENDPOINT",
    "MEDLEY_STORE_REGION",
    "MEDLEY_STORE_ACCESS_KEY",
    "MEDLEY_STORE_SECRET_KEY",
)
# Engine knobs an operator may set; an empty value counts as not set.
_WORKER_KNOBS = (
    "MEDLEY_MAX_NUM_SEQS",
    "MEDLEY_MAX_MODEL_LEN",
    "MEDLEY_MAX_NUM_BATCHED_TOKENS",
    "MEDLEY_KV_CACHE_BYTES",
    "MEDLEY_ADAPTER_BYTES",
    "MEDLEY_ADAPTER_SLOTS",
    "MEDLEY_ADAPTER_HOST_BYTES",
    "MEDLEY_GPU_SHARE",
    "MEDLEY_MAX_TPOT_MS",
    "MEDLEY_BATCH_INVARIANT",
    "MEDLEY_TENSOR_PARALLEL",
    "MEDLEY_SLEEP",
    "MEDLEY_STORE_CACHE_DIR",
    "MEDLEY_STORE_CACHE_BYTES",
)

# Of the dispatcher: whom it calls when the pool should grow or may shrink, and where metrics are served.
_SCALE_KNOBS = (
    "MEDLEY_SCALE_HOOK",
    "MEDLEY_SCALE_HOOK_SECRET",
    "MEDLEY_SCALE_WAIT_S",
    "MEDLEY_SCALE_RELEASE_AFTER_S",
    "MEDLEY_SCALE_REPEAT_S",
    "MEDLEY_METRICS_HOST",
    "MEDLEY_METRICS_PORT",
)

Yaml = dict[str, Any]


def compose() -> Yaml:
    """The whole file as plain data."""
    services: Yaml = {"postgres": _postgres(), "redis": _redis()}
    for spec in PROCESSES:
        if not spec.profiles:
            services[spec.name] = _service(spec)
        for profile in spec.profiles:
            name = spec.name if profile == "gpu" else f"{spec.name}-{profile}"
            services[name] = _service(spec, profile)
    names = [_SUPERUSER_PASSWORD, *_PASSWORDS.values(), _REDIS_PASSWORD]
    secrets = {name: {"file": "${MEDLEY_SECRETS_DIR:-./secrets}/" + name} for name in names}
    return {"services": services, "volumes": {"postgres": {}, "store": {}}, "secrets": secrets}


def render() -> str:
    """The file's text."""
    return _HEADER + "\n" + "\n".join(_lines(compose(), 0)) + "\n"


def _postgres() -> Yaml:
    scripts = "./app/medley/local"
    init = "/docker-entrypoint-initdb.d"
    settings = {"shared_buffers": f"{SHARED_BUFFERS_MB}MB", **DISCREET}
    return {
        "image": "postgres:18",
        "command": ["postgres", *(part for item in settings.items() for part in ("-c", "=".join(item)))],
        "environment": {"POSTGRES_PASSWORD_FILE": f"{_SECRETS}/{_SUPERUSER_PASSWORD}"},
        "secrets": [_SUPERUSER_PASSWORD, _PASSWORDS["medley_owner"]],
        "volumes": [
            "postgres:/var/lib/postgresql",
            f"{scripts}/owner.sql:{init}/10-owner.sql:ro",
            f"{scripts}/owner_password.sql:{init}/20-owner-password.sql:ro",
        ],
        # Over TCP: while the image initialises its data, the server listens on its socket only.
        "healthcheck": _check(["pg_isready", "-h", "127.0.0.1", "-U", "medley_owner", "-d", "medley"]),
        "shm_size": "256m",
        "restart": "unless-stopped",
    }


def _redis() -> Yaml:
    # By a file of its own: a command line is there for all to read. Compose takes $$ for $.
    password = f'"$$(cat {_SECRETS}/{_REDIS_PASSWORD})"'
    config = f"umask 077; echo requirepass {password} > /tmp/redis.conf; chown redis /tmp/redis.conf"
    flags = "--save '' --appendonly no --maxmemory-policy noeviction"
    return {
        "image": "redis:7",
        "command": ["sh", "-c", f"{config}; exec docker-entrypoint.sh redis-server /tmp/redis.conf {flags}"],
        "secrets": [_REDIS_PASSWORD],
        "healthcheck": _check(["sh", "-c", f"REDISCLI_AUTH={password} redis-cli ping"]),
        "restart": "unless-stopped",
    }


def _service(spec: ProcessSpec, profile: str | None = None) -> Yaml:
    service: Yaml = {
        **_image(spec, profile),
        "command": ["medley", spec.name],
        "environment": _environment(spec, profile),
        "secrets": _secrets(spec),
        "depends_on": {
            name: {"condition": "service_completed_successfully" if name == "migrate" else "service_healthy"}
            for name in spec.after
        },
        "restart": "no" if spec.health is Health.EXIT else "unless-stopped",
    }
    if spec.health is Health.EXIT:
        return service
    service["volumes"] = [f"store:{_STORE}", f"${{MEDLEY_MODEL_DIR:?}}:{_MODEL}:ro"]
    service["healthcheck"] = _check(["medley", "health", spec.name])
    service["stop_grace_period"] = f"{spec.stop_grace_s:g}s"
    if spec.serves_port:
        service["ports"] = ["${MEDLEY_PUBLISH:-127.0.0.1:8700}:" + str(_PORT)]
    if profile is not None:
        service["profiles"] = [profile]
    if profile == "gpu":
        device = {"driver": "nvidia", "count": "${MEDLEY_TENSOR_PARALLEL:-1}", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        service["shm_size"] = "1g"  # by which the ranks of a model on several GPUs find each other
    return service


def _image(spec: ProcessSpec, profile: str | None) -> Yaml:
    if spec.image == "app":
        return {"image": "medley-app", "build": {"context": ".", "dockerfile": "app/Dockerfile"}}
    args = {"BASE": _CUDA_BASE, "EXTRAS": "cuda"} if profile == "gpu" else {"TORCH_INDEX": _TORCH_CPU_INDEX}
    build = {"context": ".", "dockerfile": "workers/Dockerfile", "args": args}
    return {"image": f"medley-worker-{profile}", "build": build}


def _environment(spec: ProcessSpec, profile: str | None) -> dict[str, str]:
    env = {
        "MEDLEY_DATABASE_URL": f"postgresql+psycopg://{spec.role}@postgres:5432/medley",
        "MEDLEY_DATABASE_PASSWORD_FILE": f"{_SECRETS}/{_PASSWORDS[spec.role]}",
        "MEDLEY_REDIS_URL": "redis://redis:6379/0",
        "MEDLEY_REDIS_PASSWORD_FILE": f"{_SECRETS}/{_REDIS_PASSWORD}",
        "MEDLEY_PLAINTEXT_HOSTS": "postgres,redis",
        "MEDLEY_STORE_URL": "${MEDLEY_STORE_URL:-file://" + _STORE + "}",
        "MEDLEY_LOG_FORMAT": "json",
    }
    if spec.health is Health.EXIT:
        # The first migration makes the other two roles.
        others = {role: name for role, name in _PASSWORDS.items() if role != spec.role}
        return env | {f"{role.upper()}_PASSWORD_FILE": f"{_SECRETS}/{name}" for role, name in others.items()}
    env |= {key: "${" + key + ":-}" for key in _STORE_KEYS}
    env["MEDLEY_MODEL"] = _MODEL
    env["MEDLEY_MODEL_NAME"] = "${MEDLEY_MODEL_NAME:-}"
    if spec.health is Health.BEAT:
        env["MEDLEY_HEALTH_FILE"] = _BEAT
    if spec.name == "dispatcher":
        env |= {key: "${" + key + ":-}" for key in _SCALE_KNOBS}
    if spec.serves_port:
        env |= {"MEDLEY_HOST": "0.0.0.0", "MEDLEY_PORT": str(_PORT)}
    if profile is not None:
        device, dtype = ("cuda", "bfloat16") if profile == "gpu" else ("cpu", "float32")
        env |= {"MEDLEY_DEVICE": device, "MEDLEY_DTYPE": dtype}
        env |= {key: "${" + key + ":-}" for key in _WORKER_KNOBS}
    return env


def _secrets(spec: ProcessSpec) -> list[str]:
    roles = list(_PASSWORDS.values()) if spec.health is Health.EXIT else [_PASSWORDS[spec.role]]
    return [*roles, _REDIS_PASSWORD]


def _check(command: list[str]) -> Yaml:
    return {
        "test": ["CMD", *command],
        "interval": "5s",
        "timeout": "10s",
        "retries": 6,
        "start_period": "60s",
    }


def _lines(value: Yaml, depth: int) -> list[str]:
    """Block style for mappings; lists and scalars as JSON, which YAML holds."""
    lines = []
    for key, item in value.items():
        head = "  " * depth + f"{key}:"
        if isinstance(item, dict) and item:
            lines += [head, *_lines(item, depth + 1)]
        else:
            lines.append(f"{head} {json.dumps(item)}")
        if depth == 1 and isinstance(item, dict) and "image" in item:
            lines.append("")
    return lines


if __name__ == "__main__":
    sys.stdout.write(render())
