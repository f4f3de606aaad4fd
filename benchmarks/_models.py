"""Checkpoints to measure with: dense Llamas that share everything but their FFNs, and a registry of those FFNs.

Weights are random; what is measured does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.package import pack
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, RowsInfo
from experts.routing_origin import AnchorInfo, rows_digest

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from registry import Registry
    from registry.records import BaseRecord

__all__ = ["Shape", "make_checkpoints", "register_ffn", "register_public_rows", "write_manifest"]

BASE = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    dtype: torch.dtype = torch.bfloat16

    def config(self) -> LlamaConfig:
        """Return the configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            dtype=self.dtype,
        )

    def ffn(self, seed: int) -> dict[str, torch.Tensor]:
        """Draw one model's FFN tensors, by their names in the checkpoint."""
        generator = torch.Generator().manual_seed(seed)
        h, i = self.hidden, self.intermediate
        shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        return {
            f"model.layers.{layer}.mlp.{name}.weight": (
                torch.randn(shape, generator=generator) * shape[1] ** -0.5
            ).to(self.dtype)
            for layer in range(self.layers)
            for name, shape in shapes.items()
        }


def make_checkpoints(folder: Path, shape: Shape, *, count: int) -> list[Path]:
    """Write ``count`` dense checkpoints with a tokenizer beside each; return their folders."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(shape.config()).to(shape.dtype)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    folders = []
    for number in range(count):
        target = folder / f"checkpoint-{number}"
        target.mkdir(parents=True)
        model.config.save_pretrained(target)
        _tokenizer().save_pretrained(target)
        save_file(tensors | shape.ffn(number), target / "model.safetensors", metadata={"format": "pt"})
        folders.append(target)
    return folders


def _tokenizer() -> PreTrainedTokenizerFast:  # type: ignore[name-defined]  # noqa: F821
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def register_public_rows(registry: Registry, checkpoint: Path, work: Path) -> BaseRecord:
    """Add a checkpoint as the base, with a public router row for every layer."""
    record = registry.add_base(checkpoint, name=BASE)
    folder = work / "public"
    folder.mkdir(parents=True)
    info = _save_rows(folder, record.description, seed=0, bias=None, public_digest=None)
    info = info.model_copy(update={"anchor": AnchorInfo.of(record)})
    return registry.set_base_routing(BASE, folder, info)


def register_ffn(
    registry: Registry,
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    base: BaseRecord,
    work: Path,
    seed: int,
    bias: float | None = None,
) -> None:
    """Pack FFN tensors as an expert with random router rows, and register it.

    Args:
        registry: Where to.
        name: ``owner/expert``.
        tensors: As `Shape.ffn` names them.
        base: The base's record.
        work: Folder for what is packed.
        seed: Of the router rows.
        bias: Of every router row, 0 or less; None: there are no biases.
    """
    from safetensors.torch import save_file

    description = base.description
    raw = work / "raw" / name
    raw.mkdir(parents=True)
    save_file(tensors, raw / "ffn.safetensors")
    (raw / "config.json").write_text(
        json.dumps({"format_version": 1, "layers": list(range(description.num_layers)), "base": BASE})
    )
    assert base.routing is not None, "register_public_rows attached it"
    assert base.routing.rows is not None, "with rows"
    public_digest = base.routing.rows.public_digest
    info = _save_rows(raw, description, seed=seed, bias=bias, public_digest=public_digest)
    staging = work / "packed" / name
    staging.parent.mkdir(parents=True, exist_ok=True)
    pack(
        raw,
        staging,
        name=name,
        version=1,
        domain="bench",
        license="Apache-2.0",
        base=description,
        base_ref=BaseRef(
            name=BASE, fingerprint=base.fingerprint, tokenizer_fingerprint=base.tokenizer_fingerprint
        ),
        routing=info,
    )
    registry.register(staging)


def _save_rows(
    folder: Path, base: BaseDescription, *, seed: int, bias: float | None, public_digest: str | None
) -> RoutingInfo:
    """Save random rows; without a digest of public ones, they are the public ones."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(base.num_layers):
        row = random.normal(size=base.hidden_size) / base.hidden_size**0.5
        tensors[f"row.{layer}.weight"] = row.astype(np.float32)
        if bias is not None:
            tensors[f"row.{layer}.bias"] = np.array([bias], dtype=np.float32)
    layers = tuple(range(base.num_layers))
    if public_digest is None:
        public_digest = rows_digest({layer: tensors[f"row.{layer}.weight"] for layer in layers})
    info = RoutingInfo(
        rows=RowsInfo(layers=layers, has_bias=bias is not None, public_digest=public_digest, init="random")
    )
    RoutingArtifacts(info=info, tensors=tensors).save(folder)
    return info


def write_manifest(path: Path, experts: Sequence[str]) -> Path:
    """Write a manifest that composes experts by their learned rows, top-2 per token."""
    lines = ["format_version: 1", "name: bench", f"base: {BASE}", "experts:"]
    lines += [f"  - {name}" for name in experts]
    lines += ["router: {scorer: learned, context: token, top_k: 2, normalize: true}"]
    path.write_text("\n".join(lines) + "\n")
    return path
