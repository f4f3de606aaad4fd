"""tune: what it prints, what it leaves, and that a mistake is found before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

MANIFEST = "format_version: 1\nname: duo\nbase: pico\nexperts: [acme/contracts, soft/python]\n"
JOB = """\
train: trunk
data:
  - {text: law.txt, owner: acme}
  - {text: public.txt, public: true}
sequence_length: 32
batch_size: 2
steps: 2
warmup: 0
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A manifest, a job and its texts."""
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    (tmp_path / "tune.yaml").write_text(JOB)
    (tmp_path / "law.txt").write_text("The licensee shall indemnify the licensor against every claim. " * 4)
    (tmp_path / "public.txt").write_text("It was a bright cold day in April. " * 4)
    return tmp_path


def _tune(run: Any, files: Path, filled: Path, *options: object) -> Any:
    command = (
        "tune",
        files / "manifest.yaml",
        files / "out",
        "--job",
        files / "tune.yaml",
        "--device",
        "cpu",
    )
    return run(*command, *options, registry=filled)


def test_what_would_be_done(run: Any, files: Path, filled: Path) -> None:
    outcome = _tune(run, files, filled, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert [re.split(r"\s{2,}|:\s+", line.strip(), maxsplit=1) for line in outcome.out.splitlines()] == [
        ["composition", "duo"],
        ["train", "trunk"],
        ["tokens", "128"],
        ["steps", "2"],
        ["text of", "acme"],
        ["trained weights hold", "acme, soft"],
        ["opt-out class", "retrain (before: exact)"],
    ]
    plain = _tune(run, files, filled, "--dry-run", "--json").json
    assert (plain["owners"], plain["tokens"], plain["optout_class"]) == (["acme", "soft"], 128, "retrain")
    assert not (files / "out").exists()


def test_tuning(run: Any, files: Path, filled: Path) -> None:
    (files / "tune.yaml").write_text(JOB.replace("owner: acme", "owner: counsel"))
    outcome = _tune(run, files, filled)
    assert outcome.code == 0, outcome.err
    assert outcome.err == (
        "Note: the trained weights will hold acme, counsel, soft; leaving one of them out falls back to the weights "
        "from before.\n"
    )
    assert re.fullmatch(
        rf"Tuned {re.escape(str(files / 'out'))}: [\d.]+ k parameters on 128 tokens, [\d,]+ tokens/s, "
        r"loss \d\.\d{3}\.\n",
        outcome.out,
    )
    assert sorted(path.name for path in (files / "out" / "tuned").iterdir()) == ["trunk.safetensors"]
    # somebody whose text alone went in can be left out as well
    options = ("--prompt", "The", "--max-new-tokens", 1, "--device", "cpu", "--opt-out", "counsel")
    outcome = run("generate", files / "out", *options, registry=filled)
    assert outcome.code == 0, outcome.err
    outcome = run("verify-optout", files / "out", "--json", registry=filled)
    assert outcome.code == 0, outcome.err
    assert [(row["owner"], row["door"]) for row in outcome.json] == [
        *(("acme", door) for door in ("build", "load", "request")),
        *(("counsel", door) for door in ("load", "request")),
        *(("soft", door) for door in ("build", "load", "request")),
    ]
    again = _tune(run, files, filled, "--json")
    assert (again.code, again.err.splitlines()[-1]) == (
        2,
        f"Error: The output folder {files / 'out'} exists. Choose another name, or remove it first.",
    )


def test_an_owner_who_is_nearly_somebody(run: Any, files: Path, filled: Path) -> None:
    (files / "tune.yaml").write_text(JOB.replace("owner: acme", "owner: acne"))
    outcome = _tune(run, files, filled, "--dry-run")
    assert (outcome.code, outcome.err) == (
        0,
        "Warning: Text of 'acne', of whom there is no expert. Is it acme's? Leaving acme out would keep it.\n",
    )


def test_mistakes_in_the_job(run: Any, files: Path, filled: Path) -> None:
    (files / "tune.yaml").write_text(
        JOB.replace("owner: acme", "owner: Acme").replace("steps: 2", "steps: 0")
    )
    outcome = _tune(run, files, filled)
    assert outcome.code == 2
    assert outcome.err == (
        "Error: tuning job tune.yaml has 2 problems:\n"
        "  - data.0.owner: 'Acme' is not an owner name: use 1 to 64 lower-case letters, digits, '_', '.' or "
        "'-', starting with a letter or digit.\n"
        "  - steps: input should be greater than 0, given 0\n"
    )


def test_a_router_that_is_solved(run: Any, files: Path, filled: Path) -> None:
    (files / "tune.yaml").write_text(JOB.replace("trunk", "routers"))
    outcome = _tune(run, files, filled)
    assert outcome.code == 2
    assert outcome.err.startswith(
        "Error: train: routers, but the router 'lda' is solved from statistics and has "
    )


def test_a_folder_that_is_no_composition(run: Any, files: Path, filled: Path) -> None:
    outcome = run("tune", files, files / "out", "--job", files / "tune.yaml", registry=filled)
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: {files} is not a composed folder: it has no composition.json. Make one with `coterie build`.\n",
    )


def test_text_that_is_too_short(run: Any, files: Path, filled: Path) -> None:
    (files / "public.txt").write_text("short")
    outcome = _tune(run, files, filled)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "Error: the public text does not fill one window of 32 tokens. Give more text or a smaller sequence_length."
    )
    assert sorted(path.name for path in files.iterdir()) == [
        "law.txt",
        "manifest.yaml",
        "public.txt",
        "tune.yaml",
    ]
