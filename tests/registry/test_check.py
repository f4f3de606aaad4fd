"""Verifying files, checking rows against the log, and rebuilding the index."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from experts.errors import IntegrityError, RegistryError, UnknownNameError
from registry import Registry
from registry.index import select_all
from registry.replay import TABLES


@pytest.fixture(scope="module")
def library_folder(
    build_library: Any, make_expert: Any, tmp_path_factory: pytest.TempPathFactory, write_routing: Any
) -> Path:
    def fill(registry: Registry) -> None:
        registry.register(make_expert("acme/contracts", seed=1, routing=True))
        folder = tmp_path_factory.mktemp("routing")
        registry.set_base_routing("pico", folder, write_routing(folder, seed=5))
        registry.register(make_expert("acme/contracts", version=2, seed=2))
        registry.register(make_expert("hosp/icd", seed=3))
        registry.opt_out("acme", reason="left", by="ann")

    return build_library(fill)


@pytest.fixture
def library(library_folder: Path, open_copy: Any) -> Registry:
    return open_copy(library_folder)


def rows(registry: Registry) -> dict[str, list[tuple[Any, ...]]]:
    with registry._storage.read() as connection:
        return {table.name: select_all(connection, table) for table in TABLES}


def blob(registry: Registry, ref: str, path: str = "adapter_model.safetensors") -> Path:
    return registry.files(registry.expert(ref))[path]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_an_intact_registry(library: Registry) -> None:
    assert library.verify().ok
    report = library.fsck()
    assert (report.ok, report.problems, report.orphans, report.abandoned, report.rebuilt) == (
        True,
        (),
        (),
        (),
        False,
    )
    assert {(check.subject, check.path) for check in report.files.files} == {
        ("base pico", "record of the base"),
        ("base pico", "description of the base"),
        *(
            ("base pico", path)
            for path in ("LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json")
        ),
        ("base pico", "record of its routing artefacts"),
        ("base pico", "routing.safetensors"),
        ("acme/contracts@1", "routing.safetensors"),
        *(
            (ref, path)
            for ref in ("acme/contracts@1", "acme/contracts@2", "hosp/icd@1")
            for path in ("card.json", "adapter_config.json", "adapter_model.safetensors")
        ),
    }


def test_one_expert_is_verified_alone(library: Registry) -> None:
    flip(blob(library, "hosp/icd"))
    assert library.verify("acme/contracts").ok
    report = library.verify("hosp/icd@1")
    assert not report.ok
    assert [(check.path, check.status) for check in report.files] == [
        ("card.json", "ok"),
        ("adapter_config.json", "ok"),
        ("adapter_model.safetensors", "altered"),
    ]
    with pytest.raises(UnknownNameError, match=r"^Unknown expert 'hosp/idc'"):
        library.verify("hosp/idc")


def test_missing_and_altered_files_are_told_apart(library: Registry) -> None:
    blob(library, "acme/contracts@1").unlink()
    flip(blob(library, "acme/contracts@2"))
    report = library.verify()
    assert {(check.subject, check.path, check.status) for check in report.damaged} == {
        ("acme/contracts@1", "adapter_model.safetensors", "missing"),
        ("acme/contracts@2", "adapter_model.safetensors", "altered"),
    }
    assert not library.fsck().ok


def test_a_damaged_card_is_reported_and_its_files_are_not_guessed(library: Registry) -> None:
    digest = library.expert("hosp/icd").digest
    flip(library.blob_path(digest))
    report = library.fsck()
    assert [(check.subject, check.path, check.status) for check in report.files.damaged] == [
        ("hosp/icd@1", "card.json", "altered")
    ]
    assert len(report.problems) == 1
    assert report.problems[0].startswith(
        f"the log cannot be replayed: The blob sha256:{digest} in the registry"
    )


def test_orphans_and_leftovers_are_reported_and_harmless(library: Registry) -> None:
    with library._storage.staging(doing="testing") as staging:
        orphan = staging.add(b"nobody's", "file")
        staging.publish()
    report = library.fsck()
    assert report.ok
    assert report.orphans == (orphan,)


def test_an_edited_row_is_found(library: Registry) -> None:
    with closing(sqlite3.connect(library.path / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE experts SET license = 'MIT' WHERE name = 'hosp/icd'")
        connection.execute("DROP TRIGGER consents_no_delete")
        connection.execute("DELETE FROM consents")
    report = library.fsck()
    assert not report.ok
    assert report.problems == (
        "table experts: row 3 is not what the audit log says",
        "table consents: row 6 is not what the audit log says",
    )
    assert library.fsck(rebuild=True).ok
    assert [record.owner for record in library.opt_outs()] == ["acme"]


@pytest.mark.parametrize("damage", ["missing", "not a database", "torn", "intact"])
def test_the_index_is_rebuilt_from_log_and_blobs(library: Registry, damage: str) -> None:
    index = library.path / "index.sqlite"
    before, audit, listed = rows(library), library.audit(), library.experts(all_versions=True)
    if damage == "missing":
        index.unlink()
    elif damage == "not a database":
        index.write_bytes(b"x" * 5000)
    elif damage == "torn":
        data = index.read_bytes()
        index.write_bytes(data[:4096] + bytes(4096) + data[8192:])
    report = library.fsck(rebuild=True)
    assert report.ok, report.problems
    assert report.rebuilt
    assert rows(library) == before
    assert library.audit() == audit
    assert library.experts(all_versions=True) == listed
    kept = library.path / "index.sqlite.damaged"
    assert kept.exists() == (damage in {"not a database", "torn"})
    assert Registry(library.path).opt_in("acme", reason="back").sequence == len(audit) + 1


def test_a_missing_index_is_explained(library: Registry, make_expert: Any) -> None:
    (library.path / "index.sqlite").unlink()
    for use in (library.experts, library.fsck, lambda: library.opt_out("acme", reason="x")):
        with pytest.raises(IntegrityError) as caught:
            use()
        assert str(caught.value) == (
            f"The registry '{library.path}' has an audit log, but its index 'index.sqlite' is missing. "
            "Restore it from a copy, or recreate it from the log and the blobs with "
            "`coterie verify --rebuild`."
        )
    assert not (library.path / "index.sqlite").exists()


def test_a_rebuild_without_all_log_files_keeps_the_index(library: Registry) -> None:
    (library.path / "log" / "00000006.json").unlink()
    before = rows(library)
    with pytest.raises(IntegrityError) as caught:
        library.fsck(rebuild=True)
    assert str(caught.value) == (
        f"The index of the registry '{library.path}' cannot be rebuilt: it has 6 log entries, but "
        f"'{library.path / 'log'}' has files of 5 only. Restore the missing files from a copy."
    )
    assert rows(library) == before
    (library.path / "log" / "00000002.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        library.fsck(rebuild=True)
    assert str(caught.value) == (
        f"The audit log's files in '{library.path / 'log'}' are damaged:\n"
        "  - entry 2 is missing: entry 3 follows entry 1"
    )
    assert rows(library) == before


def test_a_rebuild_without_a_blob_keeps_the_index(library: Registry) -> None:
    digest = library.expert("hosp/icd").digest
    library.blob_path(digest).unlink()
    before = rows(library)
    with pytest.raises(IntegrityError, match=f"^The blob sha256:{digest} is missing"):
        library.fsck(rebuild=True)
    assert rows(library) == before


def test_nothing_is_rebuilt_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry(tmp_path / "none").fsck(rebuild=True)
    assert str(caught.value) == f"There is no registry '{tmp_path / 'none'}' to rebuild."
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RegistryError, match="is not a coterie registry"):
        Registry(tmp_path / "other").fsck(rebuild=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_copied_registry_is_the_same_registry(library: Registry, tmp_path: Path) -> None:
    copy = Registry(shutil.copytree(library.path, tmp_path / "copy"))
    assert copy.fsck().ok
    assert copy.experts() == library.experts()
    assert copy.verify_audit() == library.verify_audit()
