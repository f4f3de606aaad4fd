"""add and remove: what they print, and that a mistake changes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

HEAD = "format_version: 1\nname: duo\nrecipe: flexolmo\nbase: pico\n"


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def make(run: Any, filled: Path, tmp_path: Path) -> Any:
    """Build a folder of these experts."""

    def build(name: str, *experts: str, more: str = "") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"{HEAD}experts: [{', '.join(experts)}]\n{more}")
        outcome = run("build", path, tmp_path / name, registry=filled)
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return build


def test_add_and_remove(run: Any, filled: Path, make: Any) -> None:
    duo = make("duo", "acme/contracts", "soft/python")
    trio = make("trio", "acme/contracts", "hosp/icd", "soft/python")
    before = tree(duo)
    outcome = run("add", duo, "hosp/icd", registry=filled)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "+ hosp/icd@1"
    assert lines[1].startswith(f"{duo} holds 3 experts of acme, hosp, soft, changed in 0.")
    assert tree(duo) == tree(trio)
    outcome = run("remove", duo, "hosp")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0] == "- hosp/icd@1"
    assert tree(duo) == before


def test_what_is_left_is_what_its_own_manifest_builds(
    run: Any, filled: Path, make: Any, tmp_path: Path
) -> None:
    """Also where a token went to more experts than there are now; a new manifest may not ask for that."""
    folder = make("trio", "acme/contracts", "hosp/icd", "soft/python", more="router: {top_k: 4}\n")
    assert run("remove", folder, "hosp", "soft").code == 0
    outcome = run("build", folder / "manifest.yaml", tmp_path / "again", registry=filled)
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path / "again") == tree(folder)
    alone = tmp_path / "alone.yaml"
    alone.write_text((folder / "manifest.yaml").read_text())
    refused = run("build", alone, tmp_path / "refused", registry=filled)
    assert refused.code == 2
    assert "router.top_k: 4 found, but 1 expert and the anchor" in refused.err


def test_json(run: Any, filled: Path, make: Any) -> None:
    folder = make("duo", "acme/contracts", "soft/python")
    outcome = run("remove", folder, "acme/contracts", "--json")
    assert list(outcome.json)[:5] == ["folder", "added", "replaced", "removed", "name"]
    assert (outcome.json["removed"], outcome.json["owners"]) == (["acme/contracts@1"], ["soft"])
    assert (outcome.json["folder"], outcome.json["dry_run"]) == (str(folder), False)
    added = run("add", folder, "acme/contracts", "--json", "--copy", registry=filled).json
    assert (added["added"], added["replaced"], added["removed"]) == (["acme/contracts@1"], {}, [])
    assert added["owners"] == ["acme", "soft"]


def test_dry_run(run: Any, filled: Path, make: Any) -> None:
    folder = make("duo", "acme/contracts", "soft/python")
    before = tree(folder), folder.stat().st_ino
    outcome = run("add", folder, "hosp/icd", "--dry-run", registry=filled)
    assert outcome.out == (
        f"+ hosp/icd@1\n{folder} would hold 3 experts of acme, hosp, soft. Nothing was written.\n"
    )
    outcome = run("remove", folder, "soft", "--dry-run")
    assert outcome.out == (f"- soft/python@1\n{folder} would hold 1 expert of acme. Nothing was written.\n")
    assert run("remove", folder, "soft", "--dry-run", "--json").json["dry_run"] is True
    assert (tree(folder), folder.stat().st_ino) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("add", "FOLDER", "hosp/ic"),
            "Error: FOLDER cannot be changed:\n  - Unknown expert 'hosp/ic'. Did you mean 'hosp/icd'? Known: "
            "acme/contracts, hosp/icd, soft/python. The registry is 'REGISTRY'.\n",
        ),
        (
            ("add", "FOLDER", "acme/contracts"),
            "Error: FOLDER cannot be changed:\n  - acme/contracts@1 is there already\n",
        ),
        (
            ("remove", "FOLDER", "acne"),
            "Error: FOLDER cannot be changed:\n  - Unknown owner 'acne'. Did you mean 'acme'? Known: acme, soft.\n",
        ),
        (
            ("remove", "FOLDER", "acme", "soft"),
            "Error: FOLDER cannot be changed: without acme/contracts, soft/python no expert is left in it. Use its "
            "base alone (base/ in it is an ordinary model folder), or delete the folder.\n",
        ),
        (
            ("remove", "FOLDER/base", "acme"),
            "Error: FOLDER/base is not a composed folder: it has no composition.json. It is a plain checkpoint: load "
            "it with transformers; it does not know its owners.\n",
        ),
    ],
)
def test_bad_input(args: tuple[str, ...], message: str, run: Any, filled: Path, make: Any) -> None:
    folder = make("duo", "acme/contracts", "soft/python")
    before = tree(folder), folder.stat().st_ino
    outcome = run(*(arg.replace("FOLDER", str(folder)) for arg in args), registry=filled)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == message.replace("FOLDER", str(folder)).replace("REGISTRY", str(filled))
    assert (tree(folder), folder.stat().st_ino) == before


def test_an_owner_who_is_out(run: Any, registry: Path, make: Any) -> None:
    folder = make("duo", "acme/contracts", "soft/python")
    assert run("opt-out", "add", "hosp", "--reason", "gone", "--by", "ann", registry=registry).code == 0
    (entry,) = run("opt-out", "list", "--json", registry=registry).json
    outcome = run("add", folder, "hosp/icd", registry=registry)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"Error: {folder} cannot be changed, since owners of the new experts have opted out:\n"
        f"  - hosp/icd@1: hosp opted out on {entry['when']} (recorded by ann): gone\n"
    )
