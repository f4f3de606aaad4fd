"""The additive statistics an owner computes locally, and the routing artefact of public text.

Knows states of the frozen anchor and how they are summed; knows nothing of how a router uses the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experts.errors import DataError, TrainingError
from experts.routing_artifacts import (
    RoutingArtifacts,
    RoutingInfo,
    RowsInfo,
    Statistics,
    StatisticsInfo,
)
from experts.routing_origin import AnchorInfo
from pipelines.train.noise import normalised
from pipelines.train.rows import domain_embedding, embedding_row, ffn_input_rows, rows_digest
from pipelines.train.states import SplitDecoder

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from pipelines.train.anchor import ResolvedBase

__all__ = ["INFO_FILE", "StatisticsSum", "ffn_modules", "public_routing", "statistics_tensors"]

INFO_FILE = "routing.json"
"""Beside a public artefact: its `RoutingInfo` as JSON."""


class StatisticsSum:
    """Adds up n, the sum of x and the sum of x xT over batches of states, in float64, on the device of the states.

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
        wide = normalised(kept.reshape(-1, kept.shape[-1]), self.normalization).double()
        part = Statistics(
            count=float(len(wide)), sum=wide.sum(dim=0).cpu().numpy(), scatter=(wide.T @ wide).cpu().numpy()
        )
        self.total = part if self.total is None else self.total + part


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
    inputs: bool = False,
    embedder: Path | None = None,
    skip_first: bool = False,
    sequence_length: int = 128,
    windows: int = 256,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "auto",
) -> Path:
    """Write the routing artefact of PUBLIC text, which a builder attaches to a base.

    Args:
        base: The anchor's folder, or the anchor already resolved.
        texts: Public documents.
        out: The folder to create; receives ``routing.safetensors`` and ``routing.json`` (its `RoutingInfo`).
        layer: Statistics are of the states entering this layer; owners must use the same.
        normalization: As the owners'.
        rows_layers: Also write a public row for each of these layers: the mean input of its FFN, or, with an
            embedder, the projected embedding.
        inputs: Also sum up what the routers of whole models read, FFN's and attention's, in every layer.
        embedder: Folder of a SentenceTransformer; also write the text's mean embedding, which owners who start at
            an embedding are centred by. Theirs must be the same.
        skip_first: As the owners'.
        sequence_length: Tokens in a window.
        windows: At most this many windows are used.
        seed: Decides which.
        dtype: Precision of the anchor.
        device: Where it runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.

    Returns:
        ``out``.

    Raises:
        ManifestError: There is no such device here.
        DataError: ``out`` exists, or the text does not fill one window.
        TrainingError: A layer does not exist.
    """
    from pipelines.devices import find_device
    from pipelines.train.anchor import ResolvedBase, load_anchor, resolve_base
    from pipelines.train.windows import make_windows

    if out.exists():
        raise DataError(f"'{out}' exists already. Choose another folder, or remove it.")
    found_device = find_device(device)
    if not isinstance(base, ResolvedBase):
        with resolve_base(Path(base)) as resolved:
            base = resolved
    wanted = max([layer, *rows_layers])
    if wanted >= base.description.num_layers:
        raise TrainingError(
            f"layer {wanted} does not exist; the base has layers 0 to {base.description.num_layers - 1}."
        )
    model, tokenizer = load_anchor(base, dtype=dtype, device=found_device)
    chosen = make_windows(
        texts, tokenizer, sequence_length=sequence_length, limit=windows, seed=seed, what="the public text"
    )
    ids = torch.from_numpy(chosen.ids).long()
    split = SplitDecoder(model, layers_prefix=base.description.layers_prefix, first=layer)
    total = StatisticsSum(normalization=normalization, skip_first=skip_first)
    for start in range(0, len(ids), 8):
        total.add(split.lower(ids[start : start + 8]))
    assert total.total is not None
    made_with, embedding = (None, None) if embedder is None else domain_embedding(texts, embedder=embedder)
    rows: dict[int, Tensor] = {}
    if rows_layers and embedding is not None:
        rows = dict.fromkeys(rows_layers, embedding_row(embedding, hidden_size=base.description.hidden_size))
    elif rows_layers:
        rows = ffn_input_rows(split, ids, ffns=ffn_modules(model, base.description, rows_layers))
    tensors = statistics_tensors(total.total)
    tensors |= {f"row.{number}.weight": row.numpy() for number, row in rows.items()}
    tensors |= {} if embedding is None else {"embedding": embedding}
    summed = None
    if inputs:
        from composer.upcycling.measuring import inputs_artifacts
        from pipelines.train.router_inputs import sum_inputs

        found = sum_inputs(model, ids, base=base.description, attention=True)
        summed = inputs_artifacts(found, documents=chosen.documents)
        tensors |= summed.tensors
    info = RoutingInfo(
        inputs=None if summed is None else summed.info.inputs,
        statistics=StatisticsInfo(
            layer=layer,
            normalization=normalization,
            tokens=int(total.total.count),
            documents=chosen.documents,
        ),
        rows=_public_rows_info(rows, init="anchor" if embedding is None else "sentence-transformer"),
        embedding=made_with,
        anchor=AnchorInfo.of(base.ref),
    )
    out.mkdir(parents=True)
    RoutingArtifacts(info=info, tensors=tensors).save(out)
    (out / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n")
    return out


def _public_rows_info(rows: dict[int, Tensor], *, init: str) -> RowsInfo | None:
    if not rows:
        return None
    return RowsInfo(layers=tuple(sorted(rows)), has_bias=False, public_digest=rows_digest(rows), init=init)
