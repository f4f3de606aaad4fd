"""What compressing an expert cost: bytes, ranks and errors, linear by linear, and likelihoods where text was given.

Plain numbers; knows nothing of how they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CompressionReport", "DomainCost", "LinearCost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """One linear, W_expert - W_anchor = D of shape ``(out_features, in_features)``.

    Attributes:
        name: Module name in the anchor.
        rank: r.
        full_rank: min(out_features, in_features).
        norm: Frobenius norm of D.
        error: Frobenius norm of D - B A, with A and B as they are stored.
        bytes_before: Of the full matrix, and its bias where there is one.
        bytes_after: Of A and B.
        capped: Whether a limit of bytes left it with a smaller rank than the energy asks for.
    """

    name: str
    rank: int
    full_rank: int
    norm: float
    error: float
    bytes_before: int
    bytes_after: int
    capped: bool = False

    @property
    def relative_error(self) -> float:
        """``error / norm``; 0 where the expert left the linear as it was."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCost:
    """Mean negative log-likelihood, nats per token, of the anchor, the full expert and the low-rank one, each alone."""

    anchor: float
    full: float
    low_rank: float
    tokens: int

    @property
    def relative_cost(self) -> float:
        """By what share the low-rank expert's loss lies above the full one's."""
        return self.low_rank / self.full - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionReport:
    """All linears, and all domains of the text that was given."""

    rule: str
    linears: tuple[LinearCost, ...]
    domains: Mapping[str, DomainCost] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of all errors together over that of all changes together; 0 where nothing was changed."""
        norm = math.hypot(*(linear.norm for linear in self.linears))
        return math.hypot(*(linear.error for linear in self.linears)) / norm if norm else 0.0

    @property
    def energy(self) -> float:
        """Share of the changes' squared norm that is kept."""
        return 1 - self.relative_error**2

    @property
    def capped(self) -> int:
        """How many linears a limit of bytes left with a smaller rank than the energy asks for."""
        return sum(linear.capped for linear in self.linears)

    @property
    def bytes_before(self) -> int:
        """Of the full matrices."""
        return sum(linear.bytes_before for linear in self.linears)

    @property
    def bytes_after(self) -> int:
        """Of all A and B."""
        return sum(linear.bytes_after for linear in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "rank": self.rule,
            "relative_error": self.relative_error,
            "energy": self.energy,
            "capped": self.capped,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "linears": [
                {**asdict(linear), "relative_error": linear.relative_error} for linear in self.linears
            ],
            "domains": {
                name: {**asdict(cost), "relative_cost": cost.relative_cost}
                for name, cost in self.domains.items()
            },
        }
