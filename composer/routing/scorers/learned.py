"""Learned rows: one vector per expert and layer, trained by its owner beside the frozen anchor's row.

``s_e(h) = r_e . h + min(b_e, 0)`` with ``b = 0`` for the anchor (FlexOlmo, arXiv 2507.07024, section 3.3: the
negative bias makes an owner's row win only where it clearly beats the public one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from composer.routing.recent import Recent
from composer.routing.scorers.base import Scorer, ScorerInputs, ScorerOptions
from composer.routing.types import ANCHOR
from experts.routing_artifacts import RoutingInfo

__all__ = ["LearnedScorer"]

_BESIDE_ANY = ({"random"}, {"sentence-transformer-centred"})
"""Starts that all owners may have together beside any public rows: the ablation without a start (FlexOlmo, table 1),
and embeddings that were centred by a public row of other coordinates, whose difference to it is what counts."""
_UNKNOWN = ("imported",)
"""A checkpoint does not say where its rows started; the digest of the public rows still holds."""


class LearnedOptions(ScorerOptions):
    """Settings of the learned rows."""

    bias: bool = True
    """Whether the owners' negative biases are used."""


class LearnedScorer(Scorer):
    """Dot products with the owners' rows.

    Args:
        ids: Expert ids of the rows, the anchor (0) first.
        rows: ``(len(ids), d)``.
        bias: ``(len(ids),)``; values above 0 count as 0, the anchor's entry is ignored.
    """

    depth = "layer"
    trainable = True
    Options: ClassVar[type[ScorerOptions]] = LearnedOptions

    def __init__(self, *, ids: Sequence[int], rows: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.position = {expert: row for row, expert in enumerate(ids)}
        self.rows = nn.Parameter(rows)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.is_whole = list(ids) == list(range(len(ids)))
        positions = torch.zeros(max(ids) + 1, dtype=torch.int64)  # id -> position in rows
        positions[list(ids)] = torch.arange(len(ids))
        self.register_buffer("positions", positions.to(rows.device), persistent=False)
        self.positions: torch.Tensor
        self._slices: Recent[tuple[torch.Tensor, torch.Tensor | None]] = Recent(16)

    @classmethod
    def problems(
        cls,
        *,
        public: RoutingInfo | None,
        experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]],
        layer: int | None,
    ) -> list[str]:
        """Every expert needs a row on each of its layers, trained beside the same frozen public row."""
        found = []
        if layer is not None:
            found.append("router.layer: the learned rows score every expert layer; leave it out")
        if public is None or public.rows is None:
            found.append("the base publishes no public rows (see `coterie base public-routing --help`)")
        public_layers = set() if public is None or public.rows is None else set(public.rows.layers)
        digests: set[str] = set()
        for name, (info, layers) in experts.items():
            if info is None or info.rows is None:
                found.append(
                    f"{name} publishes no router rows (train it with `coordination: {{enabled: true}}`)"
                )
                continue
            digests.add(info.rows.public_digest)
            lacking = sorted(set(layers) - set(info.rows.layers))
            if lacking:
                found.append(f"{name} has no router row for its layers {lacking}")
            uncovered = sorted(set(layers) - public_layers)
            if public_layers and uncovered:
                found.append(f"{name} changes layers {uncovered}, for which the base publishes no public row")
        if len(digests) > 1:
            shown = ", ".join(sorted(digest[:12] for digest in digests))
            found.append(f"the experts' rows were trained beside different public rows ({shown})")
        found += _foreign_public_rows(public, digests)
        return found + _mixed_starts(public, experts) + _foreign_embedders(public, experts)

    @classmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Stack the public row and the owners' rows of one layer."""
        sources = {ANCHOR: inputs.public, **inputs.experts}
        pairs = [source.row(inputs.layer) for source in sources.values()]
        rows = torch.from_numpy(np.stack([weight for weight, _ in pairs]))
        bias = None
        if options.bias and any(b is not None for _, b in pairs[1:]):
            bias = torch.tensor([0.0, *(0.0 if b is None else float(b[0]) for _, b in pairs[1:])])
            bias = bias.to(inputs.device, inputs.dtype)
        return cls(ids=tuple(sources), rows=rows.to(inputs.device, inputs.dtype), bias=bias)

    def forward(
        self, features: torch.Tensor, counts: torch.Tensor | None, experts: Sequence[int]
    ) -> torch.Tensor:
        """Score by dot product; see `Scorer.forward`. Rows are sliced before the product."""
        rows, bias = self._of(tuple(experts))
        return self._product(features, rows.t().expand(features.shape[0], -1, -1), bias)

    def score_apart(
        self, features: torch.Tensor, counts: torch.Tensor | None, table: torch.Tensor
    ) -> torch.Tensor:
        """Score every batch row with a copy of its own rows; see `Scorer.score_apart`."""
        rows, bias = self._of(tuple(self.position))
        at = table if self.is_whole else self.positions[table]
        return self._product(
            features, rows[at].transpose(1, 2), None if bias is None else bias[at].unsqueeze(1)
        )

    @staticmethod
    def _product(features: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply batch row by batch row, so that the last bits of one do not depend on how many stand beside it."""
        features = features.to(rows.dtype)
        return torch.bmm(features, rows) if bias is None else torch.baddbmm(bias, features, rows)

    def _of(self, experts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows and negative biases of a set of experts, kept while no parameter changes."""
        rows: torch.Tensor = self.rows
        bias: torch.Tensor | None = self.bias
        if bias is None and len(experts) == len(self.position):
            return rows, None
        if rows.is_inference() or (rows.requires_grad and torch.is_grad_enabled()):
            return self._slice(experts)
        version = (rows.data_ptr(), rows._version, None if bias is None else (bias.data_ptr(), bias._version))
        return self._slices.get((experts, version), lambda: self._slice(experts))

    def _slice(self, experts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows: torch.Tensor = self.rows
        # the anchor has no bias: it is the reference that an owner's row has to beat
        bias = None if self.bias is None else F.pad(self.bias[1:].clamp(max=0.0), (1, 0))
        if len(experts) == len(self.position):
            return rows, bias
        kept = torch.tensor([self.position[expert] for expert in experts], device=rows.device)
        return rows.index_select(0, kept), None if bias is None else bias.index_select(0, kept)


def _foreign_public_rows(public: RoutingInfo | None, digests: set[str]) -> list[str]:
    """All agree with each other, but not with the row they would be composed beside."""
    if public is None or public.rows is None or len(digests) != 1:
        return []
    own, (digest,) = public.rows.public_digest, digests
    if digest == own:
        return []
    return [
        f"the experts' rows were trained beside other public rows ({digest[:12]}) than the base publishes "
        f"({own[:12]})"
    ]


def _mixed_starts(
    public: RoutingInfo | None, experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]]
) -> list[str]:
    """Rows that start at different things lie in different coordinates, and their products say nothing together."""
    starts = {name: info.rows.init for name, (info, _) in experts.items() if info and info.rows}
    if public is not None and public.rows is not None and set(starts.values()) not in _BESIDE_ANY:
        starts = {"the base": public.rows.init, **starts}
    known = {name: start for name, start in starts.items() if start not in _UNKNOWN}
    if len(set(known.values())) < 2:
        return []
    shown = ", ".join(f"{name}: '{start}'" for name, start in known.items())
    return [
        f"the router rows start at different things ({shown}); all must start alike, the base's public rows too: train "
        "them with one row_init, and attach public rows made with it (with --embedder, or without)"
    ]


def _foreign_embedders(
    public: RoutingInfo | None, experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]]
) -> list[str]:
    """Rows that start at embeddings can be compared only where one embedder made them; the base says which."""
    made = {} if public is None or public.embedding is None else {"the base": public.embedding}
    made |= {name: info.embedding for name, (info, _) in experts.items() if info and info.embedding}
    if len({(info.digest, info.dim) for info in made.values()}) < 2:
        return []
    shown = ", ".join(
        f"{name}: '{info.model}' ({info.dim}, {info.digest[:12]})" for name, info in made.items()
    )
    return [
        f"the domain embeddings were made by different embedders ({shown}); one embedder must make them all: train "
        "with the same row_init"
    ]
