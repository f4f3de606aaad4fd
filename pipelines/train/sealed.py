"""Runs a task so that nothing but listed numbers and an error's class name comes back from it.

Knows file descriptors and the allow-list; knows nothing of training or of what the task reads.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.train.progress import ERROR_NAMES, allowed_scalars, error_name

__all__ = ["SealedResult", "private_log", "sealed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedResult:
    """What leaves a sealed task: numbers on success, a class name on failure, never a message."""

    scalars: Mapping[str, int | float] = field(default_factory=dict)
    error: str | None = None

    def to_wire(self) -> dict[str, object]:
        """Plain built-in values, for a transport that serialises."""
        return {"scalars": dict(self.scalars), "error": self.error}

    @classmethod
    def from_wire(cls, body: Mapping[str, object]) -> SealedResult:
        """Read what another process returned; anything outside the lists is a `ValueError`."""
        scalars, error = body.get("scalars"), body.get("error")
        if not isinstance(scalars, Mapping) or set(body) != {"scalars", "error"}:
            raise ValueError("a sealed result has other fields than scalars and error")
        if error is not None and error not in ERROR_NAMES:
            raise ValueError("a sealed result names an unknown error class")
        return cls(scalars=allowed_scalars(scalars), error=str(error) if error is not None else None)


def _open_private(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextmanager
def private_log(path: Path) -> Iterator[None]:
    """Send everything printed to ``path`` (mode 0600, appended) for as long as the block runs.

    File descriptors 1 and 2 themselves are replaced, so native libraries and child processes are covered;
    Python's own streams too, since whoever runs this process may have put others in their place.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = _open_private(path)
    os.fchmod(target, 0o600)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        with (
            open(target, "w", encoding="utf-8", buffering=1, closefd=False) as text,
            redirect_stdout(text),
            redirect_stderr(text),
        ):
            yield
    finally:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


def sealed(task: Callable[[], Mapping[str, int | float]], *, log: Path) -> SealedResult:
    """Run ``task`` and let out its allow-listed numbers, or the class name of what it raised.

    Everything printed, and the whole traceback, goes to ``log``, which only the owner can read. No exception
    leaves: its message, its cause and its frames may quote the data.
    """
    with private_log(log):
        try:
            return SealedResult(scalars=allowed_scalars(task()))
        except BaseException as error:
            traceback.print_exc()
            return SealedResult(error=error_name(error))
