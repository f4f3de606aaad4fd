"""Training for experiments: what is packed is not trained again, and one failed job costs the others nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import pipelines.train
from experts.card import CARD_FILE
from experts.errors import TrainingError
from pipelines.experiments.training import train_and_register
from pipelines.train.hub import JobOutcome
from pipelines.train.progress import Progress


@pytest.fixture
def packed(pico: Any, tmp_path: Path) -> Path:
    """A folder of packed experts that no registry has yet: one, of acme."""
    raw = pico.write_ffn(pico.scratch("raw"), family="llama", seed=1, layers=(0, 1))
    package = pico.pack(raw, name="acme/fresh", family="llama")
    out = tmp_path / "experts"
    shutil.copytree(package, out / "acme/fresh")
    return out


def _not_wanted() -> Any:
    raise AssertionError("a job was made for an expert that is there already")


def _outcome(
    name: str, *, folder: Path | None = None, error: str | None = None, message: str | None = None
) -> JobOutcome:
    final = Progress(name=name, stage="done", scalars={})
    return JobOutcome(name=name, folder=folder, error=error, message=message, log=Path("log"), final=final)


def test_a_packed_folder_is_registered_and_not_trained_again(pico: Any, packed: Path) -> None:
    registry = pico.fresh_library()
    for _ in range(2):  # the second time it is known
        train_and_register(
            {"acme/fresh": _not_wanted},
            registry=registry,
            out_dir=packed,
            runner="local",
            tell=lambda _: None,
        )
        assert "acme/fresh" in {record.name for record in registry.experts()}


def test_experts_of_finished_jobs_are_kept_when_another_fails(
    pico: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = pico.fresh_library()
    elsewhere = packed / "acme/fresh"
    outcomes = [
        _outcome("acme/fresh", folder=elsewhere),
        _outcome("bell/late", error="DataError", message="there is no text"),
    ]
    monkeypatch.setattr(pipelines.train, "train_jobs", lambda jobs, **_: outcomes)
    assert (elsewhere / CARD_FILE).is_file()
    with pytest.raises(TrainingError, match="bell/late: there is no text"):
        train_and_register(
            {"acme/fresh": lambda: None, "bell/late": lambda: None},  # type: ignore[arg-type,return-value]
            registry=registry,
            out_dir=packed.with_name("other"),
            runner="local",
            tell=lambda _: None,
        )
    assert "acme/fresh" in {record.name for record in registry.experts()}
