"""Runs the frozen lower layers of a decoder once and the trained upper layers from what they gave.

Knows that a decoder is embeddings, a list of layers and a head, for any family of transformers; knows nothing
of experts or routers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Record", "Replay", "Skip", "SplitDecoder", "StateCache"]


class Skip(nn.Module):
    """Stands in for a decoder layer that is not run: passes the hidden states on.

    Attributes that a family's loop reads from its layers (which attention a layer has, say) come from the layer
    that is stood in for, so that positions and masks stay aligned.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Pass the states on."""
        return hidden_states


class Record(Skip):
    """Keeps the hidden states that enter the layer it stands in for."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the states and pass them on."""
        self.states = hidden_states
        return hidden_states


class Replay(Skip):
    """Puts stored hidden states in the place of whatever the layers before it gave."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the stored states."""
        assert self.states is not None
        return self.states


class SplitDecoder:
    """A causal LM cut below layer ``first``.

    The cut replaces entries of the model's own layer list by stand-ins at the same positions, so each family's
    forward (masks, rotary tables, embedding scale, head) runs unchanged.

    Args:
        model: A causal LM of transformers, frozen and in eval mode.
        layers_prefix: Dotted name of the layer list, for instance ``"model.layers"``.
        first: The first layer above the cut.
    """

    def __init__(self, model: nn.Module, *, layers_prefix: str, first: int) -> None:
        self.model = model
        self.first = first
        parent, _, self._attribute = layers_prefix.rpartition(".")
        self._decoder = model.get_submodule(parent)
        self.layers: list[nn.Module] = list(self._decoder.get_submodule(self._attribute).children())
        self._record = Record(self.layers[first])
        self._replay = Replay(self.layers[first - 1]) if first else None
        self._skips = [Skip(layer) for layer in self.layers]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def _only(self, layers: list[nn.Module]) -> Iterator[None]:
        whole = getattr(self._decoder, self._attribute)
        setattr(self._decoder, self._attribute, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(self._decoder, self._attribute, whole)

    @torch.no_grad()
    def lower(self, ids: Tensor) -> Tensor:
        """Hidden states entering layer ``first``.

        Args:
            ids: ``(batch, sequence)`` int64, on any device.

        Returns:
            ``(batch, sequence, hidden)`` in the model's dtype, on its device.
        """
        ids = ids.to(self.device)
        parts = [*self.layers[: self.first], self._record, *self._skips[self.first + 1 :]]
        with self._only(parts):
            self._decoder(input_ids=ids, use_cache=False)
        states, self._record.states = self._record.states, None
        assert states is not None
        return states

    def logits(self, ids: Tensor, *, states: Tensor | None = None) -> Tensor:
        """Logits of the whole model, or of its upper layers on stored states.

        Args:
            ids: ``(batch, sequence)`` int64, on any device.
            states: ``(batch, sequence, hidden)`` that entered layer ``first`` for the same ids; None runs all
                layers.

        Returns:
            ``(batch, sequence, vocabulary)`` in the model's dtype, on its device.
        """
        ids = ids.to(self.device)
        if states is None or self._replay is None:
            result: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return result
        self._replay.states = states
        with self._only([*self._skips[: self.first - 1], self._replay, *self.layers[self.first :]]):
            result = self.model(input_ids=ids, use_cache=False).logits
        self._replay.states = None
        return result

    @torch.no_grad()
    def agrees(self, ids: Tensor) -> bool:
        """Whether the upper layers on stored states give what the whole model gives, on one batch.

        The same kernels run on the same numbers, so anything beyond rounding means a family whose forward this
        cut does not fit; the caller then trains on the whole model.
        """
        if self.first == 0:
            return True
        whole = self.logits(ids)
        upper = self.logits(ids, states=self.lower(ids))
        tolerance = 1e-5 if whole.dtype == torch.float32 else 1e-2
        return bool((whole - upper).abs().max() <= tolerance * whole.abs().max())


class StateCache:
    """Hidden states entering the first trained layer, for numbered windows, kept in memory as far as they fit.

    They stay on the device that computed them.

    Args:
        split: The decoder, cut at the first trained layer.
        ids: ``(windows, sequence)`` int64: every window the job will use.
        limit_bytes: How much memory the states may take; windows beyond it are computed again at each use.
        usable: False keeps nothing and makes `get` return None, so that the whole model runs.
    """

    def __init__(self, split: SplitDecoder, ids: Tensor, *, limit_bytes: int, usable: bool = True) -> None:
        self._split = split
        self.ids = ids
        self._usable = usable
        self._limit = limit_bytes
        self._states: Tensor | None = None
        self.filled = 0

    def fill(self, *, batch_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Run the lower layers over all windows once; yield each batch of states as it is stored.

        Yields:
            The windows' numbers and their states ``(batch, sequence, hidden)``.
        """
        for start in range(0, len(self.ids), batch_size):
            part = slice(start, min(start + batch_size, len(self.ids)))
            states = self._split.lower(self.ids[part])
            if self._usable and self._split.first:
                self._store(part, states)
            yield part, states

    def _store(self, part: slice, states: Tensor) -> None:
        if self._states is None:
            per_window = states[0].numel() * states.element_size()
            room = min(len(self.ids), self._limit // per_window)
            self._states = torch.empty(room, *states.shape[1:], dtype=states.dtype, device=states.device)
        if part.stop <= len(self._states):
            self._states[part] = states
            self.filled = part.stop

    def get(self, windows: Tensor) -> Tensor | None:
        """States of ``windows`` (``(batch,)`` int64 numbers), or None where the whole model must run."""
        if not self._usable or not self._split.first:
            return None
        if self._states is not None and int(windows.max()) < self.filled:
            return self._states[windows]
        return self._split.lower(self.ids[windows])
