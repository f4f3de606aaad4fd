"""Turns what a request says about owners into the rows of allowed experts.

Knows owner names and expert ids; knows nothing of tensors' meaning or of consent records. What names owners is a
collection at every door, never an iterator: whoever reads one again, at the next batch or in the next request, would
find it empty and leave nobody out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from experts.errors import OptOutError
from experts.names import unknown_name

if TYPE_CHECKING:
    import torch

__all__ = ["OptOut", "allowed_experts", "check_owners", "owner_names", "owners_per_row"]

OptOut = Collection[str] | Sequence[Collection[str]]
"""Owners to leave out: one collection of names for the whole batch, or one collection per row."""


def owner_names(owners: Collection[str]) -> frozenset[str]:
    """Return the owners that a caller names, where one collection is meant.

    Raises:
        OptOutError: A bare string, an iterator or whatever else is no collection, or an entry that is no name.
    """
    if isinstance(owners, str):
        raise OptOutError(f"opt_out is the string '{owners}'. Write {{'{owners}'}}.")
    _check_collection(owners)
    for entry in owners:
        if not isinstance(entry, str):
            raise OptOutError(f"opt_out holds {entry!r}, which is no owner's name. Write one set of names.")
    return frozenset(owners)


def _check_collection(given: Any) -> None:
    if not isinstance(given, Collection):
        raise OptOutError(
            f"opt_out is or holds a '{type(given).__name__}', which is no collection of owner names: what can be read "
            "only once leaves nobody out the next time. Write a set, a list or a tuple."
        )


def check_owners(owners: Collection[str], known: Collection[str]) -> frozenset[str]:
    """Return the owners as a set.

    Raises:
        OptOutError: A bare string, an iterator or whatever else is no collection of names.
        UnknownNameError: One of them has no expert in this composition; an opt-out is never ignored silently.
    """
    names = owner_names(owners)
    for owner in sorted(names):
        if owner not in known:
            raise unknown_name("owner", owner, known)
    return names


def owners_per_row(opt_out: OptOut, *, batch: int, known: Collection[str]) -> list[frozenset[str]]:
    """Spell an opt-out out for every row of a batch.

    Args:
        opt_out: ``{"acme"}`` for every row, or ``[{"acme"}, set()]`` with one collection per row.
        batch: Number of rows.
        known: Owners of the composition.

    Raises:
        OptOutError: A bare string, an iterator or whatever else is no collection, in it or as a whole, or another
            number of collections than rows.
        UnknownNameError: An owner who has no expert in this composition.
    """
    if isinstance(opt_out, str):
        raise OptOutError(
            f"opt_out is the string '{opt_out}'. Write {{'{opt_out}'}} for every row or a list with one set per row."
        )
    _check_collection(opt_out)
    entries = list(opt_out)
    if all(isinstance(entry, str) for entry in entries):
        owners = check_owners(entries, known)  # type: ignore[arg-type]
        return [owners] * batch
    if any(isinstance(entry, str) for entry in entries) or len(entries) != batch:
        raise OptOutError(
            f"opt_out has {len(entries)} entries for {batch} rows. Give one collection of owner names per row, or "
            "one set of names for the whole batch."
        )
    return [check_owners(entry, known) for entry in entries]


def allowed_experts(
    opt_out: OptOut, *, batch: int, owners: Sequence[str | Collection[str]], known: Collection[str]
) -> torch.Tensor:
    """Build the mask of allowed experts.

    Args:
        opt_out: See `owners_per_row`.
        batch: Number of rows.
        owners: Owner of each loaded expert, in canonical order (ids 1, 2, ...); several where it was made from experts
            of others: any of them takes it along.
        known: Owners of the composition, those left out at load included.

    Returns:
        bool ``(batch, len(owners) + 1)``; column 0, the anchor, is always True.
    """
    import torch

    rows = owners_per_row(opt_out, batch=batch, known=known)
    whose = [{entry} if isinstance(entry, str) else entry for entry in owners]
    flags = {row: [True, *(row.isdisjoint(each) for each in whose)] for row in set(rows)}
    return torch.tensor([flags[row] for row in rows])
