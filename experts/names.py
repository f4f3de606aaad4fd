"""Names and what to say about a wrong one.

Knows the grammar of owner, expert and reference names and how to suggest the nearest known name; knows
nothing of where names are stored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from experts.errors import UnknownNameError

__all__ = [
    "OWNER_PATTERN",
    "RESERVED_OWNERS",
    "check_expert_name",
    "check_owner_name",
    "parse_reference",
    "unknown_name",
]

OWNER_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
"""One segment of a name: lower-case letters, digits, ``_``, ``.`` and ``-``, at most 64 characters."""

RESERVED_OWNERS = ("anchor", "base")
"""What results call the base model beside owners: whoever had such a name would share its weights and columns."""

_REFERENCE = re.compile(r"(?P<name>[^@\s]+?)(?:@(?P<version>\d+|sha256:[0-9a-f]{64}))?")


def unknown_name(what: str, given: str, known: Iterable[str], *, advice: str = "") -> UnknownNameError:
    """Build the error for an unknown name: what was given, what is near, what exists.

    Args:
        what: The noun, for instance ``"scorer"``.
        given: The name that was not found.
        known: Every name that would have been accepted.
        advice: A closing sentence that says what to do.
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    listing = f" Known: {shown}." if names else f" There is no {what} yet."
    return UnknownNameError(f"Unknown {what} '{given}'.{guess}{listing}{' ' + advice if advice else ''}")


def check_owner_name(owner: str) -> str:
    """Return ``owner`` if it is well formed and not reserved, else raise `UnknownNameError`."""
    if not OWNER_PATTERN.fullmatch(owner):
        raise UnknownNameError(
            f"'{owner}' is not an owner name: use 1 to 64 lower-case letters, digits, '_', '.' or '-', "
            "starting with a letter or digit."
        )
    _check_free(owner)
    return owner


def check_expert_name(name: str) -> str:
    """Return ``name`` if it has the form ``owner/expert`` of no reserved owner, else raise `UnknownNameError`."""
    owner, slash, expert = name.partition("/")
    if not slash or not OWNER_PATTERN.fullmatch(owner) or not OWNER_PATTERN.fullmatch(expert):
        raise UnknownNameError(
            f"'{name}' is not an expert name: write owner/expert, for instance 'acme/contracts', each part "
            "1 to 64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit."
        )
    _check_free(owner)
    return name


def _check_free(owner: str) -> None:
    if owner in RESERVED_OWNERS:
        raise UnknownNameError(
            f"'{owner}' is no name for an owner: results call the base model so. Reserved: "
            f"{', '.join(RESERVED_OWNERS)}. Choose another name."
        )


def parse_reference(reference: str) -> tuple[str, str | None]:
    """Split ``owner/expert[@VERSION]`` into the name and the version label or digest (None: the newest).

    Raises:
        UnknownNameError: ``reference`` has another form.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UnknownNameError(
            f"'{reference}' is not an expert reference: write owner/expert, owner/expert@3 or "
            "owner/expert@sha256:<64 hexadecimal digits>."
        )
    return check_expert_name(match["name"]), match["version"]
