"""Whom the running call of ``generate`` leaves out, for every call inside of it that does not say so itself.

`transformers` calls a model behind the back of its ``forward`` arguments: guidance asks for the scores of a second
prompt, and an assistant gets the arguments of the model that it assists. Knows names, masks and rows; knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from composer.optout import OptOut, owners_per_row
from experts.errors import OptOutError

__all__ = ["Asked", "RunningRequest", "current_request", "running_request"]

Asked = tuple[OptOut | None, torch.Tensor | None]
"""What a request says: owners to leave out, or the mask of allowed experts, or neither."""


@dataclass(slots=True, kw_only=True)
class RunningRequest:
    """What a call of ``generate`` asked for, row by row.

    Attributes:
        left_out: Owners that each row leaves out; where a mask was given, those who have an expert outside of it.
        allowed: bool ``(rows, experts + 1)``, the mask, or None.
        experts: Names of the experts that the mask's columns mean, the anchor's apart.
        copies: How many rows of a batch each row has become, as beams or as sequences to return.
    """

    left_out: Sequence[frozenset[str]]
    allowed: torch.Tensor | None
    experts: tuple[str, ...]
    copies: int = 1

    @classmethod
    def of(
        cls,
        asked: Asked,
        *,
        batch: int,
        experts: tuple[str, ...],
        owners: Sequence[str],
        known: Collection[str],
    ) -> RunningRequest:
        """Write down what a call asks of a model.

        Args:
            asked: By that call; checked by the model already where it is a mask.
            batch: Number of rows.
            experts: Of the model.
            owners: Owner of each.
            known: Every owner of the composition.

        Raises:
            OptOutError: See `owners_per_row`.
            UnknownNameError: See there.
        """
        opt_out, allowed = asked
        if allowed is None:
            left_out = owners_per_row(() if opt_out is None else opt_out, batch=batch, known=known)
        else:
            allowed = allowed.to("cpu", torch.bool)
            left_out = [
                frozenset(owner for owner, stays in zip(owners, row, strict=True) if not stays)
                for row in allowed[:, 1:].tolist()
            ]
        return cls(left_out=left_out, allowed=allowed, experts=experts)

    def asks(self, *, batch: int, experts: tuple[str, ...], known: Collection[str]) -> Asked:
        """Return the same request, put to a model: by the mask where it has the same experts, else by owners.

        Args:
            batch: Number of rows that the model is run on.
            experts: Of that model.
            known: Every owner of its composition; it has nothing of the others.

        Raises:
            OptOutError: Rows leave different owners out, and the batch does not tell which rows are whose.
        """
        rows = self._rows(batch)
        if self.allowed is not None and self.experts == experts:
            return None, self.allowed[rows]
        return [self.left_out[row].intersection(known) for row in rows], None

    def _rows(self, batch: int) -> list[int]:
        """Return the row of the request that each row of a batch is."""
        rows = len(self.left_out)
        if batch == rows:
            return list(range(rows))
        if batch == rows * self.copies:  # copies of a row stand beside each other
            return [row // self.copies for row in range(batch)]
        masks = self.left_out if self.allowed is None else self.allowed.tolist()
        if all(mask == masks[0] for mask in masks):
            return [0] * batch
        raise OptOutError(
            f"Inside of a generate() of {rows} rows that leave different owners out, the model was called with a batch "
            f"of {batch} and without opt_out, so nothing tells whom each of these rows leaves out. Give that call "
            "opt_out, or generate these rows one by one."
        )


_RUNNING: ContextVar[RunningRequest | None] = ContextVar("composer_running_request", default=None)


def current_request() -> RunningRequest | None:
    """Return what the innermost ``generate`` of this thread or task asked for, if one is running."""
    return _RUNNING.get()


@contextmanager
def running_request(request: RunningRequest) -> Iterator[None]:
    """Let calls in the enclosed code see the request."""
    token = _RUNNING.set(request)
    try:
        yield
    finally:
        _RUNNING.reset(token)
