"""The public anchor as experts see it: its tensors, its fingerprint, its feed-forward linears.

Knows names, shapes and dtypes; knows no values and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, JsonValue

from experts.embedding import EmbeddingSpec, read_embedding
from experts.errors import AdmissionError, IntegrityError
from experts.ffn_layout import FFNLayout, FoundLayout, find_layout
from experts.fingerprint import MAX_BASE_TENSORS, Progress, checkpoint_files, describe_checkpoint
from experts.safetensors_header import DTYPE_BYTES, TensorSpec
from experts.strict import load_json, validate
from experts.tokens import TOKENIZER_FILE, tokens_digest

__all__ = ["BaseDescription", "LinearSpec", "TensorSpec"]

MAX_CONFIG_BYTES = 1 << 20
MAX_DESCRIPTION_BYTES = 32 << 20
_HEADS = ("lm_head.weight", "embed_out.weight")
ENCODER_PREFIX = "encoder.layer"
"""Where transformers' encoders without a head keep their layers, and hence what adapters are named after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear of the base; its weight has shape ``(out_features, in_features)``."""

    role: str
    """``gate``, ``up``, ``down`` or ``gate_up``."""
    name: str
    """Full module name, without ``.weight``."""
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDescription:
    """What has to be known of an anchor to check an expert against it, without opening the anchor again."""

    config: Mapping[str, object]
    """The anchor's ``config.json``."""
    tensors: Mapping[str, TensorSpec]
    """Every tensor in its checkpoint. Tied tensors that the checkpoint leaves out are not listed."""
    fingerprint: str
    """See `experts.fingerprint`."""
    layout: FFNLayout
    layers_prefix: str
    """What stands before the layer number, for instance ``model.layers``."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width between up and down in layer 0; `ffn_linears` has each layer's own."""
    dtype: str
    """Dtype of the feed-forward weights in safetensors' spelling."""
    embedding: EmbeddingSpec | None = None
    """How an encoder makes vectors of texts; None for language models."""
    tokens: str | None = None
    """An encoder's `experts.tokens.tokens_digest`; None for language models and encoders without ``tokenizer.json``."""

    @classmethod
    def from_folder(cls, path: Path, *, progress: Progress | None = None) -> Self:
        """Describe a checkpoint folder; every tensor is hashed, in chunks.

        Args:
            path: Holds ``config.json`` and ``model.safetensors`` or shards with their index; for an encoder also
                the files of sentence-transformers.
            progress: Called with the number of bytes just hashed.

        Raises:
            AdmissionError: A file is missing or malformed, or the layout is not known.
        """
        config = load_json(
            path / "config.json", what="config.json", max_bytes=MAX_CONFIG_BYTES, error=AdmissionError
        )
        if not isinstance(config, dict):
            raise AdmissionError("config.json is not a JSON object.")
        # an unknown layout is reported before the hashing, which may take a minute
        listed = {name: spec for held in checkpoint_files(path).values() for name, spec in held.items()}
        embedding = _embedding(path, find_layout(listed, config=config), listed, config=config)
        tensors, fingerprint = describe_checkpoint(path, progress=progress)
        return cls._from_parts(
            config=config,
            tensors=tensors,
            fingerprint=fingerprint,
            embedding=embedding,
            tokens=None if embedding is None else _tokens(path),
        )

    @classmethod
    def from_headers(cls, path: Path) -> Self:
        """Describe a checkpoint without reading its tensors; the fingerprint is then empty.

        Raises:
            AdmissionError: As `from_folder`.
        """
        config = load_json(
            path / "config.json", what="config.json", max_bytes=MAX_CONFIG_BYTES, error=AdmissionError
        )
        if not isinstance(config, dict):
            raise AdmissionError("config.json is not a JSON object.")
        listed = {name: spec for held in checkpoint_files(path).values() for name, spec in held.items()}
        tensors = {n: TensorSpec(dtype=listed[n].dtype, shape=listed[n].shape) for n in sorted(listed)}
        return cls._from_parts(config=config, tensors=tensors, fingerprint="", embedding=None)

    @classmethod
    def _from_parts(
        cls,
        *,
        config: Mapping[str, object],
        tensors: Mapping[str, TensorSpec],
        fingerprint: str,
        embedding: EmbeddingSpec | None,
        tokens: str | None = None,
    ) -> Self:
        found = find_layout(tensors, config=config)
        down = tensors[f"{found.layout.name_of('down', prefix=found.prefix, layer=0)}.weight"]
        return cls(
            config=config,
            tensors=tensors,
            fingerprint=fingerprint,
            layout=found.layout,
            layers_prefix=found.prefix,
            num_layers=found.num_layers,
            hidden_size=down.shape[0],
            intermediate_size=down.shape[1],
            dtype=down.dtype,
            embedding=embedding,
            tokens=tokens,
        )

    @property
    def tied_head(self) -> str | None:
        """Name of an output matrix that the checkpoint stores although it is tied to the embedding, or None.

        Some savers write both; they are one parameter.
        """
        inner = self.config.get("text_config")
        configs = (self.config, inner if isinstance(inner, dict) else {})
        if not any(config.get("tie_word_embeddings") for config in configs):
            return None
        head = next((name for name in self.tensors if name.endswith(_HEADS)), None)
        outside = [name for name in self.tensors if name != head and self.layer_of(name) is None]
        twins = [name for name in outside if head and self.tensors[name].shape == self.tensors[head].shape]
        return head if twins else None

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint, those of a tied pair counted once."""
        copy = self.tied_head
        return sum(spec.numel for name, spec in self.tensors.items() if name != copy)

    def ffn_linears(self, layer: int) -> dict[str, LinearSpec]:
        """Return the feed-forward linears of a layer by role."""
        return {role: self._linear(role, layer) for role in self.layout.linears}

    def _linear(self, role: str, layer: int) -> LinearSpec:
        name = self.layout.name_of(role, prefix=self.layers_prefix, layer=layer)
        out_features, in_features = self.tensors[f"{name}.weight"].shape
        return LinearSpec(
            role=role,
            name=name,
            in_features=in_features,
            out_features=out_features,
            bias=f"{name}.bias" in self.tensors,
        )

    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """Return every linear inside the layers: module name to ``(out_features, in_features)``."""
        return {
            name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
            for name, spec in self.tensors.items()
            if name.endswith(".weight") and len(spec.shape) == 2 and self.layer_of(name) is not None
        }

    def layer_of(self, name: str) -> int | None:
        """Return the layer that a tensor or module name belongs to, or None."""
        if not name.startswith(f"{self.layers_prefix}."):
            return None
        number = name[len(self.layers_prefix) + 1 :].partition(".")[0]
        return int(number) if number.isdecimal() and number.isascii() else None

    def to_json(self) -> str:
        """Return the description as JSON with sorted keys, from which `from_json` restores an equal one."""
        record = {
            "format_version": 1,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "tensors": {name: [spec.dtype, list(spec.shape)] for name, spec in self.tensors.items()},
        }
        if self.embedding is not None:
            record["embedding"] = self.embedding.model_dump(mode="json")
        if self.tokens is not None:
            record["tokens"] = self.tokens
        return json.dumps(record, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """Restore a description; no file is opened and nothing is hashed.

        Raises:
            IntegrityError: ``data`` was not written by `to_json`.
        """
        raw = data.encode() if isinstance(data, str) else data
        what = "description of the base"
        value = load_json(raw, what=what, max_bytes=MAX_DESCRIPTION_BYTES, error=IntegrityError)
        record = validate(_Record, value, what=what, error=IntegrityError)
        tensors = {n: TensorSpec(dtype=d, shape=shape) for n, (d, shape) in sorted(record.tensors.items())}
        if len(tensors) > MAX_BASE_TENSORS or any(spec.dtype not in DTYPE_BYTES for spec in tensors.values()):
            raise IntegrityError("The description of the base lists too many tensors or an unknown dtype.")
        return cls._from_parts(
            config=dict(record.config),
            tensors=tensors,
            fingerprint=record.fingerprint,
            embedding=record.embedding,
            tokens=record.tokens,
        )


def _embedding(
    path: Path, found: FoundLayout, tensors: Mapping[str, TensorSpec], *, config: Mapping[str, object]
) -> EmbeddingSpec | None:
    if not found.layout.encoder:
        return None
    if found.prefix != ENCODER_PREFIX:
        raise AdmissionError(
            f"The encoder's layers are called '{found.prefix}.N', as in a model with a head; '{ENCODER_PREFIX}.N' is "
            "needed. Load the folder with sentence-transformers and save it with save_pretrained."
        )
    down = tensors[f"{found.layout.name_of('down', prefix=found.prefix, layer=0)}.weight"]
    return read_embedding(path, config=config, hidden_size=down.shape[0])


def _tokens(path: Path) -> str | None:
    file = path / TOKENIZER_FILE
    return tokens_digest(file, follow_symlinks=True) if file.exists() else None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int
    config: dict[str, JsonValue]
    fingerprint: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    embedding: EmbeddingSpec | None = None
    tokens: str | None = None
