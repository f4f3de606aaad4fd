"""The consent ledger: who has opted out, since when, by whom and why, and who came back.

Records are only ever added; the current state is the newest record of each owner. Knows nothing of what an
opt-out does to a composed model.
"""

from __future__ import annotations

import getpass
import os

import sqlalchemy as sa

from experts.errors import ConsentError, RegistryError
from experts.names import check_owner_name, unknown_name
from registry import index
from registry.records import ConsentAction, ConsentRecord, OptOut
from registry.storage import Storage

__all__ = ["current_opt_outs", "history", "known_owners", "opt_in", "opt_out", "require_consent"]

_RECORD_ANYWAY = (
    " The opt-out was not recorded. Somebody else, whose text was tuned on or whose documents are in an index, opts "
    "out with --unknown-owner (allow_unknown=True)."
)
_MAX_REASON = 2000
_MAX_WHO = 200


def opt_out(
    storage: Storage, owner: str, *, reason: str, by: str | None, allow_unknown: bool = False
) -> OptOut:
    """Add an opt-out to the ledger. Errors: see `registry.Registry.opt_out`."""
    reason, who = _checked_text("reason", reason, limit=_MAX_REASON), _checked_who(by)
    check_owner_name(owner)
    with storage.write(doing=f"opting out '{owner}'") as connection:
        if not allow_unknown:
            _require_owner(connection, owner, root=str(storage.root), advice=_RECORD_ANYWAY)
        if (present := _find(connection, owner)) is not None:
            raise RegistryError(
                f"'{owner}' is opted out already: since {present.when}, by {present.who}, because: "
                f"{present.reason}. Nothing was changed."
            )
        entry = storage.record(
            connection, "consent.opt_out", subject=owner, detail={"who": who, "reason": reason}
        )
    return OptOut(owner=owner, when=entry.at, who=who, reason=reason)


def opt_in(storage: Storage, owner: str, *, reason: str, by: str | None) -> ConsentRecord:
    """Add an opt-in to the ledger. Errors: see `registry.Registry.opt_in`."""
    reason, who = _checked_text("reason", reason, limit=_MAX_REASON), _checked_who(by)
    with storage.write(doing=f"opting '{owner}' in again") as connection:
        _require_owner(connection, owner, root=str(storage.root))
        if _find(connection, owner) is None:
            out = ", ".join(record.owner for record in current_opt_outs(connection)) or "nobody"
            raise RegistryError(
                f"'{owner}' is not opted out, so there is no opt-out to take back. Opted out now: {out}."
            )
        entry = storage.record(
            connection, "consent.opt_in", subject=owner, detail={"who": who, "reason": reason}
        )
    return ConsentRecord(
        sequence=entry.sequence, owner=owner, action="opt_in", when=entry.at, who=who, reason=reason
    )


def history(connection: sa.Connection) -> list[ConsentRecord]:
    """Return every record of the ledger in order."""
    rows = connection.execute(sa.select(index.consents).order_by(index.consents.c.sequence))
    return [
        ConsentRecord(
            sequence=row.sequence,
            owner=row.owner,
            action=_action(row.action),
            when=row.at,
            who=row.who,
            reason=row.reason,
        )
        for row in rows
    ]


def current_opt_outs(connection: sa.Connection) -> list[OptOut]:
    """Return the owners who are out now, by name."""
    newest = {record.owner: record for record in history(connection)}
    return [
        OptOut(owner=record.owner, when=record.when, who=record.who, reason=record.reason)
        for _, record in sorted(newest.items())
        if record.action == "opt_out"
    ]


def known_owners(connection: sa.Connection) -> set[str]:
    """Return every owner with a registered expert, opted out or not."""
    return set(connection.scalars(sa.select(index.experts.c.owner).distinct()))


def require_consent(connection: sa.Connection, owner: str, *, of: str = "") -> None:
    """Raise `ConsentError`, saying who, when and why, if the owner is out now; ``of`` says what it is about."""
    if (record := _find(connection, owner)) is not None:
        raise ConsentError(
            f"{of}'{owner}' has opted out: since {record.when}, by {record.who}, because: {record.reason}. The "
            "registry takes no expert of this owner until the opt-out is taken back (coterie opt-out "
            f"remove {owner})."
        )


def _find(connection: sa.Connection, owner: str) -> OptOut | None:
    return next((record for record in current_opt_outs(connection) if record.owner == owner), None)


def _require_owner(connection: sa.Connection, owner: str, *, root: str, advice: str = "") -> None:
    """Refuse who is neither an expert's owner nor in the ledger: a slip of the pen would leave the wrong one out."""
    owners = known_owners(connection) | {record.owner for record in history(connection)}
    if owner not in owners:
        said = f"Owners are those with an expert in the registry '{root}'."
        raise unknown_name("owner", owner, owners, advice=f"{said}{advice}")


def _action(text: str) -> ConsentAction:
    # Anything that is not plainly an opt-in counts as an opt-out: a damaged row must not revive an owner.
    return "opt_in" if text == "opt_in" else "opt_out"


def _checked_who(by: str | None) -> str:
    return _checked_text("name of who does it", _current_user() if by is None else by, limit=_MAX_WHO)


def _checked_text(what: str, text: str, *, limit: int) -> str:
    text = text.strip()
    if not text or len(text) > limit or not text.isprintable():
        raise RegistryError(
            f"The {what} of a consent record is {text[:40]!r}: write 1 to {limit} printable characters on "
            "one line."
        )
    return text


def _current_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without an entry for this user
        return f"uid {os.getuid()}"
