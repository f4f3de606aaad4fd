"""Branch-Train-MiX: the FFNs of dense models become experts, everything else is averaged.

``y = sum_i g_i(x) FFN_i(x)``, ``g = softmax(TopK(W x))`` with a linear router per layer (arXiv 2403.07816, section
3.2). The seed model is one more expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from composer.recipes.upcycled import UpcycledRecipe

__all__ = ["BTX"]


class BTX(UpcycledRecipe):
    """FFN experts of dense models; trunk averaged, as published, or the base's own, so that opting out is exact."""

    name = "btx"
    summary = "FFN experts of dense models around an averaged or frozen trunk (Branch-Train-MiX)"
    router_defaults: ClassVar[Mapping[str, Any]] = {
        "scorer": "random",
        "context": "token",
        "top_k": 2,
        "normalize": True,
    }
