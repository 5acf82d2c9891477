"""compose.yaml, made from the table of processes: `python -m medley.local.compose > compose.yaml`.

A test compares the file in the repository with what this prints, so the two cannot drift. It knows images,
volumes and secrets; what a process is and needs comes from `processes.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from medley.local.processes import PROCESSES, Health, ProcessSpec

_HEADER = """\
# Medley on one or more hosts. Made from app/medley/local/processes.py: change that, then run
#   python -m medley.local.compose > compose.yaml
#
# Needed in the environment (or .env); there are no defaults, and passwords must need no escaping in a URL:
#   MEDLEY_SUPERUSER_PASSWORD MEDLEY_OWNER_PASSWORD MEDLEY_API_PASSWORD MEDLEY_WORK_PASSWORD
#   MEDLEY_REDIS_PASSWORD MEDLEY_MODEL_DIR (the base model's folder on this host)
# Start:  docker compose --profile gpu up --build   (or --profile cpu)
# A key:  docker compose run --rm migrate medley tenants add NAME
"""
_PORT = 8700
_MODEL = "/model"
_STORE = "/var/lib/medley/store"
_BEAT = "/tmp/medley.beat"
_PASSWORDS = {
    "medley_owner": "MEDLEY_OWNER_PASSWORD",
    "medley_api": "MEDLEY_API_PASSWORD",
    "medley_work": "MEDLEY_WORK_PASSWORD",
}
# Of the CUDA version that torch's own wheels are built for: FlashInfer links what it builds to this one's runtime.
_CUDA_BASE = "nvidia/cuda:13.0.2-devel-ubuntu24.04"
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Engine knobs an operator may set; an empty value counts as not set.
_WORKER_KNOBS = (
    "MEDLEY_MAX_NUM_SEQS",
    "MEDLEY_MAX_MODEL_LEN",
    "MEDLEY_MAX_NUM_BATCHED_TOKENS",
    "MEDLEY_KV_CACHE_BYTES",
    "MEDLEY_ADAPTER_BYTES",
    "MEDLEY_ADAPTER_SLOTS",
    "MEDLEY_ADAPTER_HOST_BYTES",
    "MEDLEY_MAX_TPOT_MS",
    "MEDLEY_BATCH_INVARIANT",
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
    return {"services": services, "volumes": {"postgres": {}, "store": {}}}


def render() -> str:
    """The file's text."""
    return _HEADER + "\n" + "\n".join(_lines(compose(), 0)) + "\n"


def _secret(key: str) -> str:
    return "${" + key + ":?}"


def _postgres() -> Yaml:
    scripts = "./app/medley/local"
    init = "/docker-entrypoint-initdb.d"
    return {
        "image": "postgres:18",
        "environment": {
            "POSTGRES_PASSWORD": _secret("MEDLEY_SUPERUSER_PASSWORD"),
            "MEDLEY_OWNER_PASSWORD": _secret("MEDLEY_OWNER_PASSWORD"),
        },
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
    password = _secret("MEDLEY_REDIS_PASSWORD")
    flags = ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", "--requirepass", password]
    return {
        "image": "redis:7",
        "command": ["redis-server", *flags],
        "environment": {"REDISCLI_AUTH": password},
        "healthcheck": _check(["redis-cli", "ping"]),
        "restart": "unless-stopped",
    }


def _service(spec: ProcessSpec, profile: str | None = None) -> Yaml:
    service: Yaml = {
        **_image(spec, profile),
        "command": ["medley", spec.name],
        "environment": _environment(spec, profile),
        "depends_on": {
            name: {"condition": "service_completed_successfully" if name == "migrate" else "service_healthy"}
            for name in spec.after
        },
        "restart": "no" if spec.health is Health.EXIT else "unless-stopped",
    }
    if spec.health is Health.EXIT:
        return service
    service["volumes"] = [f"store:{_STORE}", f"{_secret('MEDLEY_MODEL_DIR')}:{_MODEL}:ro"]
    service["healthcheck"] = _check(["medley", "health", spec.name])
    service["stop_grace_period"] = f"{spec.stop_grace_s:g}s"
    if spec.serves_port:
        service["ports"] = ["${MEDLEY_PUBLISH:-127.0.0.1:8700}:" + str(_PORT)]
    if profile is not None:
        service["profiles"] = [profile]
    if profile == "gpu":
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _image(spec: ProcessSpec, profile: str | None) -> Yaml:
    if spec.image == "app":
        return {"image": "medley-app", "build": {"context": ".", "dockerfile": "app/Dockerfile"}}
    args = {"BASE": _CUDA_BASE, "EXTRAS": "cuda"} if profile == "gpu" else {"TORCH_INDEX": _TORCH_CPU_INDEX}
    build = {"context": ".", "dockerfile": "workers/Dockerfile", "args": args}
    return {"image": f"medley-worker-{profile}", "build": build}


def _environment(spec: ProcessSpec, profile: str | None) -> dict[str, str]:
    password = _secret(_PASSWORDS[spec.role])
    env = {
        "MEDLEY_DATABASE_URL": f"postgresql+psycopg://{spec.role}:{password}@postgres:5432/medley",
        "MEDLEY_REDIS_URL": f"redis://:{_secret('MEDLEY_REDIS_PASSWORD')}@redis:6379/0",
        "MEDLEY_STORE_URL": f"file://{_STORE}",
        "MEDLEY_LOG_FORMAT": "json",
    }
    if spec.health is Health.EXIT:
        # The first migration makes the other two roles.
        return env | {key: _secret(key) for role, key in _PASSWORDS.items() if role != spec.role}
    env["MEDLEY_MODEL"] = _MODEL
    if spec.health is Health.BEAT:
        env["MEDLEY_HEALTH_FILE"] = _BEAT
    if spec.serves_port:
        env |= {"MEDLEY_HOST": "0.0.0.0", "MEDLEY_PORT": str(_PORT)}
    if profile is not None:
        device, dtype = ("cuda", "bfloat16") if profile == "gpu" else ("cpu", "float32")
        env |= {"MEDLEY_DEVICE": device, "MEDLEY_DTYPE": dtype}
        env |= {key: "${" + key + ":-}" for key in _WORKER_KNOBS}
    return env


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
