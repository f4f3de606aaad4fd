"""Who is in a loaded model, and who of them may answer a request.

Knows names, owners and expert ids; knows nothing of layers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from composer.optout import OptOut, allowed_experts
from experts.errors import OptOutError

__all__ = ["Membership"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who is in a loaded model.

    Attributes:
        experts: Names in canonical order; the ids are 1, 2, ...
        owners: Owner of each expert.
        parent_owners: Other owners from whose experts each one was made; empty: of none.
        known_owners: Every owner of the composition, those left out included.
        digest: Identifies the base, the router and the loaded experts; caches carry it.
        folder: The composed folder the model was loaded from, or None.
        needs_all: Why a request cannot leave anybody out, where it cannot.
        needs_one: Whether a request must leave some expert in: the anchor is no expert.
    """

    experts: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    parent_owners: tuple[tuple[str, ...], ...] = ()
    known_owners: frozenset[str] = frozenset()
    digest: str = ""
    folder: str | None = None
    needs_all: str | None = None
    needs_one: bool = False

    @property
    def whose(self) -> tuple[frozenset[str], ...]:
        """For each expert, everybody whose leaving takes it along."""
        parents = self.parent_owners or ((),) * len(self.owners)
        return tuple(frozenset((owner, *more)) for owner, more in zip(self.owners, parents, strict=True))

    def allowed(self, opt_out: OptOut | None, allowed: torch.Tensor | None, *, batch: int) -> torch.Tensor:
        """Return who may answer each row of a request.

        Args:
            opt_out: Owners to leave out: a set for the whole batch or one set per row; None: nobody.
            allowed: bool ``(batch, experts + 1)``, the same as a mask of expert ids; not beside ``opt_out``.
            batch: Number of rows.

        Returns:
            bool ``(batch, experts + 1)`` on the CPU; the first column is the anchor.

        Raises:
            OptOutError: Both are given, one does not fit the batch, or this composition cannot answer such a request.
            UnknownNameError: ``opt_out`` names an owner who is not in this composition.
        """
        if opt_out is not None and allowed is not None:
            raise OptOutError("Give either opt_out or allowed, not both.")
        if allowed is None:
            sets = () if opt_out is None else opt_out
            mask = allowed_experts(sets, batch=batch, owners=self.whose, known=self.known_owners)
            return self._possible(mask)
        if allowed.shape != (batch, len(self.experts) + 1):
            raise OptOutError(
                f"allowed has shape {tuple(allowed.shape)}; it must be (batch, experts + 1) = "
                f"({batch}, {len(self.experts) + 1}), the anchor first."
            )
        return self._possible(allowed.to("cpu", torch.bool))

    def _possible(self, mask: torch.Tensor) -> torch.Tensor:
        others = mask[:, 1:]
        if self.needs_all is not None and not bool(others.all()):
            raise OptOutError(self.needs_all)
        if self.needs_one and others.shape[1] and not bool(others.any(-1).all()):
            raise OptOutError(
                "A row leaves every owner out, and the anchor is no expert here (`seed_expert: false`), so nobody is "
                "left to answer. Leave somebody in, or use the base itself."
            )
        return mask
