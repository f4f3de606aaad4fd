"""What enters every decoder layer of a model on a few prompts, with one layer's weights in memory at a time.

Runs the model's own class, so that it holds for every architecture whose layers pass hidden states on. Knows where
the decoder keeps its parts; knows nothing of routers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from composer.mergekit_moe.matrices import BLOCK_BYTES, read_rows
from experts.errors import BuildError

if TYPE_CHECKING:
    from composer.mergekit_moe.sources import SourceModel

__all__ = ["StreamedDecoder", "read_tensor"]


def read_tensor(source: SourceModel, name: str, dtype: torch.dtype) -> Tensor:
    """Read one tensor, its adapter's update added, a few rows at a time into another dtype."""
    stored = source.tensors[name]
    result = torch.empty(stored.shape, dtype=dtype)
    rows = stored.shape[0]
    each = max(1, BLOCK_BYTES // max(1, stored.spec.nbytes // rows))
    for first in range(0, rows, each):
        last = min(rows, first + each)
        result[first:last] = read_rows(stored, first, last, source.update(name))
    return result


class _Seen(Exception):  # noqa: N818 - no failure: the forward pass has done what it was for
    """The last layer was reached."""


class StreamedDecoder:
    """A model whose layers are read when they are run.

    Args:
        source: The model.
        dtype: That it computes in.
    """

    def __init__(self, source: SourceModel, *, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source = source
        self.dtype = dtype
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        prefix, _, layers = source.description.layers_prefix.rpartition(".")
        self.decoder: Any = model.get_submodule(prefix).eval()
        self.layers: Sequence[Any] = getattr(self.decoder, layers)
        self._restore_buffers()
        embedding = next(
            name for name, module in model.named_modules() if module is self.decoder.get_input_embeddings()
        )
        self._embedding = f"{embedding}.weight"

    def _restore_buffers(self) -> None:
        """Compute the buffers that were made without memory, rotary frequencies above all."""
        for name, module in list(self.decoder.named_children()):
            if any(buffer.is_meta for buffer in module.buffers()) and module is not self.layers:
                setattr(self.decoder, name, type(module)(self.decoder.config))
        if any(buffer.is_meta for buffer in self.layers.buffers()):  # type: ignore[attr-defined]
            raise BuildError(
                f"The layers of {self.source.ref} ({type(self.decoder).__name__}) hold buffers that cannot be computed "
                "one layer at a time. Use gate_mode cheap_embed, random or uniform_random."
            )

    def entering(
        self, batches: Sequence[Mapping[str, Tensor]], reduce: Callable[[Tensor], Tensor]
    ) -> list[list[Tensor]]:
        """Run batches of token ids and reduce what enters each layer.

        Args:
            batches: Keyword arguments of the model: ``input_ids`` int64 ``(rows, length)``, and its mask.
            reduce: Makes of hidden states ``(rows, length, d)`` what is kept.

        Returns:
            For each batch, one tensor a layer.
        """
        with torch.no_grad():
            self._shrink_embedding(batches)
            states, arguments = [], []
            for batch in batches:
                state, called = self._calls(batch)
                states.append(state)
                arguments.append(called)
            kept: list[list[Tensor]] = [[] for _ in batches]
            for number, layer in enumerate(self.layers):
                for own, state in zip(kept, states, strict=True):
                    own.append(reduce(state))
                if number + 1 < len(self.layers):
                    states = self._run(layer, number, states, [called[number] for called in arguments])
        return kept

    def _shrink_embedding(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep the rows of the tokens that occur, under their old numbers."""
        embedding: Any = self.decoder.get_input_embeddings()
        used = torch.unique(torch.cat([batch["input_ids"].flatten() for batch in batches]))
        stored = self.source.tensors[self._embedding]
        rows = [read_rows(stored, int(token), int(token) + 1)[0] for token in used]
        table = torch.stack(rows).to(self.dtype)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        embedding.padding_idx = None
        forward = type(embedding).forward
        embedding.forward = lambda ids: forward(embedding, torch.searchsorted(used, ids))

    def _calls(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Return what enters the first layer, and how the model calls each: masks and positions are its own."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[Tensor] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            states.append(hidden_states)
            calls.append((args, kwargs))
            if len(calls) == len(self.layers):
                raise _Seen
            return hidden_states

        for layer in self.layers:
            layer.forward = record
        try:
            self.decoder(**batch, use_cache=False)
        except _Seen:
            pass
        finally:
            for layer in self.layers:
                del layer.forward
        return states[0], calls

    def _run(
        self,
        layer: Any,
        number: int,
        states: Sequence[Tensor],
        calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> list[Tensor]:
        prefix = f"{self.source.description.layers_prefix}.{number}."
        weights = {name: read_tensor(self.source, prefix + name, self.dtype) for name in layer.state_dict()}
        layer.load_state_dict(weights, assign=True)
        del weights
        results = []
        for state, (args, kwargs) in zip(states, calls, strict=True):
            result = layer(state, *args, **kwargs)
            results.append(result[0] if isinstance(result, tuple) else result)
        layer.to_empty(device="meta")
        return results
