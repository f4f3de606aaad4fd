"""Puts a finished folder in the place of another in one step, and lets one process at a time do so.

Knows names, locks and renames; knows nothing of what the folders hold.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experts.errors import BuildError
from experts.files import fsync_folder

__all__ = ["exchange", "replacing"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a path to make the new folder at; it takes the place of ``folder`` when the block ends well.

    At every moment, also after a kill, one whole folder stands at ``folder``: the old one or the new one. What a
    kill leaves beside it has a name that starts with a dot and may be removed.

    Args:
        folder: An existing folder, not a link.

    Raises:
        BuildError: Another process is changing the folder, or the file system refuses.
    """
    with _alone(folder), _scratch(folder) as scratch:
        made = scratch / folder.name
        yield made
        try:
            exchange(made, folder)
            fsync_folder(folder.parent)
        except OSError as error:
            raise _refused(folder, error) from error


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders of one file system in a single step.

    Where the system has no such step (other than Linux, some network file systems), ``other`` is moved aside
    first, and nothing stands at its name for a moment.

    Raises:
        OSError: The file system refuses; both folders are where they were.
    """
    if _swapped(one, other):
        return
    aside = one.with_name(f"{one.name}.before")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange by ``renameat2`` (Linux 3.15); return whether the system can."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _locked(descriptor, folder):
            raise BuildError(f"Another process is changing {folder}. Nothing was changed here; try again.")
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # whoever held the lock before may have put another folder here
    return os.path.samestat(os.fstat(descriptor), folder.stat())


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refused(folder: Path, error: OSError) -> BuildError:
    return BuildError(f"Could not change {folder}: {error.strerror or error}. It is as it was before.")
