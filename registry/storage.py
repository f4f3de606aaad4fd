"""One registry folder: blobs, index and audit log, and the order in which a change reaches them.

Knows which folder is a registry, and that blobs come before the index; knows nothing of experts, bases or
consent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from experts.errors import IntegrityError, RegistryError
from registry.audit import AuditLog, utc_now
from registry.blobs import BlobStore, Staging
from registry.failures import explained
from registry.filesystem import FileSystem
from registry.index import BUSY_SECONDS, Index
from registry.records import AuditEntry

__all__ = ["Storage"]

_INDEX_NAME = "index.sqlite"
_OURS = frozenset({"blobs", "tmp", "log"})


class Storage:
    """Opens transactions and staging folders in ``root``; nothing is created before the first write.

    Args:
        root: The registry's folder.
        files: How files are changed.
        clock: What time it is.
        busy_seconds: How long a transaction waits for other processes.
    """

    def __init__(
        self,
        root: Path,
        *,
        files: FileSystem | None = None,
        clock: Callable[[], datetime] = utc_now,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self.root = root
        self.files = files or FileSystem()
        self.blobs = BlobStore(root, files=self.files)
        self.log = AuditLog(root / "log", blobs=self.blobs, files=self.files, clock=clock)
        self.index = Index(root / _INDEX_NAME, busy_seconds=busy_seconds)
        self._prepared = False

    @contextmanager
    def read(self, *, doing: str = "reading it") -> Iterator[sa.Connection]:
        """Open one consistent view of the index; a folder that does not exist reads as an empty registry.

        Raises:
            RegistryError: The folder is not a registry, or of a newer coterie.
            IntegrityError: The index is damaged or missing.
        """
        with explained(self.root, doing=doing):
            self._check_root()
            exists = self.index.path.exists()
            with self.index.read() as connection:
                if exists:
                    self.log.check_index_is_current(connection)
                yield connection

    @contextmanager
    def write(self, *, doing: str) -> Iterator[sa.Connection]:
        """Open the one write transaction, creating the registry when it does not exist.

        Raises:
            RegistryError: The folder is not a registry, cannot be written, is full or busy.
            IntegrityError: The index is damaged or missing.
        """
        with explained(self.root, doing=doing):
            self._prepare()
            with self.index.write() as connection:
                self.log.check_index_is_current(connection)
                yield connection

    @contextmanager
    def staging(self, *, doing: str) -> Iterator[Staging]:
        """Open a private folder for the blobs of one change, creating the registry when it does not exist.

        Raises:
            RegistryError: As `write`.
        """
        with explained(self.root, doing=doing):
            self._prepare()
            with self.blobs.staging() as staging:
                yield staging

    def record(
        self, connection: sa.Connection, action: str, *, subject: str, detail: Mapping[str, str | int]
    ) -> AuditEntry:
        """Log a change and make it, in the caller's transaction; its blobs must be published already."""
        from registry.replay import apply

        entry = self.log.append(connection, action, subject=subject, detail=detail)
        apply(connection, entry, blobs=self.blobs)
        return entry

    def check_is_registry(self) -> None:
        """Raise `RegistryError` if the folder exists and holds something else than a registry."""
        if self.root.exists() and not self.root.is_dir():
            raise RegistryError(
                f"The registry '{self.root}' is not a folder: choose a folder with --registry or "
                "COTERIE_REGISTRY."
            )
        if not self.root.is_dir() or self.index.path.exists():
            return
        names = {path.name for path in self.root.iterdir()} - _OURS
        foreign = sorted(name for name in names if not name.startswith(_INDEX_NAME))
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise RegistryError(
                f"'{self.root}' is not a coterie registry: it holds other files ({shown}) and no "
                f"{_INDEX_NAME}. Choose a registry, or a new or empty folder, with --registry or "
                "COTERIE_REGISTRY."
            )

    def _check_root(self) -> None:
        self.check_is_registry()
        # In this order: a process that creates the registry right now makes the index before the first entry.
        if any(self.log.folder.glob("*.json")) and not self.index.path.exists():
            raise IntegrityError(
                f"The registry '{self.root}' has an audit log, but its index '{_INDEX_NAME}' is missing. "
                "Restore it from a copy, or recreate it from the log and the blobs with "
                "`coterie verify --rebuild`."
            )

    def _prepare(self) -> None:
        self._check_root()
        if self._prepared:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        self.blobs.make_folders()
        self.log.make_folders()
        self.blobs.clean()
        self._prepared = True
