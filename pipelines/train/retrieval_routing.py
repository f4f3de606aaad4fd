"""Routing artefacts for retrievers from queries alone: an owner's own ones, or public ones beside a base.

Knows an embedding model and texts; knows nothing of experts, pairs or how a router uses the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experts.errors import DataError, TrainingError
from experts.retrieval_artifacts import Moments, RetrievalArtifacts
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from experts.routing_origin import AnchorInfo
from pipelines.train.anchor import ResolvedBase
from pipelines.train.query_encoder import RetrievalBase, mean_state
from pipelines.train.routing import INFO_FILE

__all__ = ["query_routing", "query_sums", "token_sums"]

MIN_GROUP = 10
"""No sums are made of fewer queries."""


@torch.no_grad()
def query_sums(
    base: RetrievalBase, texts: Sequence[str], *, batch_size: int = 32, second_moment: bool = True
) -> tuple[Moments, Moments]:
    """Sum up the base's embeddings of queries, and their mean states entering layer ``base.first``.

    Args:
        base: The embedding model.
        texts: Queries, at least one.
        batch_size: How many are embedded at once.
        second_moment: Whether to sum x xT too.

    Returns:
        Sums over embeddings and over states, see `experts.retrieval_info.StateInfo`.
    """
    embeddings, states = [], []
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), batch_size):
        features = base.tokenize(ordered[start : start + batch_size])
        mask, entering = features["attention_mask"], base.lower(features)
        states.append(mean_state(entering, mask))
        embeddings.append(base.pool(base.upper(entering, mask), mask).float())
    both = (torch.cat(part).double().numpy() for part in (embeddings, states))
    first, second = (Moments.from_vectors(vectors, second_moment=second_moment) for vectors in both)
    return first, second


def token_sums(
    base: RetrievalBase, texts: Sequence[str], *, batch_size: int = 256, second_moment: bool = True
) -> Moments:
    """Sum up the mean token embeddings of queries; no layer of the base runs.

    Args:
        base: The embedding model.
        texts: Queries, at least one.
        batch_size: How many are tokenized at once.
        second_moment: Whether to sum x xT too.

    Raises:
        TrainingError: See `RetrievalBase.mean_tokens`.
    """
    ordered = sorted(texts, key=len)
    parts = [
        base.mean_tokens(base.tokenize(ordered[start : start + batch_size]))
        for start in range(0, len(ordered), batch_size)
    ]
    return Moments.from_vectors(torch.cat(parts).double().numpy(), second_moment=second_moment)


def query_routing(
    base: ResolvedBase,
    texts: Sequence[str],
    *,
    out: Path,
    layer: int,
    second_moment: bool | None = None,
    min_group: int = MIN_GROUP,
) -> Path:
    """Compute the artefacts and write them.

    Args:
        base: The embedding model.
        texts: Queries.
        out: The folder to create; receives ``routing.safetensors`` and ``routing.json`` (its `RoutingInfo`).
        layer: Sums over states are of those entering this layer, the first that an expert adapts.
        second_moment: Whether to publish the sum of x xT; None: where there are twice as many queries as dimensions.
        min_group: Smallest number of queries to publish anything of.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` exists, or there are fewer than ``min_group`` queries.
        TrainingError: The layer does not exist.
    """
    if out.exists():
        raise DataError(f"'{out}' exists already. Choose another folder, or remove it.")
    if len(texts) < min_group:
        raise DataError(
            f"{len(texts)} queries; at least {min_group} are needed, so that what is published is nobody's own."
        )
    if layer >= base.description.num_layers:
        raise TrainingError(
            f"layer {layer} does not exist; the base has layers 0 to {base.description.num_layers - 1}."
        )
    model = RetrievalBase(base.folder, description=base.description, first=layer)
    wanted = len(texts) >= 2 * model.spec.dimension if second_moment is None else second_moment
    embedding, state = query_sums(model, texts, second_moment=wanted)
    artifacts = RetrievalArtifacts.create(
        embedding=embedding,
        normalization="l2" if model.spec.normalize else "none",
        min_group=min_group,
        state=state,
        state_layer=layer,
    )
    info = RoutingInfo(retrieval=artifacts.info, anchor=AnchorInfo.of(base.ref))
    out.mkdir(parents=True)
    RoutingArtifacts(info=info, tensors=artifacts.tensors()).save(out)
    (out / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n")
    return out
