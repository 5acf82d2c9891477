"""What the service never does, held for every file of it: no pickle, no code from data, no fetch of a given URL."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])

# Modules whose data is code, and clients that fetch whatever URL they are given.
FORBIDDEN_MODULES = {
    "pickle": "runs code from data",
    "_pickle": "runs code from data",
    "cPickle": "runs code from data",
    "cloudpickle": "runs code from data",
    "dill": "runs code from data",
    "joblib": "reads pickles",
    "multiprocessing": "pickles what it sends",
    "torch.multiprocessing": "pickles what it sends",
    "shelve": "reads pickles",
    "marshal": "crashes on data",
    "yaml": "builds objects from data; the service has JSON",
    "transformers": "runs code from model folders; a tests' judge only",
    "urllib.request": "fetches URLs, files too",
    "requests": "fetches URLs",
    "aiohttp": "fetches URLs",
    "xml": "expands entities",
}
# What speaks HTTP as a client: to the service's own address, and to endpoints that are judged before each request.
HTTPX_AT_HOME = ("app/medley/client/", "app/medley/cli/", "app/medley/endpoints.py")
FORBIDDEN_CALLS = {
    "eval": "runs code from data",
    "exec": "runs code from data",
    "compile": "makes code from data",
    "__import__": "imports by a computed name",
    "torch.load": "reads pickles",
    "torch.hub.load": "fetches code",
    "torch.jit.load": "reads archives of code",
    "torch.compile": "makes code; kernels are built ahead of time",
    "numpy.load": "may read pickles",
    "np.load": "may read pickles",
    "yaml.load": "builds objects from data",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "tempfile.mktemp": "is a race",
}
FORBIDDEN_KEYWORDS = {
    ("trust_remote_code", True): "runs code from a model folder",
    ("allow_pickle", True): "reads pickles",
    ("weights_only", False): "reads pickles",
    ("shell", True): "runs a shell",
    ("verify", False): "takes any certificate",
}
FORBIDDEN_NAMES = {"CERT_NONE": "takes any certificate", "_create_unverified_context": "takes any certificate"}
# torch's collectives over Python objects.
for _name in (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
):
    FORBIDDEN_NAMES[_name] = "pickles what it sends"
    FORBIDDEN_MODULES[f"torch.distributed.{_name}"] = "pickles what it sends"


def faults(source: str, path: str) -> Iterator[str]:
    """`path:line: what: why` for everything in `source` that is forbidden."""
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name, where, path)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield from _module(f"{node.module}.{alias.name}", where, path)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"{where}: {name}: {FORBIDDEN_CALLS[name]}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if why := FORBIDDEN_KEYWORDS.get((keyword.arg or "", value)):  # type: ignore[call-overload]
                    yield f"{where}: {keyword.arg}={value}: {why}"
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NAMES:
            yield f"{where}: {node.attr}: {FORBIDDEN_NAMES[node.attr]}"


def _module(name: str, where: str, path: str) -> Iterator[str]:
    for module, why in FORBIDDEN_MODULES.items():
        if name == module or name.startswith(f"{module}."):
            yield f"{where}: {module}: {why}"
    if name.split(".")[0] in ("httpx", "urllib3") and not path.startswith(HTTPX_AT_HOME):
        yield f"{where}: {name}: only the client and the sender of webhooks speak HTTP as one"


def test_no_file_of_the_service_does_what_is_forbidden() -> None:
    assert len(FILES) > 150
    found = [fault for file in FILES for fault in faults(file.read_text(), file.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml as y",
        "import urllib.request",
        "from urllib import request",
        "from xml.etree import ElementTree",
        "import httpx",
        "eval('1')",
        "exec(text)",
        "torch.load(path, weights_only=True)",
        "torch.hub.load('a')",
        "np.load(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.lib.format.read_array(f, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "ssl.CERT_NONE",
        "from multiprocessing import Queue",
        "torch.distributed.broadcast_object_list(said)",
        "from torch.distributed import all_gather_object",
    ],
)
def test_each_of_them_would_be_found(source: str) -> None:
    assert list(faults(source, "app/medley/api/new.py")) != []


def test_what_only_looks_like_it_is_not() -> None:
    source = (
        "import json\nmodel.eval()\nre.compile('a')\nself.load(path)\nrun(trust_remote_code=False)\ntext = 'pickle'"
    )
    assert list(faults(source, "app/medley/api/new.py")) == []
