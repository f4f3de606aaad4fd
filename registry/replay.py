"""Applies an entry of the audit log to the tables, whether it happens now or happened long ago.

The only place that writes rows besides the log itself, so that a log replayed with its blobs gives the index
that the changes gave. Knows what each action means; checks nothing that was checked when it was logged.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from experts.errors import IntegrityError
from registry import index
from registry.blobs import BlobStore
from registry.records import AuditEntry

__all__ = ["TABLES", "apply"]

TABLES = (index.bases, index.base_routings, index.experts, index.consents)
"""Every table that follows from the audit log."""


def apply(connection: sa.Connection, entry: AuditEntry, *, blobs: BlobStore) -> None:
    """Insert the rows of one change.

    Raises:
        IntegrityError: A blob of the change is missing or damaged, or the action is not known.
    """
    if entry.action not in _ACTIONS:
        raise IntegrityError(
            f"Entry {entry.sequence} of the audit log has the unknown action '{entry.action}'."
        )
    _ACTIONS[entry.action](connection, entry, blobs)


def _add_base(connection: sa.Connection, entry: AuditEntry, blobs: BlobStore) -> None:
    from registry.bases import StoredBase

    digest = str(entry.detail["record"])
    stored = StoredBase.from_bytes(blobs.read(digest))
    row = {
        "name": stored.name,
        "fingerprint": stored.fingerprint,
        "tokenizer_fingerprint": stored.tokenizer_fingerprint,
        "record": digest,
        "created": entry.at,
    }
    connection.execute(sa.insert(index.bases), row)


def _add_base_routing(connection: sa.Connection, entry: AuditEntry, blobs: BlobStore) -> None:
    from registry.bases import StoredRouting

    digest = str(entry.detail["record"])
    stored = StoredRouting.from_bytes(blobs.read(digest))
    row = {"base": stored.base, "version": entry.detail["version"], "record": digest, "created": entry.at}
    connection.execute(sa.insert(index.base_routings), row)


def _add_expert(connection: sa.Connection, entry: AuditEntry, blobs: BlobStore) -> None:
    from experts.card import ExpertCard

    digest = str(entry.detail["card"])
    card = ExpertCard.from_bytes(blobs.read(digest))
    highest = connection.scalar(sa.select(sa.func.max(index.experts.c.sequence)))
    row = {
        "sequence": (highest or 0) + 1,
        "name": card.name,
        "version": card.version,
        "owner": card.owner,
        "domain": card.domain,
        "kind": card.kind,
        "license": card.license,
        "base_name": entry.detail["base"],
        "base_fingerprint": card.base.fingerprint,
        "digest": digest,
        "parameters": entry.detail["parameters"],
        "bytes": sum(file.size for file in card.files),
        "created": entry.at,
    }
    connection.execute(sa.insert(index.experts), row)


def _add_consent(connection: sa.Connection, entry: AuditEntry, blobs: BlobStore) -> None:
    row = {
        "sequence": entry.sequence,
        "owner": entry.subject,
        "action": entry.action.removeprefix("consent."),
        "at": entry.at,
        "who": entry.detail["who"],
        "reason": entry.detail["reason"],
    }
    connection.execute(sa.insert(index.consents), row)


_ACTIONS: dict[str, Callable[[sa.Connection, AuditEntry, BlobStore], None]] = {
    "base.add": _add_base,
    "base.routing": _add_base_routing,
    "expert.register": _add_expert,
    "consent.opt_out": _add_consent,
    "consent.opt_in": _add_consent,
}
