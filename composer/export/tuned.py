"""The tensors that were tuned after composing, by the place that they have in a stock checkpoint; none is read.

Knows the names of a composed model's parameters; knows nothing of stock names. Remembers what was asked for, so that no
tuned tensor is lost without a word.
"""

from __future__ import annotations

from pathlib import Path

from composer.export.tensors import Slice
from composer.lock import TUNED_FOLDER
from composer.members import Members
from experts.errors import BuildError
from experts.fingerprint import MAX_BASE_TENSORS
from experts.safetensors_header import MAX_BASE_HEADER, read_header

__all__ = ["TunedTensors"]


class TunedTensors:
    """What a tuning wrote; nothing where the composition was not tuned, or somebody is left out.

    Args:
        members: The experts that are exported.
    """

    def __init__(self, members: Members) -> None:
        self._base = members.description
        self._tied = bool(members.description.config.get("tie_word_embeddings"))
        self._slices: dict[str, Slice] = {}
        self._claimed: set[str] = set()
        self.grown: dict[str, dict[str, Slice]] = {}
        """Expert that joined after the tuning -> its rows ``(d,)`` by the name of the router's."""
        tuned = members.lock.tuned
        for entry in tuned.files if tuned else ():
            self._slices |= _slices(members.folder / TUNED_FOLDER / entry.path, entry.size)
        for rows in tuned.grown if tuned else ():
            self.grown[rows.expert] = _slices(members.folder / TUNED_FOLDER / rows.file.path, rows.file.size)

    def trunk(self, name: str) -> Slice | None:
        """Return a tensor of the base by its name there; a tied head is the embedding."""
        if self._tied and name == "lm_head.weight" and f"base.{name}" not in self._slices:
            name = next((n for n in self._base.tensors if n.endswith("embed_tokens.weight")), name)
        return self._claim(f"base.{name}")

    def rows(self, layer: int) -> Slice | None:
        """Return a layer's router rows, ``(present, d)``, of those who were there when it was tuned."""
        return self._claim(f"{self._module(layer)}.router.scorer.rows")

    def later_row(self, layer: int, expert: str) -> Slice:
        """Return the row ``(d,)`` of an expert that joined after the tuning."""
        return self.grown[expert][f"{self._module(layer)}.router.scorer.rows"]

    def biases(self, layer: int) -> Slice | None:
        """Return a layer's router biases, ``(present,)``; those above 0 count as 0, and so does the anchor's."""
        return self._claim(f"{self._module(layer)}.router.scorer.bias")

    def ffn(self, layer: int, position: int, role: str) -> Slice | None:
        """Return one matrix of the FFN at a position of a layer's stack."""
        down = role == "down"
        stack = self._claim(f"{self._module(layer)}.experts.{'down_proj' if down else 'gate_up_proj'}")
        if stack is None or down:
            return stack and stack.item(position)
        both = stack.item(position)
        half = both.shape[0] // 2
        return both.rows(0, half) if role == "gate" else both.rows(half, 2 * half)

    def unclaimed(self) -> list[str]:
        """Return the tuned tensors that nobody asked for."""
        return sorted(set(self._slices) - self._claimed)

    def _module(self, layer: int) -> str:
        return f"base.{self._base.layers_prefix}.{layer}.{self._base.layout.module}"

    def _claim(self, name: str) -> Slice | None:
        self._claimed.add(name)
        return self._slices.get(name)


def _slices(path: Path, size: int) -> dict[str, Slice]:
    if not path.is_file() or path.stat().st_size != size:
        raise BuildError(
            f"{path} is missing or has been changed (expected {size} bytes). Tune the folder again."
        )
    header = read_header(path, max_header=MAX_BASE_HEADER, max_tensors=MAX_BASE_TENSORS)
    return {name: Slice.of(path, tensor) for name, tensor in header.tensors.items()}
