"""Turns whatever a command raises into one message on stderr and an exit code.

Knows coterie's error tree, the operating system's errors and the usage errors of the argument parser;
knows no command.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from experts.errors import CoterieError
from experts.names import unknown_name
from pipelines.cli.output import human_bytes, printable

if TYPE_CHECKING:
    from typer.models import Context

__all__ = ["FAILURE", "INTERRUPTED", "Interrupted", "NoSpaceError", "guarded", "resumable", "writing_to"]

FAILURE = 1
INTERRUPTED = 130
"""What a shell reports for a process that SIGINT ended: 128 + 2."""

TRACEBACK_VARIABLE = "COTERIE_TRACEBACK"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNKNOWN_COMMAND = re.compile(r"No such command '(.*?)'[.?]")


class Interrupted(Exception):  # noqa: N818 - Ctrl-C is no error
    """Ctrl-C in a command that has something to say about what it left behind."""


class NoSpaceError(CoterieError):
    """The device that holds the output is full."""


def guarded(run: Callable[[], object]) -> int:
    """Call ``run`` and return the exit code for what came of it, having reported any error on stderr.

    ``run`` returns None or an exit code. Set ``COTERIE_TRACEBACK=1`` to see where an error came from.
    """
    try:
        code = run()
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
            traceback.print_exc()
        message, exit_code = _report(error)
        sys.stderr.write(f"{message}\n")
        return exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        sys.stderr.write("Interrupted.\n")
    return code if isinstance(code, int) else 0


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """Let Ctrl-C inside the block say ``advice``: what was left behind and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(advice) from None


@contextmanager
def writing_to(target: Path, *, needed: int | None = None) -> Iterator[None]:
    """Let a full device inside the block be reported with the place and the bytes.

    Args:
        target: Where the command writes; need not exist.
        needed: How many bytes the command is about to write, where it knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpaceError(_no_space(error, target=target, needed=needed)) from error


def _no_space(error: OSError, *, target: Path | None, needed: int | None) -> str:
    place = Path(error.filename) if error.filename else target
    need = f" {human_bytes(needed)} are needed," if needed is not None else ""
    reason = "The quota is used up" if error.errno == errno.EDQUOT else "No space is left on the device"
    if place is None:
        return f"{reason}. Nothing half-written was kept. Free some space and try again."
    free = f"{need} {human_bytes(_free_bytes(target or place))} are free."
    return (
        f"{reason} that holds {printable(str(place))}:{free} Nothing half-written was kept. "
        "Free some space or choose another place and try again."
    )


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _report(error: Exception) -> tuple[str, int]:
    if isinstance(error, CoterieError):
        message = printable(str(error), keep="\n")
        return f"Error: {message}", error.exit_code
    if isinstance(error, Interrupted):
        return f"Interrupted: {error}", INTERRUPTED
    if isinstance(error, typer.Abort):
        return "Aborted.", FAILURE
    if isinstance(error, typer.TyperException):
        return _usage(error), error.exit_code
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"Error: {_no_space(error, target=None, needed=None)}", NoSpaceError.exit_code
    if isinstance(error, OSError):
        return f"Error: {_operating_system(error)}", FAILURE
    return _unexpected(error), FAILURE


def _usage(error: typer.TyperException) -> str:
    """Usage, the way to the help and what was wrong, with the nearest name for an unknown one."""
    context: Context | None = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.format_message()
    lines = [f"Error: {_usage_problem(error, context)}"]
    if context is not None:
        lines = [context.get_usage(), f"Try '{context.command_path} --help' for help.", "", *lines]
    return "\n".join(lines)


def _usage_problem(error: typer.TyperException, context: Context | None) -> str:
    """Say what was wrong; an unknown name is reported as everywhere in coterie, with the nearest and all known."""
    option = getattr(error, "option_name", None)
    unknown = _UNKNOWN_COMMAND.match(error.format_message())
    if unknown and isinstance(commands := getattr(getattr(context, "command", None), "commands", None), dict):
        return str(unknown_name("command", unknown[1], commands))
    if context is not None and type(error).__name__ == "NoSuchOption" and isinstance(option, str):
        known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        return str(unknown_name("option", option, [name for name in known if name.startswith("-")]))
    return printable(error.format_message(), keep="\n\t")


def _operating_system(error: OSError) -> str:
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    if error.filename is None:
        return printable(f"{reason}.")
    return printable(f"{reason}: {error.filename}")


def _unexpected(error: Exception) -> str:
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"Error: something unexpected happened ({printable(detail)}). This is a fault in coterie; "
        f"set {TRACEBACK_VARIABLE}=1 to see where it came from."
    )
