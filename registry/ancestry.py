"""Whose experts an expert was made from, directly or not: their owners' opt-outs are opt-outs of it too.

Follows the digests in cards' ``derived_from`` through the index; knows nothing of consent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from registry import index

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from registry.blobs import BlobStore

__all__ = ["ancestry"]


def ancestry(
    connection: sa.Connection, blobs: BlobStore, card: ExpertCard
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the owners of the experts that a card's was made from, and digests of such that are not registered.

    Args:
        connection: Of the index.
        blobs: Where the parents' cards are.
        card: Of the expert that was made, registered or not.

    Returns:
        Other owners than its own, sorted; card digests, sorted.

    Raises:
        IntegrityError: The card of a parent is missing or damaged.
    """
    from experts.card import ExpertCard

    owners, unknown, seen = set[str](), set[str](), set[str]()
    open_ = list(card.derived_from)
    while open_:
        digest = open_.pop()
        if digest in seen:
            continue
        seen.add(digest)
        owner = connection.scalar(sa.select(index.experts.c.owner).where(index.experts.c.digest == digest))
        if owner is None:
            unknown.add(digest)
            continue
        owners.add(owner)
        open_ += ExpertCard.from_bytes(blobs.read(digest)).derived_from
    return tuple(sorted(owners - {card.owner})), tuple(sorted(unknown))
