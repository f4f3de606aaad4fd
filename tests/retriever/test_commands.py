"""The command line on retrievers: planned, built, proved, changed; what needs a language model is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

Command = Callable[..., Result]


@pytest.fixture
def command(pico: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    from pipelines.cli.app import app

    monkeypatch.chdir(tmp_path)
    registry = str(pico.retriever_library().path)

    def run(*words: str) -> Result:
        return CliRunner().invoke(
            app, ["--registry", registry, *words], prog_name="coterie", env={"COLUMNS": "120"}
        )

    return run


def test_plan_build_prove_and_change(retrievers: Any, command: Command, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(retrievers.manifest(selector="top1").to_dict()))
    planned = command("plan", "m.yaml")
    assert planned.exit_code == 0, planned.output
    assert "router:        lda on the embedding, top1\n" in planned.stdout
    assert "opt-out class: exact\n" in planned.stdout
    built = command("build", "m.yaml", "out")
    assert built.exit_code == 0, built.output
    assert "3 experts of acme, bob, zoe on embedder" in built.output
    assert command("remove", "out", "bob").exit_code == 0
    proved = command("verify-optout", "out", "--owner", "acme")
    assert proved.exit_code == 0, proved.output
    assert [line.split()[:4] for line in proved.stdout.splitlines()[1:]] == [
        ["acme", door, "0.0e+00", "yes"] for door in ("build", "load", "request")
    ]
    assert command("add", "out", "bob/search").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "FOLDER", "--prompt", "a"],
        ["attribute", "FOLDER", "--prompt", "a"],
        ["export", "FOLDER", "stock", "--to", "mixtral"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_a_language_model(retrievers: Any, command: Command, words: list[str]) -> None:
    folder = str(retrievers.folder())
    found = command(*(folder if word == "FOLDER" else word for word in words))
    assert found.exit_code == 2
    assert " ".join(found.stderr.split()) == (
        f"Error: {folder} is a retriever (recipe 'router_retriever'): it encodes texts and predicts none. Search with "
        "it: coterie index, coterie search; measure it: coterie evaluate."
    )
