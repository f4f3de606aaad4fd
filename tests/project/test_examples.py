"""Every example is valid as it is, and every manifest builds and runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted(path.name for path in (ROOT / "examples").glob("*.yaml"))
JOBS = sorted(path.name for path in (ROOT / "examples" / "jobs").glob("*.yaml"))


def test_there_are_examples() -> None:
    assert (len(MANIFESTS), len(JOBS)) == (5, 3)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_builds_and_runs(
    name: str, workplace: Path, run_coterie: Callable[..., str], tmp_path: Path
) -> None:
    import torch

    import composer

    registry = ("--registry", "demo-out/registry")
    run_coterie(workplace, *registry, "plan", f"examples/{name}")
    run_coterie(workplace, *registry, "build", f"examples/{name}", str(tmp_path / "out"))
    model = composer.load(tmp_path / "out")
    logits = model(torch.arange(12)[None]).logits
    assert logits.isfinite().all()
    expected = (
        {"hospital", "softhouse"} if "without-lawfirm" in name else {"hospital", "lawfirm", "softhouse"}
    )
    assert set(model.owners) == expected


@pytest.mark.parametrize("name", JOBS)
def test_job_is_valid_as_it_is(name: str, tmp_path: Path, workplace: Path) -> None:
    from pipelines.train import DomainJob

    shutil.copytree(ROOT / "examples" / "jobs", tmp_path / "jobs")
    shutil.copytree(workplace / "examples" / "data", tmp_path / "data")
    job = DomainJob.from_file(tmp_path / "jobs" / name)
    assert job.owner == name.removesuffix(".yaml")
    assert job.base == "smollm2"


def test_every_example_is_explained(root: Path) -> None:
    for path in (root / "examples").rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_examples_name_the_experts_of_the_demo() -> None:
    """What the comments promise: the demo's registry holds the experts that the manifests name."""
    import ast

    settings = ast.parse((ROOT / "pipelines" / "demo" / "settings.py").read_text())
    strings: list[Any] = [node.value for node in ast.walk(settings) if isinstance(node, ast.Constant)]
    for owner, expert in (("softhouse", "python"), ("hospital", "icd10"), ("lawfirm", "licences")):
        assert owner in strings
        assert expert in strings
