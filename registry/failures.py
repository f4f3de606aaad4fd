"""Turns failures of the disk and of SQLite into errors that say what to do.

Knows error codes and SQLite's phrases; knows nothing of what the registry was doing beyond its name.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from experts.errors import CoterieError, IntegrityError, RegistryError

__all__ = ["explained"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_CHOOSE = "choose another folder with --registry or COTERIE_REGISTRY"


@contextmanager
def explained(root: Path, *, doing: str) -> Iterator[None]:
    """Raise `RegistryError` or `IntegrityError` in place of the system's and SQLite's errors.

    Args:
        root: The registry's folder.
        doing: What was being done, as it continues the word "while".
    """
    try:
        yield
    except OSError as failure:
        raise _from_system(failure, root=root, doing=doing) from failure
    except sa.exc.DBAPIError as failure:
        raise _from_sqlite(str(failure.orig), root=root, doing=doing) from failure


def _from_system(failure: OSError, *, root: Path, doing: str) -> CoterieError:
    if failure.errno in _FULL:
        return _full(root, doing=doing)
    if failure.errno in _FORBIDDEN:
        return _forbidden(root, doing=doing, reason=failure.strerror or str(failure))
    return _failed(root, doing=doing, reason=failure.strerror or str(failure))


def _from_sqlite(reason: str, *, root: Path, doing: str) -> CoterieError:
    if "disk is full" in reason:
        return _full(root, doing=doing)
    if "readonly" in reason or "unable to open" in reason:
        return _forbidden(root, doing=doing, reason=reason)
    if "locked" in reason:
        return RegistryError(
            f"The registry '{root}' was busy for too long while {doing}: another process holds its write "
            "lock. Nothing was changed: try again when that process is done."
        )
    if "not a database" in reason or "malformed" in reason:
        return IntegrityError(
            f"The index of the registry '{root}' is damaged ({reason}). Restore 'index.sqlite' from a copy, "
            "or recreate it from the log and the blobs with `coterie verify --rebuild`."
        )
    return _failed(root, doing=doing, reason=reason)


def _full(root: Path, *, doing: str) -> RegistryError:
    return RegistryError(
        f"No space left for the registry '{root}' while {doing}. Nothing was changed: free some space and "
        "try again."
    )


def _forbidden(root: Path, *, doing: str, reason: str) -> RegistryError:
    return RegistryError(
        f"The registry '{root}' cannot be written while {doing}: {reason}. Nothing was changed: check the "
        f"folder's permissions, or {_CHOOSE}."
    )


def _failed(root: Path, *, doing: str, reason: str) -> RegistryError:
    return RegistryError(
        f"The registry '{root}' failed while {doing}: {reason}. Nothing was changed: try again."
    )
