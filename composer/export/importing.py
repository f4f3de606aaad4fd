"""Turns a FlexOlmo checkpoint into what a registry takes: a dense base, public rows, and one expert an owner.

Copies bytes tensor by tensor. Knows layouts and folders; who the owners are is told by a small YAML.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from composer.building import TOKENIZER_FILES, new_folder
from composer.export.flex_olmo import FlexOlmoTarget
from composer.export.owners import ImportedExpert, OwnersFile
from composer.export.shards import SHARD_BYTES, Progress, write_file, write_shards
from composer.export.stock_checkpoint import ROLES, StockCheckpoint
from composer.export.target import ANCHOR
from composer.export.tensors import Entry, Slice, floats
from experts.base import BaseDescription
from experts.card import BaseRef, TrainingInfo
from experts.errors import ManifestError
from experts.fingerprint import tokenizer_fingerprint
from experts.package import pack
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, RowsInfo
from experts.routing_origin import AnchorInfo, rows_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Imported", "import_checkpoint"]

PUBLIC_FOLDER = "public-routing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What `import_checkpoint` wrote.

    Attributes:
        out: The folder, with ``base``, ``public-routing``, ``experts/OWNER/NAME`` and ``manifest.yaml``.
        base: The anchor's name.
        experts: Names in the checkpoint's order, which begins after the anchor.
    """

    out: Path
    base: str
    experts: tuple[str, ...]

    @property
    def in_canonical_order(self) -> bool:
        """Whether an export has the experts in the checkpoint's order: compositions sort them by name."""
        return list(self.experts) == sorted(self.experts)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The packed experts."""
        return tuple(self.out / "experts" / name for name in self.experts)


def import_checkpoint(
    checkpoint: Path | str, owners: OwnersFile, out: Path | str, *, progress: Progress | None = None
) -> Imported:
    """Take a checkpoint apart.

    Args:
        checkpoint: A folder with ``config.json`` and safetensors, per expert or fused.
        owners: Who experts 1, 2, ... belong to; expert 0 is the anchor's.
        out: The folder to write; it must not exist.
        progress: Told of every tensor.

    Raises:
        AdmissionError: The checkpoint is not a whole FlexOlmo one, or an expert is not admissible.
        ManifestError: The owners' file has another number of experts.
        BuildError: ``out`` exists or cannot be written. Nothing is left behind.
    """
    source = StockCheckpoint.read(Path(checkpoint))
    if len(owners.experts) != source.num_experts - 1:
        raise ManifestError(
            f"The owners file names {len(owners.experts)} experts, '{checkpoint}' holds {source.num_experts - 1} "
            "beside expert 0, which is the public base. Name experts 1, 2, ... in order."
        )
    with new_folder(Path(out)) as staging:
        _write_base(source, staging / "base", progress)
        base = BaseDescription.from_folder(staging / "base")
        ref = BaseRef(
            name=owners.base,
            fingerprint=base.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(staging / "base"),
        )
        digest = rows_digest({layer: floats(gate.item(ANCHOR)) for layer, gate in source.gates.items()})
        public = _rows(source, ANCHOR, public_digest=digest, anchor=AnchorInfo.of(ref))
        _write_public(public, staging / PUBLIC_FOLDER)
        for number, expert in enumerate(owners.experts, start=1):
            rows = _rows(source, number, public_digest=digest)
            _write_expert(
                source, number, expert, rows, base=base, ref=ref, staging=staging, progress=progress
            )
        _write_manifest(staging / "manifest.yaml", source, owners)
    return Imported(out=Path(out), base=owners.base, experts=tuple(expert.name for expert in owners.experts))


def _dense(source: StockCheckpoint, expert: int) -> Iterator[Entry]:
    """Yield an expert's matrices under the names they have in a dense model."""
    for layer, experts in sorted(source.ffns.items()):
        for role in ROLES:
            yield _entry(f"model.layers.{layer}.mlp.{role}_proj.weight", experts[expert][role])


def _entry(name: str, found: Slice) -> Entry:
    return Entry(name=name, spec=found.spec, source=found)


def _write_base(source: StockCheckpoint, folder: Path, progress: Progress | None) -> None:
    from transformers import AutoConfig

    folder.mkdir()
    trunk = (_entry(name, found) for name, found in source.trunk.items())
    write_shards(folder, [*trunk, *_dense(source, ANCHOR)], shard_bytes=SHARD_BYTES, progress=progress)
    stock = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    FlexOlmoTarget().dense_config(stock).to_json_file(folder / "config.json", use_diff=False)
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def _rows(
    source: StockCheckpoint, expert: int, *, public_digest: str, anchor: AnchorInfo | None = None
) -> RoutingArtifacts:
    layers = tuple(sorted(source.gates))
    info = RowsInfo(layers=layers, has_bias=False, public_digest=public_digest, init="imported")
    tensors: dict[str, NDArray[np.floating]] = {
        f"row.{layer}.weight": floats(source.gates[layer].item(expert)) for layer in layers
    }
    return RoutingArtifacts(info=RoutingInfo(rows=info, anchor=anchor), tensors=tensors)


def _write_public(public: RoutingArtifacts, folder: Path) -> None:
    folder.mkdir()
    public.save(folder)
    (folder / "routing.json").write_text(public.info.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_expert(
    source: StockCheckpoint,
    number: int,
    expert: ImportedExpert,
    rows: RoutingArtifacts,
    *,
    base: BaseDescription,
    ref: BaseRef,
    staging: Path,
    progress: Progress | None,
) -> None:
    """Write the raw folder and pack it; packing copies, so the raw one goes at once."""
    raw = staging / ".raw"
    raw.mkdir()
    write_file(raw / "ffn.safetensors", list(_dense(source, number)), progress=progress)
    config = {"format_version": 1, "layers": sorted(source.ffns), "base": ref.name}
    (raw / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    rows.save(raw)
    pack(
        raw,
        staging / "experts" / expert.name,
        name=expert.name,
        version=expert.version,
        domain=expert.domain,
        license=expert.license,
        base=base,
        base_ref=ref,
        training=TrainingInfo(method="imported"),
        routing=rows.info,
        description=expert.description,
    )
    shutil.rmtree(raw)


def _write_manifest(path: Path, source: StockCheckpoint, owners: OwnersFile) -> None:
    """Write the manifest whose composition has the checkpoint's logits."""
    data: Mapping[str, Any] = {
        "name": "imported",
        "recipe": "flexolmo",
        "base": owners.base,
        "experts": [f"{expert.name}@{expert.version}" for expert in owners.experts],
        "router": {
            "scorer": "learned",
            "context": "token",
            "selector": "topk",
            "top_k": source.top_k,
            "normalize": source.normalize,
        },
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
