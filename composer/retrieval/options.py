"""How queries find their experts, as a manifest says it: the ``router`` of recipe ``router_retriever``.

Knows keys, defaults and which of them contradict each other; knows no expert and no array.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

__all__ = ["RetrievalRouter"]


class RetrievalRouter(BaseModel):
    """How queries find their experts: a feature, a scorer and a selector."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preset: Literal["paper"] | None = None
    """``paper``: RouterRetriever as published. Other keys win over it; the plan and the lock hold it written out."""
    scorer: str = "lda"
    """``lda``, ``centroid``: from the owners' sums of query embeddings (``lda`` also from their second moments, where
    owners publish them); ``pilot_mean``, ``pilot_max``,
    ``pilot_logsumexp``, ``pilot_top_mean``: from groups of queries by the expert that serves them best;
    ``ridge_utility``: predicts every expert's gain over the base."""
    selector: str = "soft"
    """``top1``: the best expert; ``top2``: the two best, weighed; ``soft``: all of them, weighed."""
    temperature: float = Field(default=3.0, gt=0)
    """Divides scores before a softmax; ``top1`` only reads it for its confidence."""
    similarity: Literal["base", "cosine", "dot"] = "base"
    """How queries are compared with centroids and pilots; ``base``: as the base compares texts."""
    shrinkage: float = Field(default=0.1, gt=0)
    """``lda``: weight of the identity in the covariance, relative to the mean variance."""
    ridge: float = Field(default=3.0, gt=0)
    """``ridge_utility``: what is added to the diagonal of the second moment."""
    pilot_top: int = Field(default=3, ge=1)
    """``pilot_top_mean``: how many of an expert's pilots count."""
    label_split: Literal["heldout", "train"] = "heldout"
    """Which queries the owners labelled for pilots and utilities; never their test queries."""
    label_metric: Literal["margin", "ndcg@10", "mrr@10"] = "margin"
    """What the labels compare: the positive's score minus the best negative's, or a metric."""
    ties: Literal["fractional", "own_domain", "drop"] = "fractional"
    """Queries that several experts serve equally well make their parts of all of these experts' pilots
    (``fractional``), go to the expert of the queries' own owner if it is one of them, else in parts (``own_domain``),
    or are not used (``drop``). The order of a list decides nothing."""
    pilots_per_group: int = Field(default=1, ge=1)
    """Most pilots of an owner's queries for one expert, by k-means; the paper finds more than one worse."""
    fallback: Literal["base"] = "base"
    """Who answers where no expert is allowed or none is far enough ahead."""
    min_margin: float = 0.0
    """Smallest lead of the best expert over the next (``ridge_utility``: over the base) that routes."""
    min_group: int = Field(default=5, ge=1)
    """Fewest queries behind any published vector that is used."""
    route_on: Literal["embedding", "layer_state", "static_tokens"] = "embedding"
    """What is scored. ``embedding``: the base's embedding of the query, before a second pass with the expert;
    ``layer_state``: the mean state that enters the layer where the owners took theirs, in the one pass;
    ``static_tokens``: the mean of the query's token embeddings, before any layer has run."""
    share_lower_layers: bool = True
    """Whether the passes of several experts share the layers below the first one that an expert changes."""
    default_task: Literal["query", "document"] | None = None
    """What ``encode`` without a task means; null: a document, with one line in the log."""

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: Any) -> Any:
        """Fill in what the preset names and the builder did not."""
        if isinstance(data, dict) and data.get("preset") == "paper":
            return {**_PAPER, **{key: value for key, value in data.items() if key != "preset"}}
        return data

    @model_serializer(mode="wrap")
    def _without_the_preset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the name out: everything that it means is written."""
        data: dict[str, Any] = handler(self)
        del data["preset"]
        return data


_PAPER = {
    "scorer": "pilot_mean",
    "selector": "top1",
    "similarity": "dot",
    "label_split": "train",
    "label_metric": "ndcg@10",
    "ties": "fractional",
    "pilots_per_group": 1,
    "min_group": 1,
    "share_lower_layers": False,
}
"""arXiv 2409.02685, section 3: the mean similarity to an expert's pilots, one for each group of training queries,
decides. The paper does not say what becomes of ties; its released code takes the first expert of a list, so that
another order of the same experts routes otherwise. Here ties are shared, whoever is named first."""
