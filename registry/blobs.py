"""The content-addressed store: files whose name is their SHA-256, written once and never changed.

Knows bytes, digests and how to survive a crash; knows nothing of what a blob means or who may read it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from experts.errors import IntegrityError
from registry.filesystem import FileSystem

__all__ = ["BlobState", "BlobStore", "Staging", "hash_file"]

BlobState = Literal["ok", "missing", "altered"]

_CHUNK_BYTES = 1 << 20
_ABANDONED_SECONDS = 3600.0


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading it in pieces of 1 MiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BlobStore:
    """Blobs under ``root/blobs/sha256/<2 hex>/<64 hex>`` and half-written files under ``root/tmp``.

    Args:
        root: The registry's folder.
        files: How files are changed.

    Attributes:
        folder: The folder that holds one folder for each first two digits of a digest.
    """

    def __init__(self, root: Path, *, files: FileSystem) -> None:
        self._root = root
        self._files = files
        self.folder = root / "blobs" / "sha256"
        self._temporary = root / "tmp"

    def path(self, sha256: str) -> Path:
        """Return where the blob is or would be."""
        return self.folder / sha256[:2] / sha256

    def require(self, sha256: str) -> Path:
        """Return the path of a blob that is there.

        Raises:
            IntegrityError: The blob is missing.
        """
        path = self.path(sha256)
        if not path.is_file():
            raise IntegrityError(
                f"The blob sha256:{sha256} is missing from the registry '{self._root}': restore it from a "
                "copy, or add again the base or expert that it belongs to."
            )
        return path

    def read(self, sha256: str) -> bytes:
        """Return a small blob's bytes after checking them against the digest.

        Raises:
            IntegrityError: The blob is missing, or its bytes are not those of its digest.
        """
        data = self.require(sha256).read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise IntegrityError(
                f"The blob sha256:{sha256} in the registry '{self._root}' is damaged: its bytes have the "
                f"digest sha256:{found}. Add again the base or expert that it belongs to, which replaces it."
            )
        return data

    def state(self, sha256: str) -> BlobState:
        """Read a whole blob and say whether it is ``ok``, ``missing`` or ``altered``."""
        path = self.path(sha256)
        if not path.is_file():
            return "missing"
        return "ok" if hash_file(path) == sha256 else "altered"

    def __iter__(self) -> Iterator[str]:
        """Yield the digest of every blob, without reading any."""
        for folder in sorted(self.folder.glob("??")):
            yield from sorted(path.name for path in folder.iterdir())

    def make_folders(self) -> None:
        """Create the store's folders and make them durable."""
        for folder in (self._temporary, self.folder.parent, self.folder):
            self._files.make_folder(folder)
            self._files.sync_folder(folder.parent)

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """Open a private folder to write files into; what was not published is removed at the end."""
        folder = self._temporary / f"{os.getpid()}-{secrets.token_hex(8)}"
        self._files.make_folder(folder)
        folder.chmod(0o700)
        try:
            yield Staging(folder, store=self, files=self._files)
        finally:
            self._discard(folder)

    def abandoned(self, *, older_than: float = _ABANDONED_SECONDS) -> list[Path]:
        """Return what killed processes left in ``tmp``, untouched for ``older_than`` seconds."""
        if not self._temporary.is_dir():
            return []
        deadline = time.time() - older_than
        return [entry for entry in self._temporary.iterdir() if _newest_change(entry) < deadline]

    def clean(self, *, older_than: float = _ABANDONED_SECONDS) -> None:
        """Remove what killed processes left in ``tmp``; what another process removes first is fine."""
        for entry in self.abandoned(older_than=older_than):
            self._discard(entry)

    def _discard(self, entry: Path) -> None:
        # A leftover is no failure: the next process to write removes it.
        with suppress(OSError):
            for folder, _, names in os.walk(entry, topdown=False):
                for name in names:
                    self._files.remove(Path(folder, name))
                self._files.remove_folder(Path(folder))
            if entry.is_file():
                self._files.remove(entry)


class Staging:
    """Files of one publication, in a folder that no other process writes to.

    Checks run on these copies, so that what was checked is what is published, whatever happens to the
    folder they came from.

    Attributes:
        folder: Where the files lie under their own relative paths.
    """

    def __init__(self, folder: Path, *, store: BlobStore, files: FileSystem) -> None:
        self.folder = folder
        self._store = store
        self._files = files
        self._staged: dict[str, Path] = {}

    def copy(
        self,
        source: int,
        path: str,
        *,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[int, str]:
        """Copy an open file to ``path`` in the folder, hashing on the way; memory is bounded by 1 MiB.

        Args:
            source: Descriptor of the file to read, from its current position.
            path: Relative path in the staging folder.
            limit: Most bytes to read; one more byte is an error.
            progress: Called with the number of bytes of each piece.

        Returns:
            The file's size in bytes and its SHA-256.

        Raises:
            IntegrityError: The source has more than ``limit`` bytes.
        """
        target = self._place(path)
        digest, size, buffer = hashlib.sha256(), 0, bytearray(_CHUNK_BYTES)
        descriptor = self._files.create(target)
        try:
            while count := os.readv(source, [buffer]):
                size += count
                if limit is not None and size > limit:
                    raise IntegrityError(f"'{path}' has more than the {limit} bytes that its card declares.")
                piece = memoryview(buffer)[:count]
                digest.update(piece)
                self._write(descriptor, piece)
                if progress is not None:
                    progress(count)
            self._files.sync(descriptor)
        finally:
            os.close(descriptor)
        self._staged[digest.hexdigest()] = target
        return size, digest.hexdigest()

    def add(self, data: bytes, path: str) -> str:
        """Write ``data`` to ``path`` in the folder and return its SHA-256."""
        target = self._place(path)
        descriptor = self._files.create(target)
        try:
            self._write(descriptor, memoryview(data))
            self._files.sync(descriptor)
        finally:
            os.close(descriptor)
        sha256 = hashlib.sha256(data).hexdigest()
        self._staged[sha256] = target
        return sha256

    def publish(self) -> None:
        """Move every staged file to its place in the store and make the moves durable.

        A blob that is there and intact stays, so that links to it keep sharing its disk space; a damaged
        one is replaced.
        """
        folders = {self._publish_file(sha256, path) for sha256, path in self._staged.items()}
        for folder in sorted(folders):
            self._files.sync_folder(folder)
        if folders:
            self._files.sync_folder(self._store.folder)
        self._staged.clear()

    def _publish_file(self, sha256: str, staged: Path) -> Path:
        target = self._store.path(sha256)
        if self._store.state(sha256) == "ok":
            # Somebody else's blob cannot be touched without rights on it, which costs only its youth.
            with suppress(PermissionError):
                self._files.touch(target)
            return target.parent
        self._files.make_folder(target.parent)
        self._files.protect(staged)
        self._files.rename(staged, target)
        return target.parent

    def _place(self, path: str) -> Path:
        target = self.folder / path
        for parent in reversed(target.relative_to(self.folder).parents[:-1]):
            self._files.make_folder(self.folder / parent)
        return target

    def _write(self, descriptor: int, data: memoryview) -> None:
        while data:
            data = data[self._files.write(descriptor, data) :]


def _newest_change(entry: Path) -> float:
    """Return the latest modification time in a tree; one that vanishes meanwhile counts as new."""
    try:
        return max(path.lstat().st_mtime for path in (entry, *entry.rglob("*")))
    except OSError:
        return float("inf")
