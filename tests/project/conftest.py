"""Where the project lies, and how to run Python on it in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("experts", "registry", "composer", "pipelines")

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def packages() -> tuple[str, ...]:
    return PACKAGES


@pytest.fixture(scope="session")
def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.fixture(scope="session")
def python() -> Python:
    """Run the interpreter: python("-m", "pipelines.cli", cwd=..., path=[...]); ``path`` goes before the project."""

    def run(*args: str, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
            "COTERIE_REGISTRY": str(cwd / "no-registry"),
            "COLUMNS": "100",
        }
        return subprocess.run(
            [sys.executable, *args],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def run_help() -> Callable[[list[str]], str]:
    """Return the help page of a command, called in this process."""
    from typer.testing import CliRunner

    from pipelines.cli.app import app

    def page(path: list[str]) -> str:
        result = CliRunner().invoke(app, [*path, "--help"], prog_name="coterie", env={"COLUMNS": "100"})
        assert result.exit_code == 0, result.output
        return result.output

    return page
