"""Rows that nobody publishes: what scorers have in common that make the rows themselves.

Knows what such scorers ask of owners, which is nothing; each one's own file knows how its rows are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from composer.routing.scorers.learned import LearnedScorer
from experts.routing_artifacts import RoutingInfo

__all__ = ["MadeScorer"]


class MadeScorer(LearnedScorer):
    """Dot products with rows that are made when the model is, and may be trained afterwards.

    Attributes:
        rows_name: How messages call the rows.
    """

    needs_artifacts = False
    rows_name: ClassVar[str]

    @classmethod
    def problems(
        cls,
        *,
        public: RoutingInfo | None,
        experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]],
        layer: int | None,
    ) -> list[str]:
        """Nothing is asked of the owners' artefacts; `Scorer.problems`."""
        if layer is None:
            return []
        return [f"router.layer: {cls.rows_name} score every expert layer; leave it out"]
