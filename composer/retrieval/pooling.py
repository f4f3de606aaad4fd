"""Makes one vector of a text's token states, as the base's sentence-transformers modules do.

Knows masks and pooling modes; runs the library's own module, so that a vector is bit for bit what the stock model
gives.
"""

from __future__ import annotations

import torch
from torch import nn

from experts.embedding import EmbeddingSpec

__all__ = ["LINEAR", "Pooler", "mean_state", "mean_token"]

LINEAR = ("cls", "mean", "mean_sqrt_len_tokens")
"""Pooling modes that are linear in the states, so that a weighted sum of states pools to that of the vectors."""


def mean_state(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average states over tokens that are no padding and divide by the length, in float64, as owners summed them.

    Args:
        states: ``(rows, positions, d)``.
        mask: ``(rows, positions)``.

    Returns:
        float64 ``(rows, d)``.
    """
    kept = mask.to(torch.float64).unsqueeze(-1)
    mean = (states.to(torch.float64) * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1.0)
    return nn.functional.normalize(mean, p=2, dim=1)


def mean_token(embeddings: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average token embeddings as `mean_state` averages states; no layer runs, and no position counts.

    Args:
        embeddings: The base's embedding matrix, whose rows have the width of its states.
        ids: int64 ``(rows, positions)``.
        mask: ``(rows, positions)``.

    Returns:
        float64 ``(rows, d)``.
    """
    table: torch.Tensor = embeddings.weight  # type: ignore[assignment]
    return mean_state(nn.functional.embedding(ids, table), mask)


class Pooler(nn.Module):
    """The base's pooling and normalisation.

    Args:
        spec: How the base makes vectors.
    """

    def __init__(self, spec: EmbeddingSpec) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.modules import Pooling

        self.pooling = Pooling(spec.dimension, pooling_mode=spec.pooling)
        self.normalize = spec.normalize

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool ``(rows, positions, d)`` states; returns ``(rows, d)``."""
        pooled: torch.Tensor = self.pooling({"token_embeddings": states, "attention_mask": mask})[
            "sentence_embedding"
        ]
        return pooled

    def embed(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the base's embedding, ``(rows, d)``."""
        pooled = self.pool(states, mask)
        return nn.functional.normalize(pooled, p=2, dim=1) if self.normalize else pooled

    def lengths(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what pooled vectors are divided by, ``(rows,)``: their lengths, or ones."""
        if not self.normalize:
            return states.new_ones(len(states))
        lengths: torch.Tensor = self.pool(states, mask).norm(dim=1).clamp(min=1e-12)
        return lengths
