"""Turns a full FFN expert into a low-rank one: truncated SVD of its difference to the anchor.

Rank-heterogeneous experts after FlexMoRE (arXiv 2602.08818). Light on import; knows nothing of the command line.
"""

from __future__ import annotations

from experts.errors import CoterieError

__all__ = ["CompressionError"]


class CompressionError(CoterieError):
    """An expert that cannot be made low-rank as asked."""
