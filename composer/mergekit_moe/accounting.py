"""Accounts for every tensor of the models that a manifest names: used, dropped for a reason, or in the way.

Knows how FFNs and trunk are told apart; reads headers, and of biases the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer.export.tensors import FLOATS, Slice, floats
from composer.mergekit_moe.families import Family
from composer.mergekit_moe.manifest import MoEExpert
from composer.mergekit_moe.sources import SourceModel
from experts.errors import AdmissionError

__all__ = ["Account", "Dropped", "PlannedSource", "ffn_tensors", "trunk_names", "trunk_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Tensors of a source that do not reach the output."""

    source: str
    tensors: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """One expert and the model that it is from."""

    wish: MoEExpert
    model: SourceModel

    @property
    def width(self) -> int:
        """FFN width, which is one in all layers."""
        return self.model.description.intermediate_size


def ffn_tensors(source: SourceModel, layer: int) -> list[str]:
    """Return the names of a layer's FFN weights and biases in the file."""
    names = []
    for linear in source.description.ffn_linears(layer).values():
        names += [f"{linear.name}.weight", *([f"{linear.name}.bias"] if linear.bias else [])]
    return names


class Account:
    """Accounts for every tensor of every source: used, or dropped for a reason, or in the way."""

    def __init__(
        self, base: SourceModel, experts: Sequence[PlannedSource], shared: PlannedSource | None
    ) -> None:
        self.base = base
        self.models = list({id(e.model): e.model for e in [*experts, *([shared] if shared else [])]}.values())
        self.dropped: list[Dropped] = []
        ffn = {n for layer in range(base.description.num_layers) for n in ffn_tensors(base, layer)}
        self.trunk = trunk_names(base, ffn)
        """The base's tensors beside its FFNs, by their names in its files."""

    def problems(self, family: Family) -> list[str]:
        """Fill ``dropped``; return what can neither be used nor dropped."""
        problems = self._trunk(family)
        for model in self.models:
            problems += self._expert(model)
        return problems

    def _trunk(self, family: Family) -> list[str]:
        base = self.base
        ffn = {n for layer in range(base.description.num_layers) for n in ffn_tensors(base, layer)}
        if base not in self.models:
            self._drop(base, sorted(ffn), "FFNs of the base, in whose place experts stand")
        names = self.trunk
        buffers = [name for name in names if name.endswith((".inv_freq", ".attention.bias", ".masked_bias"))]
        self._drop(base, buffers, "a buffer that is computed anew")
        misfits = [name for name in names if name not in buffers and family.misfits(trunk_parts(base, name))]
        zeros = [name for name in misfits if name.endswith(".bias") and _is_zero(base.tensors[name])]
        self._drop(base, zeros, f"a bias of zeros, for which {family.name} has no place")
        problems = [
            f"{base.ref}: {name} has no place in {family.name}{_cure(family, name)}"
            for name in misfits
            if name not in zeros
        ]
        return problems + self._adapter(base, ffn)

    def _adapter(self, base: SourceModel, ffn: set[str]) -> list[str]:
        if base.adapter is not None:
            unread = [f"{name}.weight" for name in base.adapter.spec.modules if f"{name}.weight" in ffn]
            if base not in self.models:
                self._drop(
                    base, unread, "the adapter's updates of the base's FFNs, in whose place experts stand"
                )
        return []

    def _expert(self, model: SourceModel) -> list[str]:
        ffn = [n for layer in range(model.description.num_layers) for n in ffn_tensors(model, layer)]
        biases = [name for name in ffn if name.endswith(".bias")]
        zeros = [name for name in biases if _is_zero(model.tensors[name])]
        self._drop(model, zeros, "an FFN bias of zeros, for which no mixture class has a place")
        if model is not self.base:
            rest = sorted(set(model.tensors) - set(ffn))
            self._drop(model, rest, "not an FFN: attention, norms and embeddings are the base model's")
        if model.adapter is not None and model is not self.base:
            stray = [f"{name}.weight" for name in model.adapter.spec.modules if f"{name}.weight" not in ffn]
            self._drop(model, stray, "the adapter's updates beside the FFNs, which are the base model's here")
        cure = "`coterie build --composed` keeps them in a coterie model"
        if not any(
            name.endswith(".bias") for name in self._base_ffn()
        ):  # there one architecture is asked for
            cure = "the base has none either, so fine-tune the base itself"
        return [
            f"{model.ref}: {name} is not zero, and the experts of no mixture class have biases; {cure}"
            for name in biases
            if name not in zeros
        ]

    def _base_ffn(self) -> list[str]:
        layers = range(self.base.description.num_layers)
        return [name for layer in layers for name in ffn_tensors(self.base, layer)]

    def _drop(self, source: SourceModel, names: Sequence[str], reason: str) -> None:
        if names:
            self.dropped.append(Dropped(source=str(source.ref), tensors=tuple(names), reason=reason))


def _cure(family: Family, name: str) -> str:
    if ".self_attn." in name and name.endswith(".bias"):
        if name.endswith("o_proj.bias"):
            kept = "`coterie build --composed` keeps it in a coterie model"
            return f": no mixture class has a bias behind attention; {kept}"
        return "; `architecture: qwen` keeps biases of q, k and v" if not family.needs_biases else ""
    return ", and dropping it would change every answer"


def _is_zero(found: Slice) -> bool:
    return found.dtype in FLOATS and not floats(found).any()


def trunk_names(base: SourceModel, ffn: set[str]) -> list[str]:
    """Return the base's tensors beside its FFNs, in the order of the file."""
    return [name for name in base.tensors if name not in ffn]


def trunk_parts(base: SourceModel, name: str) -> dict[str, tuple[int, int] | None]:
    """Return what a trunk's tensor is called in the output: its new names, each with its rows where it is cut."""
    if not name.endswith(".self_attn.qkv_proj.weight"):
        return {name: None}
    config: Mapping[str, Any] = base.description.config
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or base.description.hidden_size // heads)
    query, key = heads * width, int(config.get("num_key_value_heads") or heads) * width
    stem = name.removesuffix("qkv_proj.weight")
    edges = [0, query, query + key, query + 2 * key]
    if edges[-1] != base.tensors[name].shape[0]:
        raise AdmissionError(
            f"{base.ref}: {name} has {base.tensors[name].shape[0]} rows, its config.json says {edges[-1]}."
        )
    return {f"{stem}{role}_proj.weight": (edges[n], edges[n + 1]) for n, role in enumerate("qkv")}
