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


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return what a benchmark writes: bench("compose")."""

    def run(name: str) -> dict[str, Any]:
        work = tmp_path_factory.mktemp(name)
        out = work / "out" / f"{name}.json"
        script = ROOT / "benchmarks" / f"{name}.py"
        done = subprocess.run(
            [sys.executable, str(script), "--tiny", "--rounds", "1", "--out", str(out), "--work", str(work)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(path.name for path in work.iterdir()) == ["out"], "the temporary folder is removed"
        data = json.loads(out.read_text())
        for figure in data["figures"]:
            assert figure in done.stdout
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
