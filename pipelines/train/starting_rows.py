"""The rows of one job before its first step: the frozen public ones and the owner's, as the job asks for them.

Knows a job, its anchor and its text; the vectors' arithmetic is in ``rows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from experts.errors import ManifestError
from experts.routing_artifacts import EmbeddingInfo, RoutingArtifacts
from pipelines.train.anchor import ResolvedBase
from pipelines.train.corpus import Corpus
from pipelines.train.job import DomainJob
from pipelines.train.routing import ffn_modules
from pipelines.train.row_starts import CENTRED, EMBEDDED, public_start
from pipelines.train.rows import (
    centred,
    domain_embedding,
    embedding_row,
    ffn_input_rows,
    mean_embedding,
    published_rows,
    random_rows,
    rotated,
)
from pipelines.train.states import SplitDecoder

__all__ = ["StartingRows", "starting_rows"]

Rows = Mapping[int, Tensor]
"""Float32 ``(hidden,)`` by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingRows:
    """Where rows start.

    Attributes:
        public: The public rows, which stay as they are.
        own: The owner's rows.
        init: How they were made, for the card.
        embedding: What made the domain's mean embedding, and that, float32 ``(dim,)``, where rows start at one.
    """

    public: Rows
    own: Rows
    init: str
    embedding: tuple[EmbeddingInfo, NDArray[np.float32]] | None = None


def starting_rows(
    job: DomainJob,
    *,
    base: ResolvedBase,
    model: nn.Module,
    split: SplitDecoder,
    corpus: Corpus,
    layers: tuple[int, ...],
) -> StartingRows:
    """Make the rows that a coordinated job starts from.

    Args:
        job: Says how.
        base: The anchor; public rows that it publishes win over those of the job's public text.
        model: The anchor's model, nothing attached yet.
        split: The same, cut below the first of ``layers``.
        corpus: The text.
        layers: Layers that are trained.

    Raises:
        ManifestError: There is no public row, or no public embedding to centre by, or it is another embedder's.
    """
    routing = base.routing()
    published = published_rows(routing, layers)
    if job.row_init == "random":
        hidden = base.description.hidden_size
        own = random_rows(layers, hidden_size=hidden, label=job.name)
        public = published or random_rows(layers, hidden_size=hidden, label="public")
        return StartingRows(public=public, own=own, init="random")
    if published is None and corpus.public is None:
        raise ManifestError(
            "coordination needs a public row: the base has no public routing artefact with rows for layers "
            f"{layers[0]}-{layers[-1]}. Give public text, or attach such an artefact to the base."
        )
    if job.row_init == "anchor":
        ffns = ffn_modules(model, base.description, layers)
        count = len(corpus.own)
        own = ffn_input_rows(split, corpus.ids[:count], ffns=ffns)
        public = published or ffn_input_rows(split, corpus.ids[count:], ffns=ffns)
        return StartingRows(public=public, own=_changed(job, own, public), init="anchor")
    return _embedded(job, corpus, layers=layers, hidden=base.description.hidden_size, routing=routing)


def _embedded(
    job: DomainJob, corpus: Corpus, *, layers: tuple[int, ...], hidden: int, routing: RoutingArtifacts | None
) -> StartingRows:
    embedder = Path(job.row_init)
    made_with, embedding = domain_embedding(corpus.documents, embedder=embedder)
    row = embedding_row(embedding, hidden_size=hidden)
    published = published_rows(routing, layers)
    towards, public_row = None, None
    if published is None or job.row_centre:
        public_row = embedding_row(
            _public_embedding(embedder, made_with, corpus, routing), hidden_size=hidden
        )
        towards = row - public_row
    if published is None:
        assert public_row is not None
        published = dict.fromkeys(layers, public_row)
    own = _changed(job, dict.fromkeys(layers, row), published, towards=towards)
    public_info = None if routing is None else routing.info
    start = EMBEDDED if public_start(public_info, layers) in (None, EMBEDDED) else CENTRED
    return StartingRows(public=published, own=own, init=start, embedding=(made_with, embedding))


def _public_embedding(
    embedder: Path, made_with: EmbeddingInfo, corpus: Corpus, routing: RoutingArtifacts | None
) -> NDArray[np.floating]:
    """The base's public embedding, which is the same for all owners, or that of the job's public text."""
    info = None if routing is None else routing.info.embedding
    if routing is not None and info is not None:
        if (info.digest, info.dim) != (made_with.digest, made_with.dim):
            raise ManifestError(
                f"row_init: the embedder '{made_with.model}' ({made_with.digest[:12]}) gives vectors of "
                f"{made_with.dim} numbers, but the base's public embedding is '{info.model}' ({info.digest[:12]}) with "
                f"{info.dim}. Rows of different embedders cannot be compared: use '{info.model}', or attach public "
                f"routing artefacts made with --embedder {made_with.model}."
            )
        assert routing.embedding is not None
        return routing.embedding
    if not corpus.public_documents:
        raise ManifestError(
            "row_centre needs the embedding of public text: the base publishes none. Give public text, or attach "
            "public routing artefacts made with --embedder."
        )
    return mean_embedding(corpus.public_documents, model=embedder)


def _changed(job: DomainJob, own: Rows, public: Rows, *, towards: Tensor | None = None) -> dict[int, Tensor]:
    """The rows after centring and rotation, where the job asks for them."""
    rows = dict(own)
    if job.row_centre:
        rows = {layer: centred(row, public[layer], towards=towards) for layer, row in rows.items()}
    if job.row_rotation is not None:
        rows = {layer: rotated(row, public[layer], seed=job.row_rotation) for layer, row in rows.items()}
    return rows
