"""The best low-rank approximation of a matrix, as two balanced factors.

Knows one matrix at a time; knows nothing of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.compression.ranks import RankRule

__all__ = ["Factors", "factorise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """``B A``, the truncated singular value decomposition of a matrix of shape ``(m, n)``.

    Attributes:
        a: float64 ``(r, n)``: sqrt(S_r) V_r^T.
        b: float64 ``(m, r)``: U_r sqrt(S_r).
        squared: All squared singular values, descending, float64 ``(min(m, n),)``.
    """

    a: Tensor
    b: Tensor
    squared: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a)


def factorise(matrix: Tensor, rule: RankRule) -> Factors:
    """Return the closest matrix of the chosen rank (Eckart and Young, 1936).

    Singular vectors of the shorter side come from the eigenvectors of M M^T (or M^T M) in float64, four times as fast
    as a decomposition of M itself. Small singular values lose digits that way, the product does not: it is the
    projection of M on the leading vectors, and its singular values are measured on M again.

    Args:
        matrix: M, any float dtype, ``(m, n)``.
        rule: Chooses r.
    """
    m = matrix.to(torch.float64)
    wide = m.shape[0] <= m.shape[1]
    if not wide:
        m = m.T
    eigenvalues, vectors = torch.linalg.eigh(m @ m.T)
    squared = eigenvalues.flip(0).clamp(min=0).numpy()
    rank = rule.choose(squared, shape=(matrix.shape[0], matrix.shape[1]))
    left = vectors.flip(1)[:, :rank]
    projected = left.T @ m
    root = projected.norm(dim=1).sqrt()
    right = projected / torch.where(root > 0, root, 1.0)[:, None]  # a row of zeros stays one
    left = left * root
    if wide:
        return Factors(a=right, b=left, squared=squared)
    return Factors(a=left.T, b=right.T, squared=squared)
