"""Where router rows start: at the anchor's states, at an embedding of the domain, or at random; centred, rotated.

Knows vectors and the frozen anchor; knows nothing of how rows are trained or routed with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experts import routing_origin
from experts.routing_artifacts import EmbeddingInfo, RoutingArtifacts
from pipelines.train.states import SplitDecoder

__all__ = [
    "ROW_NORM",
    "centred",
    "domain_embedding",
    "embedding_row",
    "ffn_input_rows",
    "mean_embedding",
    "published_rows",
    "random_rows",
    "rotated",
    "rows_digest",
]

ROW_NORM = 0.5
"""Length of a row at the start, at states of unit root mean square; the released FlexOlmo rows have 0.41 to 0.55."""

_ROW_WINDOWS = 64
"""Windows that a row's starting value is averaged over."""

_PUBLIC_SEED = 20250707
"""Every owner must project embeddings alike."""


def ffn_input_rows(
    split: SplitDecoder, ids: Tensor, *, ffns: Mapping[int, nn.Module], batch_size: int = 8
) -> dict[int, Tensor]:
    """A starting row for each layer: the mean input of its FFN on the first windows, at a fixed length.

    Args:
        split: The anchor, nothing attached yet.
        ids: ``(windows, sequence)`` int64.
        ffns: The FFN of each layer.
        batch_size: Windows run at once.

    Returns:
        ``(hidden,)`` float32 by layer, on the CPU; its length is `ROW_NORM` over the inputs' root mean square.
    """
    sums: dict[int, Tensor] = {}
    squares = dict.fromkeys(ffns, 0.0)
    count = 0

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[layer] = sums.get(layer, x.new_zeros(x.shape[-1])) + x.sum(dim=0)
            squares[layer] += float(x.square().mean(dim=-1).sum())

        return hook

    handles = [ffn.register_forward_pre_hook(keep(layer)) for layer, ffn in ffns.items()]
    try:
        with torch.no_grad():
            for start in range(0, min(len(ids), _ROW_WINDOWS), batch_size):
                batch = ids[start : start + batch_size]
                split.logits(batch, states=split.lower(batch) if split.first else None)
                count += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: (total / total.norm() * ROW_NORM / (squares[layer] / count) ** 0.5).float().cpu()
        for layer, total in sums.items()
    }


def random_rows(layers: Iterable[int], *, hidden_size: int, label: str) -> dict[int, Tensor]:
    """One random row of length `ROW_NORM`, the same for every layer, drawn from a seed made of ``label``."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    row = torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed))
    return dict.fromkeys(layers, row / row.norm() * ROW_NORM)


def mean_embedding(documents: Sequence[str], *, model: Path, limit: int = 1000) -> NDArray[np.float32]:
    """The mean of the documents' unit embeddings, float32 ``(dim,)``.

    Args:
        documents: Text of the domain.
        model: Folder of a SentenceTransformer.
        limit: At most this many documents are embedded, evenly spread.
    """
    from sentence_transformers import SentenceTransformer

    chosen = documents[:: max(1, len(documents) // limit)][:limit]
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    embedded = encoder.encode(list(chosen), normalize_embeddings=True, show_progress_bar=False)
    mean: NDArray[np.float32] = np.asarray(embedded, dtype=np.float32).mean(axis=0)
    return mean


def domain_embedding(
    documents: Sequence[str], *, embedder: Path
) -> tuple[EmbeddingInfo, NDArray[np.float32]]:
    """Return a domain's `mean_embedding` and what made it.

    Raises:
        AdmissionError: The embedder's weights are not in safetensors.
    """
    digest = routing_origin.embedder_digest(embedder)  # before the work, for what it may refuse
    vector = mean_embedding(documents, model=embedder)
    return EmbeddingInfo(model=embedder.resolve().name, digest=digest, dim=len(vector)), vector


def embedding_row(embedding: NDArray[np.float32], *, hidden_size: int) -> Tensor:
    """Map an embedding ``(dim,)`` to the hidden size, float32 ``(hidden,)``.

    A seeded orthonormal map where the widths differ, the identity where they agree; cosines survive where the width
    does not shrink.
    """
    width = embedding.shape[0]
    # a copy, because what was read from a file cannot be written to
    vector = torch.from_numpy(np.array(embedding, dtype=np.float32))
    if width == hidden_size:
        return vector
    orthonormal = _orthonormal(max(width, hidden_size), min(width, hidden_size), seed=_PUBLIC_SEED)
    return vector @ (orthonormal if width > hidden_size else orthonormal.T)


def _orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    draw = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    orthonormal: Tensor = torch.linalg.qr(draw).Q
    return orthonormal


def centred(own: Tensor, public: Tensor, *, towards: Tensor | None = None) -> Tensor:
    """Rescale what sets a row apart from the public one to the row's own length: ``public + |own| d / |d|``.

    Embeddings of any two texts share most of their direction (cosines of 0.52 to 0.92 between the released rows);
    only ``d = own - public`` tells them apart. Adding the public row changes no softmax: all logits shift alike.

    Args:
        own: The owner's row, ``(hidden,)``.
        public: The public row, ``(hidden,)``.
        towards: The difference ``d``, where the public row lies in other coordinates than the owner's.
    """
    difference = own - public if towards is None else towards
    moved: Tensor = public + difference / difference.norm().clamp(min=1e-12) * own.norm()
    return moved


def rotated(own: Tensor, public: Tensor, *, seed: int) -> Tensor:
    """Rotate what sets a row apart from the public one: ``public + Q (own - public)``, Q uniform for the seed.

    A control: rows of owners who share the seed keep their lengths and angles to each other, and lose whatever they
    said of the anchor's states.
    """
    width = own.shape[0]
    draw = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(draw)
    q = q * torch.sign(torch.diagonal(r))  # uniform over all rotations and reflections (Mezzadri 2007)
    moved: Tensor = public + (q @ (own - public).double()).to(own.dtype)
    return moved


def rows_digest(rows: Mapping[int, Tensor]) -> str:
    """Say which public rows were trained against: `experts.routing_origin.rows_digest` of tensors."""
    return routing_origin.rows_digest({layer: row.detach().float().numpy() for layer, row in rows.items()})


def published_rows(routing: RoutingArtifacts | None, layers: Sequence[int]) -> dict[int, Tensor] | None:
    """Every row of a public artefact; None where it lacks one of ``layers``."""
    if routing is None or routing.info.rows is None or not set(layers) <= set(routing.info.rows.layers):
        return None
    numbers = routing.info.rows.layers
    return {
        number: torch.from_numpy(np.array(routing.row(number)[0], dtype=np.float32)) for number in numbers
    }
