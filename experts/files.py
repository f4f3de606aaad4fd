"""Opening, reading, hashing and writing files that may have been prepared by a stranger.

Knows paths, links and durability; knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from experts.errors import AdmissionError, CoterieError

__all__ = [
    "CHUNK",
    "capped",
    "copy_file",
    "fsync_folder",
    "install_file",
    "iter_chunks",
    "open_regular",
    "path_problems",
    "read_bounded",
    "sha256_file",
    "write_atomic",
]

CHUNK = 1 << 20
"""Bytes read at a time; memory never grows with the file."""

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))})


def capped(problems: Sequence[str], *, limit: int = 100) -> list[str]:
    """Return the problems to print: all of them, or the first ``limit`` and a count of the rest."""
    if len(problems) <= limit:
        return list(problems)
    return [*problems[:limit], f"and {len(problems) - limit} more of the same"]


def path_problems(paths: Iterable[str]) -> list[str]:
    """Say what is wrong with relative paths: each must be portable, and no two may differ in case only.

    Allowed: ``/``-joined segments of ``A-Za-z0-9._-``, at most 255 bytes, no ``.`` or ``..`` segment, no
    name that Windows reserves for a device.
    """
    problems, seen = [], dict[str, str]()
    for path in paths:
        reason = _path_problem(path)
        if reason:
            problems.append(f"path {path!r}: {reason}")
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            problems.append(f"path {path!r}: differs from '{other}' in case only; rename one of them")
    return problems


def _path_problem(path: str) -> str | None:
    segments = path.split("/")
    if any(segment in {".", ".."} for segment in segments) or path.startswith("/"):
        return "leaves the folder or is not relative; write it relative to the folder, without '.' and '..'"
    if unicodedata.normalize("NFC", path) != path or not all(_SEGMENT.fullmatch(s) for s in segments):
        return "only letters A-Z a-z, digits, '.', '_' and '-' are allowed, in segments joined by '/'"
    if len(path) > 255:
        return f"{len(path)} bytes long; at most 255 are allowed"
    if any(segment.split(".")[0].lower() in _DEVICES for segment in segments):
        return "contains a name that Windows reserves for a device"
    return None


def open_regular(
    path: Path, *, follow_symlinks: bool = False, error: type[CoterieError] = AdmissionError
) -> BinaryIO:
    """Open an existing regular file for reading without ever blocking on it.

    Raises:
        CoterieError: Of class ``error``: the path is missing, a symlink (unless followed), a folder, a FIFO,
            a socket or a device.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_symlinks else os.O_NOFOLLOW)
    try:
        if not follow_symlinks and path.is_symlink():
            raise error(f"'{path}' is a symbolic link; put the file itself there.")
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise error(f"'{path}' does not exist.") from None
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(f"'{path}' cannot be opened: {reason}.") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"'{path}' is {describe_mode(mode)}; a regular file is needed.")
    return os.fdopen(descriptor, "rb", buffering=0)


def describe_mode(mode: int) -> str:
    """Name the file type in ``st_mode`` for a message."""
    names: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in names if test(mode)), "a device")


def read_bounded(
    path: Path, *, max_bytes: int, follow_symlinks: bool = False, error: type[CoterieError] = AdmissionError
) -> bytes:
    """Return the whole file, which may hold at most ``max_bytes``.

    Raises:
        CoterieError: Of class ``error``: not a regular file, or longer.
    """
    with open_regular(path, follow_symlinks=follow_symlinks, error=error) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = b"" if size > max_bytes else b"".join(iter_chunks(stream, limit=size + 1))
    if size > max_bytes or len(data) > max_bytes:
        raise error(f"'{path}' holds {max(size, len(data)):,} bytes; at most {max_bytes:,} are allowed.")
    return data


def iter_chunks(stream: BinaryIO, *, limit: int | None = None) -> Iterator[bytes]:
    """Yield what is left of ``stream``, at most ``limit`` bytes, in pieces of at most `CHUNK` bytes."""
    left = limit
    while left is None or left > 0:
        piece = stream.read(CHUNK if left is None else min(CHUNK, left))
        if not piece:
            return
        left = None if left is None else left - len(piece)
        yield piece


def sha256_file(path: Path, *, follow_symlinks: bool = False) -> str:
    """Return the hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open_regular(path, follow_symlinks=follow_symlinks) as stream:
        for piece in iter_chunks(stream):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to the disk, then rename it into place."""
    install_file(path, iter([data]))


def copy_file(source: Path, target: Path) -> None:
    """Copy one regular file (never a link) atomically and durably to ``target``."""
    with open_regular(source) as stream:
        install_file(target, iter_chunks(stream))


def install_file(path: Path, pieces: Iterator[bytes]) -> None:
    """Write the pieces one after the other beside ``path``, flush them to the disk, then rename into place."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            # mkstemp makes the file private; what is packed is meant to be read by others
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
