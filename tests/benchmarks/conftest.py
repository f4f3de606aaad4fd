"""Runs the benchmark scripts at a tiny size, as ``make bench`` runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


# one process for all: each would import torch, transformers and mergekit anew. Every measurement begins with a garbage
# collection, which need not go through these again and again
_RUN = """
import gc
import runpy
import sys
gc.callbacks.append(lambda phase, info: gc.freeze() if phase == "stop" and info["generation"] == 2 else None)
folder, work, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    print(f"== {name}", flush=True)
    sys.argv = [name, "--tiny", "--rounds", "1", "--out", f"{work}/{name}/out/{name}.json", "--work", f"{work}/{name}"]
    runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], str]]:
    """What each benchmark of the module's table ``FIGURES`` writes and prints."""
    names = list(request.module.FIGURES)
    work = tmp_path_factory.mktemp("benchmarks")
    for name in names:
        (work / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(ROOT / "benchmarks"), str(work), *names],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for part in done.stdout.split("== ")[1:]:
        name = part.split("\n", 1)[0]
        assert [path.name for path in (work / name).iterdir()] == ["out"], "the temporary folder is removed"
        found[name] = (json.loads((work / name / "out" / f"{name}.json").read_text()), part)
    return found


@pytest.fixture
def bench(written: dict[str, tuple[dict[str, Any], str]]) -> Callable[[str], dict[str, Any]]:
    """Return what a benchmark writes: bench("compose")."""

    def run(name: str) -> dict[str, Any]:
        data, printed = written[name]
        for figure in data["figures"]:
            assert figure in printed
        return data

    return run


@pytest.fixture(scope="session")
def common() -> ModuleType:
    """The module that the benchmarks share."""
    spec = importlib.util.spec_from_file_location("_common", ROOT / "benchmarks" / "_common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_common"] = module
    spec.loader.exec_module(module)
    return module
