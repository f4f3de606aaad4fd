"""The audit log: one entry for each change, and every tampering found."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from experts.errors import IntegrityError
from registry import AuditHead, Registry
from registry.audit import GENESIS


@pytest.fixture(scope="module")
def library_folder(
    build_library: Any, make_expert: Any, tmp_path_factory: pytest.TempPathFactory, write_routing: Any
) -> Path:
    def fill(registry: Registry) -> None:
        registry.register(make_expert())
        folder = tmp_path_factory.mktemp("routing")
        registry.set_base_routing("pico", folder, write_routing(folder))
        registry.opt_out("acme", reason="left", by="ann")
        registry.opt_in("acme", reason="back", by="ann")

    return build_library(fill)


@pytest.fixture
def library(library_folder: Path, open_copy: Any) -> Registry:
    return open_copy(library_folder)


@contextmanager
def raw(library: Registry) -> Iterator[sqlite3.Connection]:
    """Open the index as somebody who wants to cheat: without the triggers."""
    with closing(sqlite3.connect(library.path / "index.sqlite")) as connection, connection:
        for verb in ("update", "delete"):
            connection.execute(f"DROP TRIGGER audit_no_{verb}")
        yield connection


def findings(library: Registry, **options: Any) -> list[str]:
    with pytest.raises(IntegrityError) as caught:
        library.verify_audit(**options)
    assert str(caught.value).startswith(f"The audit log of the registry '{library.path}' is damaged:\n  - ")
    return list(caught.value.problems)


def test_every_change_has_one_entry(library: Registry, base_ref: Any) -> None:
    entries = library.audit()
    assert [(entry.sequence, entry.action, entry.subject) for entry in entries] == [
        (1, "base.add", "pico"),
        (2, "expert.register", "acme/contracts@1"),
        (3, "base.routing", "pico"),
        (4, "consent.opt_out", "acme"),
        (5, "consent.opt_in", "acme"),
    ]
    assert entries[0].detail["fingerprint"] == base_ref.fingerprint
    record = library.expert("acme/contracts")
    assert entries[1].detail == {"base": "pico", "card": record.digest, "parameters": record.parameters}
    assert entries[3].detail == {"who": "ann", "reason": "left"}
    assert library.verify_audit() == AuditHead(entries=5, digest=entries[-1].digest)


def test_a_refused_change_has_no_entry(library: Registry, make_expert: Any) -> None:
    before = library.audit()
    for attempt in (
        lambda: library.register(make_expert(seed=7)),
        lambda: library.opt_in("acme", reason="x"),
        lambda: library.opt_out("acme", reason=""),
    ):
        with pytest.raises(Exception, match=r"acme|reason"):
            attempt()
    assert library.audit() == before


def test_the_chain_is_what_anybody_can_compute(library: Registry) -> None:
    previous = hashlib.sha256(b"coterie audit log, format 1").hexdigest()
    assert previous == GENESIS
    for entry in library.audit():
        fields = {name: getattr(entry, name) for name in ("sequence", "at", "action", "subject", "previous")}
        data = rfc8785.dumps({**fields, "detail": dict(entry.detail), "format_version": 1})
        assert entry.previous == previous
        assert entry.digest == hashlib.sha256(data).hexdigest()
        assert (library.path / "log" / f"{entry.sequence:08d}.json").read_bytes() == data
        previous = entry.digest


def test_an_empty_log_verifies(tmp_path: Path) -> None:
    assert Registry(tmp_path / "none").verify_audit() == AuditHead(entries=0, digest=GENESIS)


def test_an_edited_entry_is_found(library: Registry) -> None:
    with raw(library) as connection:
        detail = json.dumps({"who": "bob", "reason": "left"})
        connection.execute("UPDATE audit SET detail = ? WHERE sequence = 4", [detail])
    assert findings(library) == ["entry 4 has been altered"]


@pytest.mark.parametrize("column", ["at", "action", "subject", "detail"])
def test_every_column_is_covered(library: Registry, column: str) -> None:
    with raw(library) as connection:
        connection.execute(f"UPDATE audit SET {column} = 'other' WHERE sequence = 2")
    assert findings(library) == ["entry 2 has been altered"]


def test_an_edit_with_a_fitting_digest_breaks_the_next_link(library: Registry) -> None:
    entry = library.audit()[3]
    fields = {
        "sequence": 4,
        "at": entry.at,
        "action": "consent.opt_in",
        "subject": "acme",
        "format_version": 1,
    }
    data = rfc8785.dumps({**fields, "previous": entry.previous, "detail": dict(entry.detail)})
    with raw(library) as connection:
        connection.execute(
            "UPDATE audit SET action = 'consent.opt_in', digest = ? WHERE sequence = 4",
            [hashlib.sha256(data).hexdigest()],
        )
    assert findings(library) == [
        "entry 5 does not follow from the entry before it",
        "entry 4 of the index is not the one in '00000004.json'",
    ]


def test_reordered_entries_are_found(library: Registry) -> None:
    with raw(library) as connection:
        for old, new in ((2, 99), (3, 2), (99, 3)):
            connection.execute("UPDATE audit SET sequence = ? WHERE sequence = ?", [new, old])
    assert findings(library)[:5] == [
        "entry 2 does not follow from the entry before it",
        "entry 2 has been altered",
        "entry 3 does not follow from the entry before it",
        "entry 3 has been altered",
        "entry 4 does not follow from the entry before it",
    ]


def test_an_entry_cut_out_of_the_middle_is_found(library: Registry) -> None:
    with raw(library) as connection:
        connection.execute("DELETE FROM audit WHERE sequence = 3")
    assert findings(library) == ["entry 3 is missing: entry 4 follows entry 2"]


def test_entries_cut_off_the_end_are_found(library: Registry) -> None:
    with raw(library) as connection:
        connection.execute("DELETE FROM audit WHERE sequence >= 4")
    with pytest.raises(IntegrityError) as caught:
        library.verify_audit()
    assert str(caught.value) == (
        f"The index of the registry '{library.path}' ends at change 3, but its log goes on: the index was "
        "cut or replaced by an old copy. Recreate it from the log and the blobs with "
        "`coterie verify --rebuild`."
    )


def test_an_old_copy_of_the_index_takes_no_change(library: Registry, make_expert: Any) -> None:
    """Going on from it would overwrite entries that others have seen."""
    index = library.path / "index.sqlite"
    shutil.copy(index, library.path / "index.sqlite.old")
    library.register(make_expert("hosp/icd"))
    library.opt_out("hosp", reason="left")
    shutil.move(library.path / "index.sqlite.old", index)
    with pytest.raises(IntegrityError, match="ends at change 5, but its log goes on"):
        library.opt_out("acme", reason="left")
    report = library.fsck(rebuild=True)
    assert report.ok
    assert [record.owner for record in library.opt_outs()] == ["hosp"]


def test_an_altered_or_missing_file_is_found(library: Registry) -> None:
    log = library.path / "log"
    (log / "00000002.json").unlink()
    (log / "00000004.json").write_text("{}")
    assert findings(library) == [
        "'00000004.json' is not an entry of the audit log",
        "entry 2 of the index is not the one in '00000002.json'",
        "entry 4 of the index is not the one in '00000004.json'",
    ]


def test_an_altered_byte_of_a_file_is_found(library: Registry) -> None:
    path = library.path / "log" / "00000004.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"left", b"lost"))
    assert findings(library) == ["entry 4 of the index is not the one in '00000004.json'"]


def test_a_rewritten_log_is_caught_by_whoever_kept_its_head(
    library: Registry, tmp_path: Path, base_folder: Path
) -> None:
    """Index and files made anew are consistent in themselves."""
    held = library.verify_audit()
    forged = Registry(tmp_path / "forged")
    for number in range(held.entries):
        forged.add_base(base_folder, name=f"pico-{number}")
    assert forged.verify_audit().entries == held.entries
    assert findings(forged, held=held) == [
        f"entry 5 is missing or not the one that was kept (digest {held.digest})"
    ]
    library.opt_out("acme", reason="left")
    assert library.verify_audit(held=held).entries == 6
    assert library.verify_audit(held=AuditHead(entries=0, digest=GENESIS)).entries == 6
    too_long = AuditHead(entries=7, digest="0" * 64)
    assert findings(library, held=too_long) == [
        f"entry 7 is missing or not the one that was kept (digest {'0' * 64})"
    ]
