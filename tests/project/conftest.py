"""Where the project lies, and how to run Python on it in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


OWNERS = {"softhouse": "python", "hospital": "icd10", "lawfirm": "licences"}
SENTENCES = {
    "python": "def main(argv: list[str]) -> int:\n    return len(argv)\n",
    "icd10": "K35.8 Other and unspecified acute appendicitis without perforation\n",
    "licences": "The licensee shall indemnify the licensor against every claim. ",
    "public": "It was a bright cold day in April, and the clocks were striking thirteen. ",
}


def _run(folder: Path, *args: str) -> str:
    """Call the command line in this process from ``folder``."""
    from typer.testing import CliRunner

    from pipelines.cli.app import app

    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, args, prog_name="coterie")
    finally:
        os.chdir(before)
    assert result.exit_code == 0, f"coterie {' '.join(args)}\n{result.output}"
    return result.stdout


@pytest.fixture(scope="session")
def run_coterie() -> Callable[..., str]:
    """run_coterie(folder, "list") returns what was printed; fails where the command does."""
    return _run


@pytest.fixture(scope="session")
def workplace(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as a reader of the documents has after `make demo`, on a pico model; never to be changed.

    Holds ``smollm2`` (the base), ``examples`` with text, ``demo-out`` with registry, experts and composed folder,
    ``adapter`` (a PEFT folder), ``law.jsonl``, ``retriever`` (a composed one) and ``manuals.jsonl``.
    """
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(pico.base(), folder / "smollm2")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "examples" / "data").mkdir()
    for domain, sentence in SENTENCES.items():
        lines = (json.dumps({"text": sentence * count}) + "\n" for count in range(4, 10))
        (folder / "examples" / "data" / f"{domain}.jsonl").write_text("".join(lines))
    shutil.copy(folder / "examples" / "data" / "licences.jsonl", folder / "law.jsonl")
    _shorten_jobs(folder, coordination="true")  # the demo's experts have rows too, for the learned scorer
    _make_demo(folder)
    _shorten_jobs(folder, coordination="false")
    shutil.copytree(folder / "demo-out" / "experts" / "lawfirm" / "licences", folder / "adapter")
    for name in ("card.json", "routing.safetensors"):
        (folder / "adapter" / name).unlink()
    _make_retriever(folder, pico)
    return folder


def _shorten_jobs(folder: Path, *, coordination: str) -> None:
    for job in sorted((ROOT / "examples" / "jobs").glob("*.yaml")):
        text = job.read_text()
        for field, value in {
            "steps": "2",
            "sequence_length": "16\nheld_out_windows: 2",
            "coordination": coordination,
        }.items():
            text = re.sub(rf"^{field}: \w+", f"{field}: {value}", text, flags=re.M)
        (folder / "examples" / "jobs" / job.name).write_text(text)


def _make_retriever(folder: Path, pico: Any) -> None:
    """Compose two owners' retrievers on the pico embedder, and write documents of theirs to search in."""
    from composer import Manifest, build, plan
    from registry import Registry

    store = Registry(pico.scratch("registry"))
    store.add_base(pico.embedder(), name="embedder")
    documents = []
    for seed, owner in enumerate(("hospital", "softhouse"), start=1):
        raw = pico.write_retriever(pico.scratch("raw"), seed=seed)
        artifacts = pico.retrieval_artifacts(seed)
        store.register(pico.pack_retriever(raw, name=f"{owner}/search", artifacts=artifacts))
        texts = enumerate(pico.domain_texts(seed, count=4))
        documents += [{"_id": f"{owner}-{n}", "text": text, "owner": owner} for n, text in texts]
    manifest = Manifest.from_dict(
        {
            "name": "retriever",
            "recipe": "router_retriever",
            "base": "embedder",
            "experts": ["hospital/search", "softhouse/search"],
        }
    )
    build(plan(manifest, store), folder / "retriever", registry=store)
    lines = (json.dumps(document) + "\n" for document in documents)
    (folder / "manuals.jsonl").write_text("".join(lines))


def _make_demo(folder: Path) -> None:
    registry = ("--registry", "demo-out/registry")
    data = "examples/data/public.jsonl"
    (folder / "demo-out").mkdir()
    _run(folder, *registry, "base", "add", "smollm2", "--name", "smollm2")
    _run(folder, *registry, "base", "public-routing", "smollm2", "--text", data, "--rows")
    jobs = [f"examples/jobs/{owner}.yaml" for owner in OWNERS]
    _run(folder, *registry, "train", *jobs, "--local", "--threads", "1", "--out", "demo-out/experts")
    for owner, expert in OWNERS.items():
        _run(folder, *registry, "register", f"demo-out/experts/{owner}/{expert}")
    _run(folder, *registry, "build", "examples/manifest.yaml", "demo-out/composed")
