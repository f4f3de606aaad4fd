"""Runs a batch of queries: the passes through the base that a router needs, and the fusion of what they give.

Hard routing on the base's embedding takes a second pass; routing on the state that enters a layer, or fusing all
experts, takes one, with rows repeated from that layer on. Knows slots, passes and pooling; knows no owner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from composer.retrieval.facts import Array
from composer.retrieval.pooling import Pooler, mean_state, mean_token
from composer.retrieval.request import EncodingPass, Slots, current_pass, encoding_pass
from composer.retrieval.router import Decision, Router

__all__ = ["Engine", "LayerGate"]

Inputs = dict[str, torch.Tensor]


class LayerGate:
    """Called before a layer of the base: lets the running pass route or repeat rows there.

    Args:
        layer: The layer's number.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Do what is due; see `EncodingPass.enter`."""
        running = current_pass()
        return None if running is None else running.enter(self.layer, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Rows to be encoded: which query, by whom."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]

    @classmethod
    def wanted(cls, decision: Decision) -> _Entries:
        """Whoever has a weight, by query."""
        rows, columns = np.nonzero(decision.weights)
        return cls(rows, decision.slots[rows, columns])

    @classmethod
    def everybody(cls, allowed: NDArray[np.bool_], rows: int) -> _Entries:
        """The base and all allowed experts, by query."""
        flags = np.broadcast_to(allowed, (rows, allowed.shape[1]))
        with_base = np.concatenate([np.ones((rows, 1), dtype=bool), flags], axis=1)
        found, slots = np.nonzero(with_base)
        return cls(found, slots)

    def on(self, device: torch.device) -> torch.Tensor:
        """The rows as an index."""
        return torch.from_numpy(self.rows).to(device)

    def at(self, places: NDArray[np.int64]) -> _Entries:
        """Some of the entries."""
        return _Entries(self.rows[places], self.slots[places])

    def inputs(self, inputs: Inputs) -> Inputs:
        """The batch's inputs, one row for each entry."""
        return {name: value.index_select(0, self.on(value.device)) for name, value in inputs.items()}


class Engine:
    """Encodes queries with a base that holds stacked adapters.

    Args:
        run: Calls the base; returns its output, whose ``last_hidden_state`` is ``(rows, positions, d)``.
        router: Decides by features.
        pooler: Makes the base's embedding of token states.
        state_layer: Layer whose input is routed on; None: the embedding is.
        lowest: Slot (from 1) -> lowest layer that the expert changes.
        share_lower_layers: Whether repeated rows share the layers below.
        whole: Slot -> calls a whole query encoder, which stands beside the base; other slots hold adapters.
        tokens: The base's token embeddings, where their mean is routed on; None: something else is.
    """

    def __init__(
        self,
        run: Callable[[Inputs], Any],
        router: Router,
        pooler: Pooler,
        *,
        state_layer: int | None,
        lowest: Sequence[int],
        share_lower_layers: bool,
        whole: Mapping[int, Callable[[Inputs], Any]] | None = None,
        tokens: nn.Module | None = None,
    ) -> None:
        self.run = run
        self.router = router
        self.pooler = pooler
        self.state_layer = state_layer
        self.lowest = tuple(lowest)
        self.share_lower_layers = share_lower_layers
        self.whole = dict(whole or {})
        self.tokens = tokens

    def encode(
        self, inputs: Inputs, mask: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool = False
    ) -> tuple[Any, Decision]:
        """Route and encode a batch.

        Args:
            inputs: What the base takes, a row for each query.
            mask: ``(rows, positions)``, 0 on padding.
            allowed: ``(1 or rows, experts)``.
            trace: Whether the decision should hold all scores.

        Returns:
            The base's output with the fused ``last_hidden_state``, and who was chosen.
        """
        if self.tokens is not None:
            return self._decided_before(inputs, mask, allowed, trace=trace)
        if self.state_layer is not None:
            return self._in_one_pass(inputs, mask, allowed, trace=trace)
        if self.router.selector.most is None:
            return self._all_at_once(inputs, mask, allowed, trace=trace)
        return self._in_two_passes(inputs, mask, allowed, trace=trace)

    # ---------------------------------------------------------------- the three ways

    def _in_one_pass(
        self, inputs: Inputs, mask: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool
    ) -> tuple[Any, Decision]:
        """Route on the state that enters a layer, and go on with the chosen experts from there."""
        decided: list[Decision] = []
        assert self.state_layer is not None
        running = EncodingPass(route_at=self.state_layer, repeat_at=self.state_layer)

        def route(hidden: torch.Tensor) -> None:
            decision = self._decide(mean_state(hidden, mask), allowed, trace=trace)
            decided.append(decision)
            entries = _Entries.wanted(decision)
            running.slots = Slots.of(entries.slots.tolist(), hidden.device)
            running.rows = None if len(entries.rows) == len(mask) else entries.on(hidden.device)

        running.route = route
        with encoding_pass(running):
            output = self.run(inputs)
        states = output.last_hidden_state
        if len(states) != len(mask):
            output.last_hidden_state = self._fused(states, mask, _Entries.wanted(decided[0]), decided[0])
        return output, decided[0]

    def _decided_before(
        self, inputs: Inputs, mask: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool
    ) -> tuple[Any, Decision]:
        """Route on the token embeddings, and run the chosen experts alone; the base runs where it was chosen."""
        assert self.tokens is not None
        features = mean_token(self.tokens, inputs["input_ids"], mask)
        decision = self._decide(features, allowed, trace=trace)
        entries = _Entries.wanted(decision)
        alone = len(entries.rows) == len(mask)
        output = self._answered(
            inputs, entries, lambda rest: self._repeated(inputs, rest, share=self.share_lower_layers)
        )
        if not alone:
            output.last_hidden_state = self._fused(output.last_hidden_state, mask, entries, decision)
        return output, decision

    def _all_at_once(
        self, inputs: Inputs, mask: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool
    ) -> tuple[Any, Decision]:
        """Run the base and every allowed expert, then weigh by the base's embedding."""
        rows, device = len(mask), mask.device
        entries = _Entries.everybody(allowed, rows)
        experts = sorted({int(slot) for slot in entries.slots} - {0})
        if not experts:
            output = self.run(inputs)
            return output, self._decide(
                self.pooler.embed(output.last_hidden_state, mask), allowed, trace=trace
            )
        output = self._answered(
            inputs, entries, lambda rest: self._repeated(inputs, rest, share=self.share_lower_layers)
        )
        states = output.last_hidden_state
        base = states[torch.from_numpy(np.flatnonzero(entries.slots == 0)).to(device)]
        decision = self._decide(self.pooler.embed(base, mask), allowed, trace=trace)
        output.last_hidden_state = self._fused(states, mask, entries, decision)
        return output, decision

    def _in_two_passes(
        self, inputs: Inputs, mask: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool
    ) -> tuple[Any, Decision]:
        """Run the base, route on its embedding, and run again only the rows that an expert answers."""
        output = self.run(inputs)
        states = output.last_hidden_state
        decision = self._decide(self.pooler.embed(states, mask), allowed, trace=trace)
        wanted = _Entries.wanted(decision)
        again = wanted.slots > 0
        if not again.any():
            return output, decision
        entries = _Entries(wanted.rows[again], wanted.slots[again])
        rows = entries.on(mask.device)
        adapted = self._answered(inputs, entries, lambda rest: self._selected(inputs, rest)).last_hidden_state
        if len(wanted.rows) == len(mask):  # one answer a query: the base's rows are already there
            output.last_hidden_state = states.index_copy(0, rows, adapted)
        else:
            output.last_hidden_state = self._fused(adapted, mask, entries, decision, base=states)
        return output, decision

    # ---------------------------------------------------------------- their parts

    def _answered(self, inputs: Inputs, entries: _Entries, run: Callable[[_Entries], Any]) -> Any:
        """Encode entries: whole encoders take their own rows, ``run`` the base's and the adapters'.

        Returns:
            The output of one of them, with ``last_hidden_state`` ``(entries, positions, d)`` in the entries' order.
        """
        own = [slot for slot in self.whole if slot in entries.slots]
        if not own:
            return run(entries)
        places = [np.flatnonzero(entries.slots == slot) for slot in own]
        outputs = [
            self.whole[slot](entries.at(mine).inputs(inputs)) for slot, mine in zip(own, places, strict=True)
        ]
        rest = np.flatnonzero(~np.isin(entries.slots, own))
        if len(rest):
            places.append(rest)
            outputs.append(run(entries.at(rest)))
        states = torch.cat([output.last_hidden_state for output in outputs])
        order = torch.from_numpy(np.argsort(np.concatenate(places))).to(states.device)
        outputs[-1].last_hidden_state = states.index_select(0, order)
        return outputs[-1]

    def _selected(self, inputs: Inputs, entries: _Entries) -> Any:
        """Run the base with the entries' adapters on the entries' rows."""
        chosen = entries.inputs(inputs)
        with encoding_pass(EncodingPass(slots=Slots.of(entries.slots.tolist(), chosen["input_ids"].device))):
            return self.run(chosen)

    def _repeated(self, inputs: Inputs, entries: _Entries, *, share: bool) -> Any:
        """Run the base with the entries' adapters, rows repeated within the pass where a query has several entries."""
        device = inputs["input_ids"].device
        adapters = sorted({int(slot) for slot in entries.slots} - {0})
        alone = np.array_equal(entries.rows, np.arange(len(inputs["input_ids"])))
        running = EncodingPass(
            slots=Slots.of(entries.slots.tolist(), device),
            repeat_at=min(self.lowest[slot - 1] for slot in adapters) if share and adapters else 0,
            rows=None if alone else entries.on(device),
        )
        with encoding_pass(running):
            return self.run(inputs)

    def _decide(self, features: torch.Tensor, allowed: NDArray[np.bool_], *, trace: bool) -> Decision:
        values: Array = features.detach().to("cpu", torch.float64).numpy()
        return self.router.decide(values, allowed, trace=trace)

    def _fused(
        self,
        states: torch.Tensor,
        mask: torch.Tensor,
        entries: _Entries,
        decision: Decision,
        *,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum token states so that pooling them gives the weighted sum of the experts' embeddings.

        Pooling is linear. Where the base divides by the length afterwards, each expert's states are divided by the
        length of its own pooled vector first. A query that one answers alone keeps that one's states, bit for bit.
        """
        weights = decision.dense(len(self.router.facts))
        fused = torch.zeros_like(states[: len(mask)]) if base is None else base.clone()
        taken = weights[entries.rows, entries.slots]
        for row in range(len(mask)):
            mine = np.flatnonzero((entries.rows == row) & (taken > 0))
            if len(mine) == 1:
                fused[row] = states[mine[0]]
            elif len(mine) > 1:
                index = torch.from_numpy(mine).to(states.device)
                chosen = states.index_select(0, index)
                shares = torch.from_numpy(taken[mine]).to(chosen)
                shares = shares / self.pooler.lengths(chosen, mask[row : row + 1].expand(len(mine), -1))
                fused[row] = torch.einsum("e,eld->ld", shares, chosen)
        return fused
