"""Who stands at which index of a stock checkpoint, and the trunk around them: the base's own, merged, or one owner's.

Knows recipes of FFN experts by what they seat; opens no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from composer.export.target import ANCHOR
from composer.lock import Lock
from composer.manifest import TrunkSpec
from composer.members import Member, Members

__all__ = ["SEATED", "Seat", "merged_trunk", "seat_all"]

SEATED = ("flexolmo", "btx", "sparse_upcycle")
"""Recipes whose models are mixtures of FFNs and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One expert of every layer.

    Attributes:
        id: Of the composed model; 0 is the anchor, or the first copy.
        name: As the composed model calls it.
        member: Whose FFNs they are; None: the anchor's.
    """

    id: int
    name: str
    member: Member | None


def seat_all(members: Members) -> tuple[Seat, ...]:
    """Return the seats in the order of the checkpoint.

    Args:
        members: At least one, of a recipe of `SEATED`.
    """
    spec = members.lock.upcycle
    if spec is not None and spec.copies:
        (only,) = members.experts
        return tuple(
            Seat(id=number, name=f"{only.locked.name}#{number}", member=only) for number in range(spec.copies)
        )
    others = tuple(Seat(id=m.id, name=m.locked.name, member=m) for m in members.experts)
    if spec is not None and not spec.seed_expert:
        return others
    return (Seat(id=ANCHOR, name="anchor", member=None), *others)


def merged_trunk(lock: Lock) -> TrunkSpec | None:
    """Return how the trunk is merged; None where it is one model's own."""
    spec = lock.upcycle
    return None if spec is None or spec.copies or not isinstance(spec.trunk, TrunkSpec) else spec.trunk
