"""Lays out a stock checkpoint: every tensor it holds, by name and order, and where its bytes come from.

Knows where the composed folder keeps weights; reads headers and rows, no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from composer.export.exactness import Rows
from composer.export.target import ANCHOR, StockTarget
from composer.export.tensors import Entry, Slice, convert, float_bytes, low_rank
from composer.members import BASE_FOLDER, Member, Members
from experts.base import BaseDescription, LinearSpec
from experts.errors import AdmissionError, BuildError
from experts.fingerprint import checkpoint_files
from experts.kinds import get_kind
from experts.kinds.lora import LoraSpec, lora_spec, lora_tensor_names
from experts.safetensors_header import TensorSpec, read_header

__all__ = ["Layout"]


class Layout:
    """The tensors of one export.

    Args:
        target: The stock class.
        members: The experts, in canonical order; the anchor becomes expert 0 of the checkpoint.
        rows: Router rows by expert id.
        dtype: Of every floating tensor, in safetensors' spelling.
        dense: Layers that keep the anchor's FFN.
    """

    def __init__(
        self,
        target: StockTarget,
        members: Members,
        rows: Mapping[int, Rows],
        *,
        dtype: str,
        dense: tuple[int, ...],
    ) -> None:
        self.target = target
        self.base = members.description
        self.rows = rows
        self.dtype = dtype
        self.dense = frozenset(dense)
        self.anchor = _base_tensors(members)
        self.experts = [_Expert(member, self.base) for member in members.experts]

    def entries(self) -> Iterator[Entry]:
        """Yield every tensor: what is not in a layer, then layer by layer trunk, gate and experts."""
        by_layer: dict[int | None, list[str]] = {}
        for name in self.anchor:
            by_layer.setdefault(self.base.layer_of(name), []).append(name)
        for name in by_layer.get(None, ()):
            yield convert(name, self.anchor[name], self.dtype)
        for layer in range(self.base.num_layers):
            linears = {} if layer in self.dense else self.base.ffn_linears(layer)
            replaced = {f"{linear.name}.weight" for linear in linears.values()}
            for name in by_layer.get(layer, ()):
                if name not in replaced:
                    yield convert(name, self.anchor[name], self.dtype)
            if linears:
                yield self._gate(layer)
                yield from self._ffns(layer, linears)

    def _gate(self, layer: int) -> Entry:
        """Stack the rows of a layer: the anchor's for experts that are its copies, zeros where all are."""
        shape = (len(self.experts) + 1, self.base.hidden_size)
        return Entry(
            name=self.target.gate_name(layer),
            spec=TensorSpec(dtype=self.dtype, shape=shape),
            source=lambda: self._gate_bytes(layer, shape),
        )

    def _gate_bytes(self, layer: int, shape: tuple[int, int]) -> bytes:
        import numpy as np

        rows = np.zeros(shape, dtype=np.float32)
        present = [expert.id for expert in self.experts if expert.has(layer)]
        if present:
            rows[:] = self.rows[ANCHOR].weights[layer]
            for expert in present:
                rows[expert] = self.rows[expert].weights[layer]
        return float_bytes(rows, self.dtype)

    def _ffns(self, layer: int, linears: Mapping[str, LinearSpec]) -> Iterator[Entry]:
        for role, linear in linears.items():
            weight = self.anchor[f"{linear.name}.weight"]
            yield convert(self.target.expert_name(layer, ANCHOR, role), weight, self.dtype)
        for expert in self.experts:
            for role, linear in linears.items():
                name = self.target.expert_name(layer, expert.id, role)
                yield expert.entry(name, linear, self.anchor[f"{linear.name}.weight"], self.dtype)


def _base_tensors(members: Members) -> dict[str, Slice]:
    """Find the anchor's tensors, and refuse files that are not what the composition was built with."""
    folder = members.folder / BASE_FOLDER
    found = {
        name: Slice.of(path, tensor)
        for path, tensors in checkpoint_files(folder).items()
        for name, tensor in tensors.items()
    }
    if {name: tensor.spec for name, tensor in found.items()} != dict(members.description.tensors):
        raise BuildError(f"The files in {folder} are not the anchor's. Build the folder again.")
    return found


class _Expert:
    """Where one expert's matrices come from."""

    def __init__(self, member: Member, base: BaseDescription) -> None:
        self.id = member.id
        self.layers = frozenset(member.card.layers)
        self.base = base
        kind = get_kind(member.card.kind)
        config = kind.read_config(member.file(kind.config_file))
        path = member.file(kind.weights_file)
        self.tensors = {name: Slice.of(path, tensor) for name, tensor in read_header(path).tensors.items()}
        expected = kind.resolve(config, base).shapes
        if {name: tensor.shape for name, tensor in self.tensors.items()} != dict(expected):
            raise AdmissionError(
                f"The weights of {member.locked.name} are not what its configuration says. Build the folder again."
            )
        self.lora: LoraSpec | None = lora_spec(config, base) if member.card.kind == "lora" else None

    def has(self, layer: int) -> bool:
        """Return whether the expert has a router row in a layer."""
        return layer in self.layers

    def entry(self, name: str, linear: LinearSpec, anchor: Slice, dtype: str) -> Entry:
        """Return the tensor of one linear: the expert's own, the anchor's plus its update, or the anchor's."""
        if self.lora is not None and linear.name in self.lora.modules:
            a, b = (self.tensors[tensor] for tensor in lora_tensor_names(linear.name))
            scaling = self.lora.modules[linear.name].scaling
            return low_rank(name, anchor, a=a, b=b, scaling=scaling, dtype=dtype)
        return convert(name, self.tensors.get(f"{linear.name}.weight", anchor), dtype)
