"""Arithmetic of the arms: what one token costs, by the products of a decoder with so many experts.

Knows shapes; knows nothing of models that exist. Norms, softmaxes and activations are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.experiments.settings import ScratchAnchor

__all__ = ["Shape", "flops_per_token"]

TRAINING = 3
"""Forward and backward pass in forward passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a token meets in every layer.

    Attributes:
        seats: Experts that there are; 1: a dense model, which has no router.
        ffn: FFNs that a token meets.
        attention: Attentions that a token meets.
        shared_kv: Whether the attentions share keys and values.
    """

    seats: int = 1
    ffn: int = 1
    attention: int = 1
    shared_kv: bool = False


def flops_per_token(anchor: ScratchAnchor, shape: Shape, *, context: int) -> int:
    """Count a forward pass, two for each weight of a product.

    Attention takes ``2 n (2 d^2) + 2 m (2 d^2) + 2 n c d`` for n queries and outputs, m keys and values, and a context
    of c (arXiv 2408.08274, table 9, whose ``6 n d^2 + 2 n c d + 2 n d^2`` is that with m = n); an FFN ``6 d f``.

    Args:
        anchor: The sizes.
        shape: The experts.
        context: Tokens in a window.
    """
    d, n = anchor.hidden_size, shape.attention
    keys_and_values = 1 if shape.shared_kv else n
    attention = 4 * n * d * d + 4 * keys_and_values * d * d + 2 * n * context * d
    ffn = shape.ffn * 6 * d * anchor.intermediate_size
    routers = 0 if shape.seats == 1 else 2 * shape.seats * d * (2 if n > 1 else 1)
    return anchor.layers * (attention + ffn + routers) + 2 * anchor.vocabulary * d
