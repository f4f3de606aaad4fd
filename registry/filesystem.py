"""The calls through which the registry changes files, one method each.

A seam and nothing more: tests put a faulty file system in its place and interrupt every call. It knows
neither blobs nor digests.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["FileSystem"]


class FileSystem:
    """The local file system; every method is one system call, or one call wrapped in open and close.

    Each method raises `OSError` as the system gives it.
    """

    def create(self, path: Path) -> int:
        """Create ``path`` for writing, readable by its owner alone, and return the descriptor.

        An existing file, even a dangling link, is an error: nothing is ever written through a name that
        somebody else placed.
        """
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of ``data`` and return how many bytes that was, which can be fewer than given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the disk."""
        os.fsync(descriptor)

    def protect(self, path: Path) -> None:
        """Make the file read-only for everybody."""
        path.chmod(0o444)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file within the registry, replacing what stands at ``target`` in one step."""
        source.replace(target)

    def make_folder(self, path: Path) -> None:
        """Create one folder; one that exists already is fine."""
        path.mkdir(exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Wait until the folder's entries are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def touch(self, path: Path) -> None:
        """Set the file's modification time to now."""
        os.utime(path)

    def remove(self, path: Path) -> None:
        """Remove one file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove one empty folder."""
        path.rmdir()
