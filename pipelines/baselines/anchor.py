"""The anchor as every arm runs it: with other tensors in some places, and without computing what arms share twice.

Knows weights by name and layers by number; knows nothing of experts or of how their tensors are mixed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experts.card import BaseRef
from experts.errors import BuildError
from pipelines.train.states import SplitDecoder

if TYPE_CHECKING:
    from composer.source import Source
    from experts.base import BaseDescription
    from pipelines.baselines.context import BaselineContext
    from registry.records import BaseRecord

__all__ = ["Anchor", "load_model"]


class _Substituted(nn.Module):
    """The anchor, run with other tensors in the places of some of its own; its own are not touched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.anchor = model
        self.tensors: Mapping[str, Tensor] = {}

    def forward(self, **kwargs: Any) -> Any:
        return functional_call(self.anchor, dict(self.tensors), kwargs=kwargs)


class Anchor:
    """A frozen causal LM whose layers below ``first`` no arm changes.

    States that enter layer ``first`` are kept for the windows they were computed for, as far as they fit, so that
    arms on the same windows run the lower layers once.

    Args:
        model: The anchor in eval mode.
        description: Its tensors and layout.
        first: The lowest layer that an expert changes.
        state_bytes: How much memory kept states may take.
    """

    def __init__(
        self, model: nn.Module, description: BaseDescription, *, first: int, state_bytes: int = 256 << 20
    ) -> None:
        self.model = model
        self.description = description
        self.first = first
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._weights = dict(model.named_parameters())
        self._model = _Substituted(model)
        self._splits: dict[int, SplitDecoder] = {}
        self._agrees: bool | None = None
        self._kept: dict[bytes, Tensor] = {}
        self._room = state_bytes

    def weight(self, name: str) -> Tensor:
        """One of the anchor's own weights, not a copy.

        Raises:
            BuildError: The model's class has no parameter of the checkpoint's name.
        """
        if name not in self._weights:
            raise BuildError(
                f"The base's model class has no parameter '{name}', though its checkpoint has; experts of such a "
                "base cannot be merged. Report the model family."
            )
        return self._weights[name].detach()

    def logits(
        self,
        ids: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of the anchor, or of the model that has ``tensors`` in the places of the anchor's.

        Args:
            ids: int64 ``(batch, length)``.
            tensors: By name, of layers from ``first`` on; dtype and device of the anchor.
            rows: Only these rows of the batch; None: all.

        Returns:
            ``(batch or rows, length, vocabulary)`` in the anchor's dtype, on its device.
        """
        tensors = tensors or {}
        for name in tensors:
            layer = self.description.layer_of(name)
            assert layer is not None, f"{name} lies outside of the decoder layers"
            assert layer >= self.first, f"{name} lies below layer {self.first}"
        ids = ids.to(self.device)
        with torch.inference_mode():
            states = self._shared_states(ids)
            if rows is not None:
                ids, states = ids[list(rows)], None if states is None else states[list(rows)]
            self._model.tensors = tensors
            try:
                return self._split(self.first).logits(ids, states=states)
            finally:
                self._model.tensors = {}

    def states(self, ids: Tensor, layer: int) -> Tensor:
        """Hidden states that enter a layer of the frozen anchor, ``(batch, length, hidden)``."""
        with torch.inference_mode():
            return self._split(layer).lower(ids.to(self.device))

    def _split(self, layer: int) -> SplitDecoder:
        if layer not in self._splits:
            prefix = f"anchor.{self.description.layers_prefix}"
            self._splits[layer] = SplitDecoder(self._model, layers_prefix=prefix, first=layer)
        return self._splits[layer]

    def _shared_states(self, ids: Tensor) -> Tensor | None:
        """States entering layer ``first``; None where there are none, or the family's forward cannot be cut."""
        if self.first == 0:
            return None
        if self._agrees is None:
            self._agrees = self._split(self.first).agrees(ids[:2])
        if not self._agrees:
            return None
        key = hashlib.blake2b(repr(ids.shape).encode() + ids.cpu().numpy().tobytes()).digest()
        if key in self._kept:
            return self._kept[key]
        states = self.states(ids, self.first)
        size = states.numel() * states.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[key] = states
        return states


def load_model(context: BaselineContext, description: BaseDescription) -> nn.Module:
    """Load a context's anchor, frozen, where the context computes."""
    from pipelines.devices import find_device
    from pipelines.train.anchor import ResolvedBase, load_anchor

    record = context.registry.base(context.base)
    ref = BaseRef(
        name=record.name, fingerprint=record.fingerprint, tokenizer_fingerprint=record.tokenizer_fingerprint
    )
    with tempfile.TemporaryDirectory(prefix="coterie-base-", dir=context.scratch) as scratch:
        folder = Path(scratch)
        _link_files(record, context.registry, folder)
        model, _ = load_anchor(
            ResolvedBase(folder=folder, ref=ref, description=description),
            dtype=context.dtype,
            device=find_device(context.device),
        )
    return model


def _link_files(record: BaseRecord, source: Source, folder: Path) -> None:
    """Link a base's files under their own names, which a checkpoint's reader wants."""
    for entry in record.files:
        target = folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        # a registry may be named by a relative path, which a link would read from its own folder
        target.symlink_to(source.blob_path(entry.sha256).absolute())
