"""How many singular values of a linear's change are kept: a number, a share of the energy, or a rule of thumb.

Knows singular values and shapes; knows nothing of tensors or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.kinds.lora_config import MAX_RANK
from pipelines.compression import CompressionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AUTO_BYTES", "AUTO_ENERGY", "RankRule", "parse_rank"]

AUTO_ENERGY = 0.9
AUTO_BYTES = 1 / 3

_ROUNDING = 1e-12
"""A share of 1 must not ask for more than the sum of all squares, which is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRule:
    """Chooses a rank for each linear; of several limits the smallest counts.

    Attributes:
        rank: At most this many; None: no such limit.
        energy: As few as hold this share of the sum of squared singular values, which is the share of the squared
            Frobenius norm that is kept; None: not asked for.
        byte_share: At most as many as A and B may have to take this share of the full matrix's bytes; None: no limit.
        text: The rule as the user writes it.
    """

    rank: int | None = None
    energy: float | None = None
    byte_share: float | None = None
    text: str

    def choose(self, squared: NDArray[np.float64], *, shape: tuple[int, int]) -> int:
        """Return the rank of one linear, at least 1 (PEFT knows no rank 0).

        Args:
            squared: All squared singular values, descending, shape ``(min(shape),)``.
            shape: ``(out_features, in_features)``.
        """
        limits = [len(squared), MAX_RANK]
        if self.rank is not None:
            limits.append(self.rank)
        if self.energy is not None:
            limits.append(_smallest(squared, self.energy))
        if self.byte_share is not None:
            limits.append(math.floor(self.byte_share * math.prod(shape) / sum(shape)))
        return max(1, min(limits))

    def capped(self, squared: NDArray[np.float64], *, rank: int) -> bool:
        """Whether a limit of bytes left a linear with a smaller rank than the energy asks for."""
        if self.byte_share is None or self.energy is None:
            return False
        return rank < min(_smallest(squared, self.energy), len(squared), MAX_RANK)


def _smallest(squared: NDArray[np.float64], share: float) -> int:
    """Return the smallest r whose first r squares make up ``share`` of all."""
    import numpy as np

    sums = np.cumsum(squared)
    return int(np.searchsorted(sums, share * sums[-1] * (1 - _ROUNDING))) + 1


def parse_rank(text: str) -> RankRule:
    """Read ``16``, ``energy=0.9`` or ``auto``.

    ``auto`` keeps `AUTO_ENERGY` of the energy of each linear, within `AUTO_BYTES` of its bytes.

    Raises:
        CompressionError: Another form, or a number out of range.
    """
    if text == "auto":
        return RankRule(energy=AUTO_ENERGY, byte_share=AUTO_BYTES, text=text)
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_RANK:
        return RankRule(rank=int(text), text=text)
    share = _share(text)
    if share is not None:
        return RankRule(energy=share, text=text)
    raise CompressionError(
        f"--rank '{text}' is not a rank: write a whole number from 1 to {MAX_RANK}, 'auto', or 'energy=SHARE' with a "
        "share above 0 and at most 1, for instance 'energy=0.9'."
    )


def _share(text: str) -> float | None:
    name, equals, number = text.partition("=")
    if name != "energy" or not equals:
        return None
    try:
        share = float(number)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None
