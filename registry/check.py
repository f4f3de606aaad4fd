"""Verifying a registry: every file against its digest, every row against the log, and the index made anew.

Knows how blobs, audit log and index must agree; repairs nothing but the index, which follows from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa

from experts.card import CARD_FILE, ExpertCard
from experts.errors import CoterieError, IntegrityError, RegistryError
from registry import index
from registry.audit import chain_problems, insert, read_entries, read_head
from registry.bases import StoredBase, StoredRouting
from registry.failures import explained
from registry.index import empty_index, select_all
from registry.lookup import find_expert
from registry.records import AuditEntry, AuditHead, FileCheck, FsckReport, VerifyReport
from registry.replay import TABLES, apply
from registry.storage import Storage

__all__ = ["fsck", "rebuild", "verify", "verify_audit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """A blob that must be there, and whose file it is."""

    subject: str
    path: str
    sha256: str


def verify(storage: Storage, reference: str | None) -> VerifyReport:
    """Read files and compare their digests. Errors: see `registry.Registry.verify`."""
    if reference is not None:
        record = find_expert(storage, reference)
        return _check_files(storage, _expert_files(storage, record.ref, record.digest))
    with storage.read(doing="verifying it") as connection:
        expected = list(_expected(storage, connection))
    return _check_files(storage, expected)


def verify_audit(storage: Storage, *, held: AuditHead | None) -> AuditHead:
    """Check the audit log. Errors: see `registry.Registry.verify_audit`."""
    with storage.read(doing="verifying its audit log") as connection:
        entries, head = read_entries(connection), read_head(connection)
        problems = _audit_problems(storage, entries)
    if held is not None and not _extends(entries, held):
        problems.append(
            f"entry {held.entries} is missing or not the one that was kept (digest {held.digest})"
        )
    if problems:
        raise IntegrityError(f"The audit log of the registry '{storage.root}' is damaged:", problems=problems)
    return head


def fsck(storage: Storage, *, rebuilt: bool = False) -> FsckReport:
    """Check everything, change nothing. Errors: see `registry.Registry.fsck`."""
    with storage.read(doing="checking it") as connection:
        entries = read_entries(connection)
        present = set(storage.blobs)
        expected = list(_expected(storage, connection))
        problems = [
            *_sqlite_problems(connection),
            *_audit_problems(storage, entries),
            *_row_problems(storage, connection, entries),
        ]
    # The files are read last and without a lock: that can take minutes, and they never change.
    return FsckReport(
        files=_check_files(storage, expected),
        problems=tuple(problems),
        orphans=tuple(sorted(present - {item.sha256 for item in expected})),
        abandoned=tuple(sorted(path.name for path in storage.blobs.abandoned())),
        rebuilt=rebuilt,
    )


def rebuild(storage: Storage) -> FsckReport:
    """Recreate the index from the log's files and the blobs. Errors: see `registry.Registry.fsck`."""
    if not storage.root.is_dir():
        raise RegistryError(f"There is no registry '{storage.root}' to rebuild.")
    storage.check_is_registry()
    with explained(storage.root, doing="rebuilding its index"):
        entries = storage.log.load_files()
        if _is_damaged(storage):
            storage.index.set_aside(files=storage.files)
        with storage.index.write() as connection:
            known = read_head(connection).entries
            if known > len(entries):
                raise IntegrityError(
                    f"The index of the registry '{storage.root}' cannot be rebuilt: it has {known} log "
                    f"entries, but '{storage.log.folder}' has files of {len(entries)} only. Restore the "
                    "missing files from a copy."
                )
            storage.index.clear(connection)
            for entry in entries:
                insert(connection, entry)
                apply(connection, entry, blobs=storage.blobs)
    return fsck(storage, rebuilt=True)


def _is_damaged(storage: Storage) -> bool:
    """Say whether SQLite cannot read the index; a missing one is not damaged."""
    try:
        with explained(storage.root, doing="rebuilding its index"), storage.index.read() as connection:
            return bool(_sqlite_problems(connection))
    except IntegrityError:
        return True


def _expected(storage: Storage, connection: sa.Connection) -> Iterator[_Expected]:
    """Yield every blob that the index refers to."""
    for name, record in connection.execute(sa.select(index.bases.c.name, index.bases.c.record)):
        yield from _base_files(storage, f"base {name}", record)
    for name, record in connection.execute(
        sa.select(index.base_routings.c.base, index.base_routings.c.record)
    ):
        yield from _routing_files(storage, f"base {name}", record)
    columns = index.experts.c
    for name, version, digest in connection.execute(sa.select(columns.name, columns.version, columns.digest)):
        yield from _expert_files(storage, f"{name}@{version}", digest)


# Each of the three yields the record itself first. Where that is damaged, its files are not known, and the
# damage is reported as the record's.


def _base_files(storage: Storage, subject: str, digest: str) -> Iterator[_Expected]:
    yield _Expected(subject=subject, path="record of the base", sha256=digest)
    if storage.blobs.state(digest) == "ok":
        stored = StoredBase.from_bytes(storage.blobs.read(digest))
        yield _Expected(subject=subject, path="description of the base", sha256=stored.description)
        for file in stored.files:
            yield _Expected(subject=subject, path=file.path, sha256=file.sha256)


def _routing_files(storage: Storage, subject: str, digest: str) -> Iterator[_Expected]:
    yield _Expected(subject=subject, path="record of its routing artefacts", sha256=digest)
    if storage.blobs.state(digest) == "ok":
        stored = StoredRouting.from_bytes(storage.blobs.read(digest))
        yield _Expected(subject=subject, path=stored.info.file, sha256=stored.sha256)


def _expert_files(storage: Storage, subject: str, digest: str) -> Iterator[_Expected]:
    yield _Expected(subject=subject, path=CARD_FILE, sha256=digest)
    if storage.blobs.state(digest) == "ok":
        card = ExpertCard.from_bytes(storage.blobs.read(digest))
        for file in card.files:
            yield _Expected(subject=subject, path=file.path, sha256=file.sha256)


def _check_files(storage: Storage, expected: Iterable[_Expected]) -> VerifyReport:
    state = cache(storage.blobs.state)  # experts share files, and every base is read once
    return VerifyReport(
        files=tuple(
            FileCheck(subject=item.subject, path=item.path, sha256=item.sha256, status=state(item.sha256))
            for item in expected
        )
    )


def _sqlite_problems(connection: sa.Connection) -> list[str]:
    findings = [str(text) for text in connection.scalars(sa.text("PRAGMA integrity_check"))]
    findings = [] if findings == ["ok"] else [f"SQLite: {text}" for text in findings]
    broken = connection.execute(sa.text("PRAGMA foreign_key_check")).all()
    return findings + [
        f"table {row[0]}: row {row[1]} refers to a row that is missing in {row[2]}" for row in broken
    ]


def _audit_problems(storage: Storage, entries: list[AuditEntry]) -> list[str]:
    return chain_problems(entries) + storage.log.file_problems(entries)


def _row_problems(storage: Storage, connection: sa.Connection, entries: list[AuditEntry]) -> list[str]:
    """Replay the log into an empty index and say where the tables differ from it."""
    with empty_index() as expected:
        try:
            for entry in entries:
                apply(expected, entry, blobs=storage.blobs)
        except (CoterieError, KeyError, sa.exc.DBAPIError) as failure:
            return [f"the log cannot be replayed: {failure}"]
        return [text for table in TABLES for text in _differences(table, expected=expected, found=connection)]


def _differences(table: sa.Table, *, expected: sa.Connection, found: sa.Connection) -> list[str]:
    width = len(table.primary_key.columns)
    logged = {row[:width]: row for row in select_all(expected, table)}
    present = {row[:width]: row for row in select_all(found, table)}
    return [
        f"table {table.name}: row {', '.join(map(str, key))} is not what the audit log says"
        for key in sorted(logged.keys() | present.keys())
        if logged.get(key) != present.get(key)
    ]


def _extends(entries: list[AuditEntry], held: AuditHead) -> bool:
    if held.entries == 0:
        return True
    return len(entries) >= held.entries and entries[held.entries - 1].digest == held.digest
