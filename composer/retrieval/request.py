"""What one pass through the base carries past its own code: the rows' slots, and where rows are routed or repeated.

Stock layers hand hidden states on and nothing else, so this travels in a context variable: it is per thread and per
task, and nothing leaks from one request into another. Knows rows, slots and layers; knows nothing of owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["EncodingPass", "Slots", "current_pass", "current_slots", "encoding_pass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """The slot of every row of a batch; slot 0 is the base.

    Attributes:
        index: int64 ``(rows,)``.
        present: The slots that occur, ascending.
    """

    index: torch.Tensor
    present: tuple[int, ...]

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device) -> Slots | None:
        """Number the rows of a batch; None where every row is the base's, which then runs untouched."""
        present = tuple(sorted(set(slots)))
        if present in ((), (0,)):
            return None
        return cls(index=torch.tensor(slots, dtype=torch.int64, device=device), present=present)


@dataclass(slots=True, kw_only=True)
class EncodingPass:
    """One pass through the base.

    Attributes:
        slots: Of the rows as they are now; None: the base alone.
        route_at: Layer whose input decides; None: no layer.
        route: Called with that input, ``(rows, positions, d)``; sets the slots, perhaps the rows to repeat.
        repeat_at: Layer that the rows are repeated before.
        rows: int64 ``(n,)``, which row each repeated row is a copy of; None: rows stay as they are.
    """

    slots: Slots | None = None
    route_at: int | None = None
    route: Callable[[torch.Tensor], None] | None = None
    repeat_at: int = 0
    rows: torch.Tensor | None = None
    _batch: int = field(default=0)

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Do what is due before a layer; returns its changed arguments, or None where they stay."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == self.route_at and self.route is not None:
            self.route(hidden)
        if self.rows is None or layer < self.repeat_at:
            return None
        if layer == self.repeat_at:
            self._batch = hidden.shape[0]
            hidden = hidden.index_select(0, self.rows)
        if args:
            return (hidden, *(self._repeated(value) for value in args[1:])), self._repeated(kwargs)
        return (), {**self._repeated(kwargs), "hidden_states": hidden}

    def _repeated(self, value: Any) -> Any:
        """Repeat masks and whatever else has a row for each row of the batch."""
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == self._batch:
            return value.index_select(0, self.rows)  # type: ignore[arg-type]
        if isinstance(value, tuple):
            return tuple(self._repeated(item) for item in value)
        if isinstance(value, dict):
            return {key: self._repeated(item) for key, item in value.items()}
        return value


_PASS: ContextVar[EncodingPass | None] = ContextVar("composer_encoding_pass", default=None)


def current_pass() -> EncodingPass | None:
    """Return the pass that this thread or task is in, if any."""
    return _PASS.get()


def current_slots() -> Slots | None:
    """Return the slots of the pass that this thread or task is in; None: the base alone."""
    running = _PASS.get()
    return None if running is None else running.slots


@contextmanager
def encoding_pass(running: EncodingPass) -> Iterator[EncodingPass]:
    """Let the enclosed pass through the base see ``running``."""
    token = _PASS.set(running)
    try:
        yield running
    finally:
        _PASS.reset(token)
