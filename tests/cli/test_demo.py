"""demo: where its results go and which registry it uses; the run itself is tested with ``pipelines.demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

Seen = dict[str, Any]


class Report:
    """Stands in for the report of a run."""

    def to_dict(self) -> dict[str, int]:
        return {"nll": 1}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    import pipelines.demo.run

    calls: Seen = {}

    def run_demo(out: Path, **options: Any) -> Report:
        calls.update(options, out=out)
        options["console"].print("a table")
        return Report()

    monkeypatch.setattr(pipelines.demo.run, "run_demo", run_demo)
    return calls


def test_its_own_registry_by_default(run: Any, seen: Seen, tmp_path: Path) -> None:
    """The variable names the user's own registry, which a demonstration must not fill."""
    outcome = run("demo", "--out", tmp_path / "out", "--quick")
    assert (outcome.code, outcome.out, outcome.err) == (0, "a table\n", "")
    assert (seen["out"], seen["registry"], seen["quick"]) == (tmp_path / "out", None, True)


def test_a_registry_named_on_the_command_line(run: Any, seen: Seen, tmp_path: Path) -> None:
    assert run("demo", "--out", tmp_path / "out", registry=tmp_path / "r").code == 0
    assert seen["registry"].path == tmp_path / "r"
    assert run("demo", "--out", tmp_path / "out", "--registry", tmp_path / "s").code == 0
    assert seen["registry"].path == tmp_path / "s"


def test_json(run: Any, seen: Seen) -> None:
    outcome = run("demo", "--json")
    assert (outcome.code, outcome.json, outcome.err) == (0, {"nll": 1}, "a table\n")
    assert seen["out"] == Path("demo-out")


def test_a_folder_of_somebody_else(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    outcome = run("demo", "--out", tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"Error: '{tmp_path}' exists and was not made by the demo. Choose another folder with --out, or remove it.\n"
    )
    assert (tmp_path / "mine.txt").read_text() == "precious"
