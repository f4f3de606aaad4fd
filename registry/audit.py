"""The audit log: a hash chain with one entry for every change, in the index and as one file each.

Knows how entries are chained, written and verified; knows nothing of what the changes mean.

The files are a second copy of the chain: with the blobs they suffice to recreate the index, and they show
when the end of the index's chain was cut off. A chain alone does not stop someone who rewrites index and
files together; whoever keeps an `AuditHead` can tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rfc8785
import sqlalchemy as sa

from experts.errors import IntegrityError
from registry import index
from registry.blobs import BlobStore
from registry.filesystem import FileSystem
from registry.records import AuditEntry, AuditHead

__all__ = ["AuditLog", "chain_problems", "utc_now"]

GENESIS = hashlib.sha256(b"coterie audit log, format 1").hexdigest()
"""What the first entry names as its predecessor."""

_FORMAT_VERSION = 1


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class AuditLog:
    """Appends to the chain and reads it back.

    Args:
        folder: Where the entry files lie, ``00000001.json`` and so on.
        blobs: Where half-written files are kept.
        files: How files are changed.
        clock: What time it is.
    """

    def __init__(
        self, folder: Path, *, blobs: BlobStore, files: FileSystem, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self.folder = folder
        self._blobs = blobs
        self._files = files
        self._clock = clock

    def make_folders(self) -> None:
        """Create the folder of the entry files and make it durable."""
        self._files.make_folder(self.folder)
        self._files.sync_folder(self.folder.parent)

    def append(
        self, connection: sa.Connection, action: str, *, subject: str, detail: Mapping[str, str | int]
    ) -> AuditEntry:
        """Chain one entry to the end, inside the transaction of the change that it records.

        The file is written first. When the transaction then fails, the next entry replaces that file,
        so that at most the last file is without its row, and never the reverse.
        """
        head = read_head(connection)
        entry = _chained(
            sequence=head.entries + 1,
            at=self._clock().strftime("%Y-%m-%dT%H:%M:%SZ"),
            action=action,
            subject=subject,
            detail=detail,
            previous=head.digest,
        )
        self._write(entry)
        insert(connection, entry)
        return entry

    def check_index_is_current(self, connection: sa.Connection) -> None:
        """Refuse an index that lacks changes of which there are files, such as one from an old copy.

        Raises:
            IntegrityError: There are files of later entries. One of them is fine, see `append`.
        """
        entries = read_head(connection).entries
        if (self.folder / self._name(entries + 2)).exists():
            raise IntegrityError(
                f"The index of the registry '{self.folder.parent}' ends at change {entries}, but its log "
                "goes on: the index was cut or replaced by an old copy. Recreate it from the log and the "
                "blobs with `coterie verify --rebuild`."
            )

    def load_files(self) -> list[AuditEntry]:
        """Read the chain from its files.

        Raises:
            IntegrityError: A file is missing or altered, or the chain is broken.
        """
        entries, problems = self._parse_files()
        problems += chain_problems(entries)
        if problems:
            raise IntegrityError(f"The audit log's files in '{self.folder}' are damaged:", problems=problems)
        return entries

    def file_problems(self, entries: Sequence[AuditEntry]) -> list[str]:
        """Compare the files with the index's entries and say what differs.

        One file more than entries is no finding: a process was stopped just before its commit.
        """
        in_files, problems = self._parse_files()
        digests = {entry.sequence: entry.digest for entry in in_files}
        for entry in entries:
            if digests.get(entry.sequence) != entry.digest:
                problems.append(
                    f"entry {entry.sequence} of the index is not the one in '{self._name(entry.sequence)}'"
                )
        if len(in_files) > len(entries) + 1:
            problems.append(
                f"the index ends at entry {len(entries)}, but there are files of {len(in_files)} entries"
            )
        return problems

    def _parse_files(self) -> tuple[list[AuditEntry], list[str]]:
        entries: list[AuditEntry] = []
        problems: list[str] = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                entry = _parse(path.read_bytes())
            except (ValueError, TypeError, KeyError):
                problems.append(f"'{path.name}' is not an entry of the audit log")
                continue
            if path.name != self._name(entry.sequence):
                problems.append(f"'{path.name}' holds entry {entry.sequence}")
            entries.append(entry)
        return entries, problems

    def _write(self, entry: AuditEntry) -> None:
        with self._blobs.staging() as staging:
            staging.add(_canonical(entry), "entry")
            staged = staging.folder / "entry"
            self._files.protect(staged)
            self._files.rename(staged, self.folder / self._name(entry.sequence))
        self._files.sync_folder(self.folder)

    @staticmethod
    def _name(sequence: int) -> str:
        return f"{sequence:08d}.json"


def insert(connection: sa.Connection, entry: AuditEntry) -> None:
    """Add the entry's row to the index."""
    row = {name: getattr(entry, name) for name in index.audit.columns.keys()}  # noqa: SIM118
    connection.execute(
        sa.insert(index.audit), row | {"detail": json.dumps(dict(entry.detail), sort_keys=True)}
    )


def read_head(connection: sa.Connection) -> AuditHead:
    """Return the number of entries and the digest of the last one."""
    columns = index.audit.c
    query = sa.select(columns.sequence, columns.digest).order_by(columns.sequence.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return AuditHead(entries=row.sequence, digest=row.digest) if row else AuditHead(entries=0, digest=GENESIS)


def read_entries(connection: sa.Connection) -> list[AuditEntry]:
    """Return every entry of the index in order."""
    rows = connection.execute(sa.select(index.audit).order_by(index.audit.c.sequence)).mappings()
    return [AuditEntry(**{**row, "detail": _load_detail(row["detail"])}) for row in rows]


def chain_problems(entries: Iterable[AuditEntry]) -> list[str]:
    """Check numbering, contents and links of the chain and say what is wrong with each entry."""
    problems = []
    expected, previous = 1, GENESIS
    for entry in entries:
        if entry.sequence != expected:
            problems.append(
                f"entry {expected} is missing: entry {entry.sequence} follows entry {expected - 1}"
            )
        elif entry.previous != previous:
            problems.append(f"entry {entry.sequence} does not follow from the entry before it")
        if _digest(entry) != entry.digest:
            problems.append(f"entry {entry.sequence} has been altered")
        expected, previous = entry.sequence + 1, entry.digest
    return problems


def _chained(**fields: Any) -> AuditEntry:
    draft = AuditEntry(**fields, digest="")
    return AuditEntry(**fields, digest=_digest(draft))


def _canonical(entry: AuditEntry) -> bytes:
    """Return the RFC 8785 bytes of everything but the digest, which is their SHA-256."""
    return rfc8785.dumps(
        {
            "format_version": _FORMAT_VERSION,
            "sequence": entry.sequence,
            "at": entry.at,
            "action": entry.action,
            "subject": entry.subject,
            "detail": dict(entry.detail),
            "previous": entry.previous,
        }
    )


def _digest(entry: AuditEntry) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _parse(data: bytes) -> AuditEntry:
    """Read an entry file; its digest is that of the bytes as they are, not as they should be."""
    fields = json.loads(data)
    if fields.pop("format_version") != _FORMAT_VERSION:
        raise ValueError("another format")
    return AuditEntry(**fields, digest=hashlib.sha256(data).hexdigest())


def _load_detail(text: str) -> dict[str, str | int]:
    try:
        detail = json.loads(text)
    except ValueError:
        return {"unreadable": text}  # the digest no longer matches, which is what the check reports
    return detail if isinstance(detail, dict) else {"unreadable": text}
