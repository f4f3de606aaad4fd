"""train: job files in, expert folders out, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.board import job_cells
from pipelines.train.progress import Progress

WriteJob = Callable[..., Path]


@pytest.fixture
def write_job(tmp_path: Path, texts: dict[str, Path]) -> WriteJob:
    def write(name: str = "acme/contracts", *, domain: str = "law", **fields: object) -> Path:
        lines = {
            "name": name,
            "domain": domain,
            "license": "Apache-2.0",
            "base": "pico",
            "data": texts[domain],
            "rank": 2,
            "sequence_length": 16,
            "steps": 4,
            "checkpoint_every": 1,
            "held_out_windows": 2,
            "workdir": tmp_path / "private",
        } | fields
        path = tmp_path / f"{name.replace('/', '-')}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return path

    return write


def test_local(run: Any, filled: Path, registry: Path, write_job: WriteJob, tmp_path: Path) -> None:
    jobs = (write_job(), write_job("hosp/new", domain="medicine"))
    outcome = run("train", *jobs, "--local", "--threads", 1, "--out", tmp_path / "trained", registry=registry)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["EXPERT", "TOKENS", "TOKENS/S", "ANCHOR", "NLL", "EXPERT", "NLL", "FOLDER"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [
        ("acme/contracts", f"{tmp_path}/trained/acme/contracts"),
        ("hosp/new", f"{tmp_path}/trained/hosp/new"),
    ]
    stages = outcome.err.splitlines()
    assert stages[0].startswith("acme/contracts: ")
    assert stages[-1] == "hosp/new: done"
    assert (
        run("register", tmp_path / "trained" / "acme" / "contracts", "--json", registry=registry).json[
            "version"
        ]
        == 2
    )
    assert (
        run("register", tmp_path / "trained" / "hosp" / "new", "--json", registry=registry).json["version"]
        == 1
    )


def test_json(run: Any, filled: Path, write_job: WriteJob, tmp_path: Path) -> None:
    outcome = run("train", write_job(), "--local", "--json", "--out", tmp_path / "t", registry=filled)
    (row,) = outcome.json
    assert list(row) == ["name", "folder", "error", "message", "log", "scalars", "device"]
    assert (row["name"], row["folder"], row["error"]) == (
        "acme/contracts",
        f"{tmp_path}/t/acme/contracts",
        None,
    )
    assert row["scalars"]["step"] == row["scalars"]["steps"] == 4


def test_an_interrupted_job_resumes(
    run: Any, filled: Path, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.cli.train as command

    @contextmanager
    def interrupting(names: Sequence[str]) -> Iterator[Callable[[Progress], None]]:
        def report(progress: Progress) -> None:
            if progress.scalars.get("step", 0) >= 1:
                raise KeyboardInterrupt

        yield report

    job = write_job(steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(command, "job_board", interrupting)
        outcome = run("train", job, "--local", "--out", tmp_path / "t", registry=filled)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == (
        "Interrupted: finished experts and the last checkpoints are kept; the same command goes on from there.\n"
    )
    assert not (tmp_path / "t" / "acme" / "contracts").exists()
    again = run("train", job, "--local", "--json", "--out", tmp_path / "t", registry=filled)
    assert again.code == 0, again.err
    assert again.json[0]["scalars"]["resumed_from"] >= 1


def test_a_dry_run_says_what_is_trained_where(
    run: Any, filled: Path, write_job: WriteJob, tmp_path: Path
) -> None:
    jobs = (write_job(device="cpu"), write_job("hosp/new", domain="medicine", device="cpu", layers="0-1"))
    outcome = run("train", *jobs, "--dry-run", "--out", "trained", registry=filled)
    assert outcome.code == 0, outcome.err
    heading, *lines = [line.split() for line in outcome.out.splitlines()]
    assert heading == ["EXPERT", "KIND", "BASE", "LAYERS", "STEPS", "TOKENS", "DEVICE", "FOLDER"]
    assert [line[0] for line in lines] == ["acme/contracts", "hosp/new"]
    assert lines[1][3:] == ["0-1", "4", "256", "cpu,", "float32", "trained/hosp/new"]
    plans = run("train", *jobs, "--dry-run", "--json", registry=filled).json
    assert [(plan["device"], plan["dtype"], plan["finished"]) for plan in plans] == [
        ("cpu", "float32", False)
    ] * 2
    assert not (tmp_path / "private").exists()


def test_a_gpu_that_is_not_there_is_bad_input(
    run: Any, filled: Path, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = run("train", write_job(device="cuda:4"), "--out", tmp_path / "t", registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "Error: device: cuda:4 is not there; this machine has cuda:0. Write device: cpu, or auto, which takes what "
        "there is.\n"
    )
    assert not (tmp_path / "private").exists()


def test_every_mistake_of_every_file(run: Any, filled: Path, write_job: WriteJob, tmp_path: Path) -> None:
    first = write_job(ranc=3, steps=0)
    second = write_job("hosp/icd", domain="medicine", license="none-such")
    outcome = run("train", first, second, registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Error: 2 job files have mistakes:\n  - job acme-contracts.yaml")
    assert all(word in outcome.err for word in ("ranc", "did you mean 'rank'", "steps", "none-such"))
    assert not (tmp_path / "trained").exists()


def test_a_single_mistake_is_reported_plainly(run: Any, filled: Path, write_job: WriteJob) -> None:
    outcome = run("train", write_job(base="pica"), "--local", registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "Error: Unknown base 'pica'. Did you mean 'pico'? Known: pico. Add one with `coterie base add PATH --name "
        "NAME`.\n"
    )


def test_a_failed_job_fails_the_command_and_not_the_others(
    run: Any, filled: Path, write_job: WriteJob, tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n')
    jobs = (write_job(data=tmp_path / "short.jsonl", held_out=0), write_job("hosp/icd", domain="medicine"))
    outcome = run("train", *jobs, "--local", "--out", tmp_path / "t", registry=filled)
    assert outcome.code == 1
    assert outcome.out.splitlines()[1].endswith("  failed: DataError")
    assert outcome.out.splitlines()[2].endswith(f"  {tmp_path}/t/hosp/icd")
    assert "Error: 1 of 2 jobs failed.\n  - acme/contracts: " in outcome.err


@pytest.mark.parametrize(
    ("progress", "cells"),
    [
        (None, ("acme/x", "queued", "-", "-", "-", "-")),
        (
            Progress(
                name="acme/x",
                stage="training",
                scalars={
                    "step": 3,
                    "steps": 40,
                    "tokens_per_second": 1234.5,
                    "loss": 2.25,
                    "eta_seconds": 3725.2,
                },
            ),
            ("acme/x", "training", "3/40", "1,234", "2.250", "1:02:05"),
        ),
        (
            Progress(name="acme/x", stage="failed", scalars={"eta_seconds": 5.0}, error="DataError"),
            ("acme/x", "failed (DataError)", "-", "-", "-", "-"),
        ),
        (
            Progress(name="acme/x", stage="training", scalars={"eta_seconds": 59.6}),
            ("acme/x", "training", "-", "-", "-", "1:00"),
        ),
    ],
    ids=["queued", "training", "failed", "rounding"],
)
def test_live_row(progress: Progress | None, cells: tuple[str, ...]) -> None:
    assert job_cells("acme/x", progress) == cells


def test_a_full_device_stops_training_with_what_is_missing(
    run: Any, filled: Path, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import pipelines.train.loop as loop

    def full(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "t"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full)
        outcome = run("train", write_job(), "--local", "--out", out, registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"Error: No space is left on the device that holds {out}")
    assert last.endswith("Free some space or choose another place and try again.")
    assert not (out / "acme" / "contracts").exists()
    assert run("train", write_job(), "--local", "--out", out, registry=filled).code == 0
