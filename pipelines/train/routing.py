"""The routing artefacts an owner computes locally: additive statistics, router rows, and the public ones.

Knows states of the frozen anchor and how they are summed; knows nothing of how a router uses the sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experts.errors import DataError, TrainingError
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, RowsInfo, Statistics, StatisticsInfo
from pipelines.train.states import SplitDecoder

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from pipelines.train.anchor import ResolvedBase

__all__ = [
    "INFO_FILE",
    "StatisticsSum",
    "embedding_rows",
    "ffn_input_rows",
    "public_routing",
    "random_rows",
    "rows_digest",
]

INFO_FILE = "routing.json"
"""Beside a public artefact: its `RoutingInfo` as JSON."""

ROW_NORM = 0.5
"""Length of a row at the start, at states of unit root mean square; the released FlexOlmo rows have 0.41 to 0.55."""

_ROW_WINDOWS = 64
"""Windows that a row's starting value is averaged over."""

_PUBLIC_SEED = 20250707
"""Every owner must draw the same public row."""


class StatisticsSum:
    """Adds up n, the sum of x and the sum of x xT over batches of states, in float64.

    Args:
        normalization: ``rms``: each state is divided by its root mean square, ``x / sqrt(mean(x^2) + 1e-6)``.
        skip_first: Leave out position 0 of every window.
    """

    def __init__(self, *, normalization: Literal["none", "rms"], skip_first: bool) -> None:
        self.normalization = normalization
        self.skip_first = skip_first
        self.total: Statistics | None = None

    def add(self, states: Tensor) -> None:
        """Add states ``(windows, sequence, hidden)``."""
        kept = states[:, 1:] if self.skip_first else states
        x = kept.reshape(-1, kept.shape[-1]).float()
        if self.normalization == "rms":
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
        wide = x.double()
        part = Statistics(
            count=float(len(wide)), sum=wide.sum(dim=0).numpy(), scatter=(wide.T @ wide).numpy()
        )
        self.total = part if self.total is None else self.total + part


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
        ``(hidden,)`` float32 by layer; its length is `ROW_NORM` over the inputs' root mean square.
    """
    sums: dict[int, Tensor] = {}
    squares = dict.fromkeys(ffns, 0.0)
    count = 0

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[layer] = sums.get(layer, torch.zeros(x.shape[-1], dtype=torch.float64)) + x.sum(dim=0)
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
        layer: (total / total.norm() * ROW_NORM / (squares[layer] / count) ** 0.5).float()
        for layer, total in sums.items()
    }


def random_rows(layers: Iterable[int], *, hidden_size: int, label: str) -> dict[int, Tensor]:
    """One random row of length `ROW_NORM`, the same for every layer, drawn from a seed made of ``label``."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    row = torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed))
    return dict.fromkeys(layers, row / row.norm() * ROW_NORM)


def embedding_rows(
    documents: Sequence[str], layers: Iterable[int], *, model: Path, hidden_size: int, limit: int = 1000
) -> tuple[dict[int, Tensor], NDArray[np.float32]]:
    """The mean of the documents' unit embeddings, projected to the hidden size; the same row for every layer.

    Args:
        documents: Text of the domain.
        layers: Where rows are wanted.
        model: Folder of a SentenceTransformer.
        hidden_size: Width of the rows.
        limit: At most this many documents are embedded, evenly spread.

    Returns:
        Rows by layer, and the mean embedding ``(dim,)`` itself.
    """
    from sentence_transformers import SentenceTransformer

    chosen = documents[:: max(1, len(documents) // limit)][:limit]
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    embedded = encoder.encode(list(chosen), normalize_embeddings=True, show_progress_bar=False)
    mean = np.asarray(embedded, dtype=np.float32).mean(axis=0)
    row = torch.from_numpy(mean) @ _projection(mean.shape[0], hidden_size)
    return dict.fromkeys(layers, row), mean


def _projection(width: int, hidden_size: int) -> Tensor:
    """Seeded random orthonormal map ``(width, hidden)``; cosines survive where the width does not shrink."""
    if width == hidden_size:
        return torch.eye(width)
    draw = torch.randn(
        max(width, hidden_size),
        min(width, hidden_size),
        generator=torch.Generator().manual_seed(_PUBLIC_SEED),
    )
    orthonormal: Tensor = torch.linalg.qr(draw).Q
    return orthonormal if width > hidden_size else orthonormal.T


def rows_digest(rows: Mapping[int, Tensor]) -> str:
    """sha256 over layer numbers and float32 bytes, ascending by layer: which public rows were trained against.

    Taken over all rows of a public artefact, so that owners who train different layers agree on it.
    """
    digest = hashlib.sha256()
    for layer in sorted(rows):
        digest.update(f"{layer}:".encode())
        digest.update(np.ascontiguousarray(rows[layer].detach().float().numpy(), dtype="<f4").tobytes())
    return digest.hexdigest()


def published_rows(routing: RoutingArtifacts | None, layers: Sequence[int]) -> dict[int, Tensor] | None:
    """Every row of a public artefact; None where it lacks one of ``layers``."""
    if routing is None or routing.info.rows is None or not set(layers) <= set(routing.info.rows.layers):
        return None
    numbers = routing.info.rows.layers
    return {
        number: torch.from_numpy(np.array(routing.row(number)[0], dtype=np.float32)) for number in numbers
    }


def statistics_tensors(statistics: Statistics) -> dict[str, NDArray[np.floating]]:
    """The statistics under their names in a routing file."""
    return {
        "statistics.count": np.array([statistics.count], dtype=np.float64),
        "statistics.sum": statistics.sum,
        "statistics.scatter": statistics.scatter,
    }


def ffn_modules(
    model: nn.Module, description: BaseDescription, layers: Iterable[int]
) -> dict[int, nn.Module]:
    """The FFN block of each layer."""
    prefix, block = description.layers_prefix, description.layout.module
    return {layer: model.get_submodule(f"{prefix}.{layer}.{block}") for layer in layers}


def public_routing(
    base: ResolvedBase | Path | str,
    texts: Sequence[str],
    *,
    out: Path,
    layer: int,
    normalization: Literal["none", "rms"] = "rms",
    rows_layers: Sequence[int] = (),
    skip_first: bool = False,
    sequence_length: int = 128,
    windows: int = 256,
    seed: int = 0,
    dtype: str | None = None,
) -> Path:
    """Write the routing artefact of PUBLIC text, which a builder attaches to a base.

    Args:
        base: The anchor's folder, or the anchor already resolved.
        texts: Public documents.
        out: The folder to create; receives ``routing.safetensors`` and ``routing.json`` (its `RoutingInfo`).
        layer: Statistics are of the states entering this layer; owners must use the same.
        normalization: As the owners'.
        rows_layers: Also write a public row for each of these layers: the mean input of its FFN.
        skip_first: As the owners'.
        sequence_length: Tokens in a window.
        windows: At most this many windows are used.
        seed: Decides which.
        dtype: Precision of the anchor.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` exists, or the text does not fill one window.
        TrainingError: A layer does not exist.
    """
    from pipelines.train.anchor import ResolvedBase, load_anchor, resolve_base
    from pipelines.train.windows import make_windows

    if out.exists():
        raise DataError(f"'{out}' exists already. Choose another folder, or remove it.")
    if not isinstance(base, ResolvedBase):
        with resolve_base(Path(base)) as resolved:
            base = resolved
    wanted = max([layer, *rows_layers])
    if wanted >= base.description.num_layers:
        raise TrainingError(
            f"layer {wanted} does not exist; the base has layers 0 to {base.description.num_layers - 1}."
        )
    model, tokenizer = load_anchor(base, dtype=dtype)
    chosen = make_windows(
        texts, tokenizer, sequence_length=sequence_length, limit=windows, seed=seed, what="the public text"
    )
    ids = torch.from_numpy(chosen.ids).long()
    split = SplitDecoder(model, layers_prefix=base.description.layers_prefix, first=layer)
    total = StatisticsSum(normalization=normalization, skip_first=skip_first)
    for start in range(0, len(ids), 8):
        total.add(split.lower(ids[start : start + 8]))
    assert total.total is not None
    tensors = statistics_tensors(total.total)
    rows = (
        ffn_input_rows(split, ids, ffns=ffn_modules(model, base.description, rows_layers))
        if rows_layers
        else {}
    )
    tensors |= {f"row.{number}.weight": row.numpy() for number, row in rows.items()}
    info = RoutingInfo(
        statistics=StatisticsInfo(
            layer=layer,
            normalization=normalization,
            tokens=int(total.total.count),
            documents=chosen.documents,
        ),
        rows=RowsInfo(layers=tuple(sorted(rows)), has_bias=False, init="anchor") if rows else None,
    )
    out.mkdir(parents=True)
    RoutingArtifacts(info=info, tensors=tensors).save(out)
    (out / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n")
    return out
