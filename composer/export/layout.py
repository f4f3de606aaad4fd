"""Lays out a stock checkpoint: every tensor it holds, by name and order, and where its bytes come from.

Knows where the composed folder keeps weights; reads headers, no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from composer.export.rows import RouterRows
from composer.export.seats import Seat, merged_trunk
from composer.export.target import StockTarget
from composer.export.tensors import FLOATS, Entry, Slice, computed, convert, float_bytes, low_rank, rounded
from composer.export.tuned import TunedTensors
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
        members: The experts, in canonical order.
        seats: Who stands at which index.
        rows: Router rows.
        tuned: What was tuned after composing.
        dtype: Of every floating tensor, in safetensors' spelling.
        dense: Layers that keep the anchor's FFN.
    """

    def __init__(
        self,
        target: StockTarget,
        members: Members,
        seats: Sequence[Seat],
        rows: RouterRows,
        tuned: TunedTensors,
        *,
        dtype: str,
        dense: tuple[int, ...],
    ) -> None:
        self.target = target
        self.members = members
        self.base = members.description
        self.seats = seats
        self.rows = rows
        self.tuned = tuned
        self.dtype = dtype
        self.dense = frozenset(dense)
        self.anchor = _base_tensors(members)
        self.experts = {member.id: _Expert(member, self.base) for member in members.experts}
        self._merge = _trunk_of(members)

    def entries(self) -> Iterator[Entry]:
        """Yield every tensor: what is not in a layer, then layer by layer trunk, gate and experts."""
        by_layer: dict[int | None, list[str]] = {}
        for name in self.anchor:
            by_layer.setdefault(self.base.layer_of(name), []).append(name)
        for name in by_layer.get(None, ()):
            yield self._trunk(name)
        for layer in range(self.base.num_layers):
            linears = {} if layer in self.dense else self.base.ffn_linears(layer)
            replaced = {f"{linear.name}.weight" for linear in linears.values()}
            for name in by_layer.get(layer, ()):
                if name not in replaced:
                    yield self._trunk(name)
            if linears:
                yield self._gate(layer)
                yield from self._ffns(layer, linears)

    def _trunk(self, name: str) -> Entry:
        stored = self.tuned.trunk(name)
        if stored is not None:
            return convert(name, stored, self.dtype)
        found = self.anchor[name]
        if self._merge is None or found.dtype not in FLOATS:
            return convert(name, found, self.dtype)
        return self._merge(name, found, self.dtype)

    def _gate(self, layer: int) -> Entry:
        """Stack the rows of a layer: the anchor's for experts that are its copies, zeros where all are."""
        shape = (len(self.seats), self.base.hidden_size)
        self.tuned.rows(layer)
        return Entry(
            name=self.target.gate_name(layer),
            spec=TensorSpec(dtype=self.dtype, shape=shape),
            source=lambda: self._gate_bytes(layer, shape),
        )

    def _present(self, layer: int) -> list[Seat]:
        """Return who has a row and a place in a layer's stack; nobody where only the anchor is."""
        found = [seat for seat in self.seats if seat.member is None or layer in seat.member.card.layers]
        return found if any(seat.member is not None for seat in found) else []

    def _gate_bytes(self, layer: int, shape: tuple[int, int]) -> bytes:
        import numpy as np

        gate = np.zeros(shape, dtype=np.float32)
        present = self._present(layer)
        if present:
            rows = self.rows.of(layer, present)
            gate[:] = rows[0]  # the anchor's, wherever somebody is absent
            for seat, row in zip(present, rows, strict=True):
                gate[self.seats.index(seat)] = row
        return float_bytes(gate, self.dtype)

    def _ffns(self, layer: int, linears: Mapping[str, LinearSpec]) -> Iterator[Entry]:
        present = self._present(layer)
        for index, seat in enumerate(self.seats):
            position = present.index(seat) if seat in present else 0
            for role, linear in linears.items():
                name = self.target.expert_name(layer, index, role)
                weight = self.anchor[f"{linear.name}.weight"]
                stored = self.tuned.ffn(layer, position, role)
                if stored is not None:
                    yield convert(name, stored, self.dtype)
                elif seat.member is None:
                    yield convert(name, weight, self.dtype)
                else:
                    yield self.experts[seat.member.id].entry(name, linear, weight, self.dtype)


def _trunk_of(members: Members) -> Callable[[str, Slice, str], Entry] | None:
    """Return what makes a tensor of the trunk out of its name and the base's, or None where it is the base's own."""
    spec = members.lock.upcycle
    if spec is None or not members.experts:
        return None
    base = members.description
    if spec.copies:
        (only,) = (_Expert(member, base) for member in members.experts)
        return lambda name, found, dtype: convert(name, only.tensors[name], dtype)
    merged = merged_trunk(members.lock)
    if merged is None:
        return None
    from composer.layers.install import ExpertSource
    from composer.upcycling.trunk import merge_one, reduced

    with_base = bool(spec.seed_expert)
    sources = [ExpertSource(member, base) for member in members.experts]
    how = reduced(merged, [member.locked.name for member in members.experts], with_base=with_base)

    def merge(name: str, found: Slice, dtype: str) -> Entry:
        # the base's tensor takes part as a model of this dtype holds it
        return computed(
            name,
            found.shape,
            lambda: merge_one(name, sources, how, base=rounded(found, dtype) if with_base else None),
            dtype,
        )

    return merge


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

    def entry(self, name: str, linear: LinearSpec, anchor: Slice, dtype: str) -> Entry:
        """Return the tensor of one linear: the expert's own, the anchor's plus its update, or the anchor's."""
        if self.lora is not None and linear.name in self.lora.modules:
            a, b = (self.tensors[tensor] for tensor in lora_tensor_names(linear.name))
            scaling = self.lora.modules[linear.name].scaling
            return low_rank(name, anchor, a=a, b=b, scaling=scaling, dtype=dtype)
        return convert(name, self.tensors.get(f"{linear.name}.weight", anchor), dtype)
