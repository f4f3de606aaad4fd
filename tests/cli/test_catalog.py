"""list, show, verify, audit and opt-out: what is printed, for people and for programs, and the exit codes."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

LIST_KEYS = [
    "name",
    "version",
    "owner",
    "domain",
    "kind",
    "license",
    "base",
    "base_fingerprint",
    "parameters",
    "bytes",
    "digest",
    "created",
    "opted_out",
]


def damage(registry: Path, sha256: str) -> None:
    """Flip a byte of one blob."""
    (blob,) = [path for path in registry.rglob(f"*{sha256}*") if path.is_file()]
    blob.chmod(stat.S_IRUSR | stat.S_IWUSR)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


class TestList:
    def test_table(self, run: Any, filled: Path) -> None:
        outcome = run("list", registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.splitlines()
        assert lines[0] == "EXPERT            DOMAIN    KIND  LICENSE     BASE  PARAMETERS     SIZE  CONSENT"
        assert [line.split()[0] for line in lines[1:]] == ["acme/contracts@1", "hosp/icd@1", "soft/python@1"]
        assert lines[1].startswith("acme/contracts@1  law       lora  Apache-2.0  pico         960  ")

    def test_json_keys_are_frozen(self, run: Any, filled: Path) -> None:
        rows = run("list", "--json", registry=filled).json
        assert [list(row) for row in rows] == [LIST_KEYS] * 3
        assert rows[1] | {"digest": "", "base_fingerprint": "", "created": "", "bytes": 0} == {
            "name": "hosp/icd",
            "version": 1,
            "owner": "hosp",
            "domain": "medicine",
            "kind": "lora",
            "license": "Apache-2.0",
            "base": "pico",
            "base_fingerprint": "",
            "parameters": 2 * 3 * 2 * (32 + 48),  # layers x linears x rank x (in + out)
            "bytes": 0,
            "digest": "",
            "created": "",
            "opted_out": False,
        }

    def test_filters(self, run: Any, filled: Path) -> None:
        assert [row["name"] for row in run("list", "--domain", "law", "--json", registry=filled).json] == [
            "acme/contracts"
        ]
        assert (
            run("list", "--owner", "acme", "--domain", "code", registry=filled).out == "No expert matches.\n"
        )

    def test_unknown_owner(self, run: Any, filled: Path) -> None:
        outcome = run("list", "--owner", "acne", registry=filled)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "Error: Unknown owner 'acne'. Did you mean 'acme'? Known: acme, hosp, soft. "
            f"The registry is '{filled}'.\n"
        )

    def test_empty_registry_is_read_and_not_created(self, run: Any, tmp_path: Path) -> None:
        outcome = run("list", registry=tmp_path / "none")
        assert (outcome.code, outcome.out) == (
            0,
            f"There is no expert in the registry '{tmp_path}/none' yet.\n",
        )
        assert run("list", "--json", registry=tmp_path / "none").json == []
        assert not (tmp_path / "none").exists()

    def test_registry_may_be_named_in_three_places(
        self, run: Any, filled: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        expected = run("list", registry=filled).out
        assert run("list", "--registry", filled).out == expected
        monkeypatch.setenv("COTERIE_REGISTRY", str(filled))
        assert run("list").out == expected
        assert run("list", registry=tmp_path / "none").out.startswith(
            "There is no expert in"
        )  # beats the variable
        assert run("list", "--registry", filled, registry=tmp_path / "none").out == expected

    def test_a_folder_that_is_no_registry(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("x")
        outcome = run("list", registry=tmp_path)
        assert outcome.code == 2
        assert outcome.err == (
            f"Error: '{tmp_path}' is not a coterie registry: it holds other files (x) and no index.sqlite. Choose a "
            "registry, or a new or empty folder, with --registry or COTERIE_REGISTRY.\n"
        )


class TestShow:
    def test_fields(self, run: Any, filled: Path) -> None:
        outcome = run("show", "acme/contracts", registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        shown = outcome.out.splitlines()
        assert shown[:5] == [
            "expert:        acme/contracts@1",
            "owner:         acme",
            "parent owners: -",
            "domain:        law",
            "description:   -",
        ]
        assert "layers:        2-3" in shown
        assert "rank:          2" in shown
        assert any(line.startswith("  adapter_model.safetensors: 5.") for line in shown)

    def test_json_holds_the_record_and_the_card(self, run: Any, filled: Path) -> None:
        from experts.card import ExpertCard

        shown = run("show", "acme/contracts@1", "--json", registry=filled).json
        assert list(shown) == [*LIST_KEYS, "parent_owners", "card"]
        assert shown["parent_owners"] == []
        card = ExpertCard.model_validate_json(json.dumps(shown["card"]))
        assert card.layers == (2, 3)
        assert card.base.fingerprint == shown["base_fingerprint"]

    def test_unknown_expert(self, run: Any, filled: Path) -> None:
        outcome = run("show", "acme/contract", registry=filled)
        assert outcome.code == 2
        assert outcome.err == (
            "Error: Unknown expert 'acme/contract'. Did you mean 'acme/contracts'? Known: acme/contracts, hosp/icd, "
            f"soft/python. The registry is '{filled}'.\n"
        )

    def test_malformed_reference(self, run: Any, filled: Path) -> None:
        outcome = run("show", "acme", registry=filled)
        assert outcome.code == 2
        assert outcome.err == (
            "Error: 'acme' is not an expert name: write owner/expert, for instance 'acme/contracts', each part 1 to 64 "
            "lower-case letters, digits, '_', '.' or '-', starting with a letter or digit.\n"
        )

    def test_a_hostile_description_cannot_steer_the_terminal(
        self, run: Any, registry: Path, adapters: dict[str, Path]
    ) -> None:
        options = (
            "--name",
            "acme/evil",
            "--domain",
            "law",
            "--license",
            "MIT",
            "--description",
            "a\x1b[2Jb\nowner: you",
        )
        assert run("register", adapters["acme"], *options, registry=registry).code == 0
        shown = run("show", "acme/evil", registry=registry).out
        assert "description:   a\\x1b[2Jb\\nowner: you\n" in shown
        assert "\x1b" not in shown


class TestVerify:
    def test_rebuild(self, run: Any, registry: Path) -> None:
        """A lost index is an error that says so; it comes back with every expert in it."""
        before = run("list", "--json", registry=registry).json
        for file in registry.glob("index.sqlite*"):
            file.unlink()
        assert run("verify", registry=registry).code != 0
        outcome = run("verify", "--rebuild", registry=registry)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith("The index was rebuilt. ")
        assert outcome.out.endswith(" files checked: all are intact.\n")
        assert run("list", "--json", registry=registry).json == before
        refused = run("verify", "acme/contracts", "--rebuild", registry=registry)
        assert (refused.code, refused.err) == (
            2,
            "Error: --rebuild recreates the whole index: give it without EXPERT.\n",
        )

    def test_intact(self, run: Any, filled: Path) -> None:
        outcome = run("verify", registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.endswith(" files checked: all are intact.\n")
        assert run("verify", "acme/contracts", registry=filled).out == "4 files checked: all are intact.\n"

    def test_damage_is_named_and_fails(self, run: Any, registry: Path) -> None:
        card = run("show", "acme/contracts", "--json", registry=registry).json["card"]
        weights = next(file for file in card["files"] if file["path"] == "adapter_model.safetensors")
        damage(registry, weights["sha256"])
        outcome = run("verify", "acme/contracts", registry=registry)
        assert outcome.code == 1
        assert outcome.out == (
            "STATUS   SUBJECT           FILE\naltered  acme/contracts@1  adapter_model.safetensors\n"
        )
        assert outcome.err == "Error: 1 of 4 files are damaged, 0 contradictions found.\n"
        report = run("verify", "--json", registry=registry)
        assert report.code == 1
        assert list(report.json) == ["ok", "files", "problems"]
        assert [file for file in report.json["files"] if file["status"] != "ok"] == [
            {
                "subject": "acme/contracts@1",
                "path": "adapter_model.safetensors",
                "sha256": weights["sha256"],
                "status": "altered",
            }
        ]
        assert run("verify", "hosp/icd", registry=registry).code == 0


class TestOptOut:
    def test_add_list_remove(self, run: Any, registry: Path) -> None:
        assert run("opt-out", "list", registry=registry).out == "Nobody has opted out.\n"
        added = run("opt-out", "add", "acme", "--reason", "contract ended", "--by", "ann", registry=registry)
        assert (added.code, added.out, added.err) == (0, "Owner 'acme' has opted out.\n", "")
        (row,) = run("opt-out", "list", "--json", registry=registry).json
        assert list(row) == ["owner", "when", "who", "reason"]
        assert (row["owner"], row["who"], row["reason"]) == ("acme", "ann", "contract ended")
        assert run("opt-out", "list", registry=registry).out == (
            f"OWNER  WHEN                  WHO  REASON\nacme   {row['when']}  ann  contract ended\n"
        )
        (listed,) = run("list", "--owner", "acme", registry=registry).out.splitlines()[1:]
        assert listed.endswith("  opted out")
        assert "owner:         acme (opted out)\n" in run("show", "acme/contracts", registry=registry).out

        removed = run("opt-out", "remove", "acme", registry=registry)
        assert (removed.code, removed.out) == (0, "Owner 'acme' takes part again.\n")
        assert run("opt-out", "list", "--json", registry=registry).json == []
        history = run("opt-out", "list", "--history", "--json", registry=registry).json
        assert [(row["owner"], row["action"]) for row in history] == [("acme", "opt_out"), ("acme", "opt_in")]
        assert run("opt-out", "list", "--history", registry=registry).out.startswith(
            "SEQUENCE  OWNER  ACTION "
        )

    def test_unknown_owner(self, run: Any, registry: Path) -> None:
        outcome = run("opt-out", "add", "acne", "--reason", "x", registry=registry)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "Error: Unknown owner 'acne'. Did you mean 'acme'? Known: acme, hosp, soft. Owners are those with an "
            f"expert in the registry '{registry}'. The opt-out was not recorded. Somebody else, whose text was tuned "
            "on or whose documents are in an index, opts out with --unknown-owner (allow_unknown=True).\n"
        )
        words = ("opt-out", "add", "word", "--unknown-owner", "--reason", "x")
        assert run(*words, registry=registry).out == "Owner 'word' has opted out.\n"
        assert [row["owner"] for row in run("opt-out", "list", "--json", registry=registry).json] == ["word"]

    def test_a_reason_is_needed(self, run: Any, registry: Path) -> None:
        outcome = run("opt-out", "add", "acme", registry=registry)
        assert outcome.code == 2
        assert outcome.err.endswith("\n\nError: Missing option '--reason'.\n")

    def test_nobody_ever(self, run: Any, tmp_path: Path) -> None:
        assert (
            run("opt-out", "list", "--history", registry=tmp_path / "none").out
            == "Nobody has ever opted out.\n"
        )


class TestAudit:
    def test_every_change_is_listed(self, run: Any, registry: Path) -> None:
        run("opt-out", "add", "acme", "--reason", "x", registry=registry)
        entries = run("audit", "list", "--json", registry=registry).json
        assert [(entry["sequence"], entry["action"], entry["subject"]) for entry in entries] == [
            (1, "base.add", "pico"),
            (2, "base.routing", "pico"),
            (3, "expert.register", "acme/contracts@1"),
            (4, "expert.register", "hosp/icd@1"),
            (5, "expert.register", "soft/python@1"),
            (6, "consent.opt_out", "acme"),
        ]
        assert list(entries[0]) == ["sequence", "at", "action", "subject", "detail", "previous", "digest"]
        last = run("audit", "list", "--last", "1", registry=registry).out.splitlines()
        assert len(last) == 2
        assert last[1].split()[2:4] == ["consent.opt_out", "acme"]

    def test_verify(self, run: Any, filled: Path) -> None:
        entries = run("audit", "list", "--json", registry=filled).json
        outcome = run("audit", "verify", registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        assert (
            outcome.out
            == f"The audit log is intact: 5 entries, the last with digest {entries[-1]['digest']}.\n"
        )
        assert run("audit", "verify", "--json", registry=filled).json == {
            "entries": 5,
            "digest": entries[-1]["digest"],
        }

    def test_a_cut_log_is_detected(self, run: Any, registry: Path) -> None:
        (entry,) = registry.rglob("00000003.json")
        entry.parent.chmod(0o755)
        entry.unlink()
        outcome = run("audit", "verify", registry=registry)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(f"Error: The audit log of the registry '{registry}' is damaged:\n  - ")

    def test_empty(self, run: Any, tmp_path: Path) -> None:
        assert run("audit", "list", registry=tmp_path / "none").out == "Nothing has been changed yet.\n"


def test_a_missing_blob(run: Any, registry: Path) -> None:
    digest = run("show", "soft/python", "--json", registry=registry).json["digest"]
    (blob,) = [path for path in registry.rglob(f"*{digest}*") if path.is_file()]
    blob.parent.chmod(0o755)
    blob.unlink()
    outcome = run("show", "soft/python", registry=registry)
    assert (outcome.code, outcome.out) == (2, "")
    assert digest in outcome.err
    assert "Traceback" not in outcome.err
    shutil.rmtree(registry)
