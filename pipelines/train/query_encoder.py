"""The frozen base of a retriever in training: documents embedded once, queries run through the lower layers once.

Knows an embedding model of sentence-transformers and how to cut its encoder below a layer; knows nothing of adapters'
insides, pairs or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experts.base import BaseDescription
from experts.errors import TrainingError
from pipelines.train.states import Skip

__all__ = ["QueryStates", "RetrievalBase", "mean_state"]


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average states over the tokens that are not padding, and divide by the length.

    Args:
        states: ``(batch, tokens, hidden)``.
        mask: ``(batch, tokens)``, 1 for tokens.

    Returns:
        ``(batch, hidden)`` float32.
    """
    weights = mask[..., None].to(torch.float32)
    summed = (states.float() * weights).sum(dim=1)
    return F.normalize(summed / weights.sum(dim=1).clamp(min=1e-9), dim=1)


class QueryStates:
    """The states of many queries that entered a layer, one after the other without padding.

    Args:
        width: Of a state.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def extend(self, states: Tensor, mask: Tensor) -> None:
        """Add a batch: states ``(batch, tokens, hidden)``, padded on the right, and their mask ``(batch, tokens)``."""
        for row, length in zip(states, mask.sum(dim=1).tolist(), strict=True):
            self._rows.append(row[: int(length)].clone())

    def length(self, number: int) -> int:
        """Tokens of a query."""
        return len(self._rows[number])

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the states of some queries, padded with zeros, and their mask (int64)."""
        rows = [self._rows[number] for number in numbers]
        longest = max(len(row) for row in rows)
        states = torch.zeros(len(rows), longest, self._width, dtype=rows[0].dtype)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for position, row in enumerate(rows):
            states[position, : len(row)] = row
            mask[position, : len(row)] = 1
        return states, mask


class _Pass(Skip):
    """Passes states on as the layer it stands in for would: in a tuple, in some families."""

    def __init__(self, layer: nn.Module, *, in_tuple: bool) -> None:
        super().__init__(layer)
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.in_tuple else hidden_states


class _Keep(_Pass):
    """Keeps the states that enter the layer it stands in for."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.states = hidden_states
        return super().forward(hidden_states)


class _Enter(Skip):
    """Runs the layer it stands in for on stored states, whatever came from below."""

    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.states is not None
        return self.layer(self.states, *args, **kwargs)


class RetrievalBase:
    """A stock embedding model, frozen, and its encoder in two parts.

    Args:
        folder: The sentence-transformers folder.
        description: What is known of it.
        first: The first layer above the cut; adapters lie at it and above.
    """

    def __init__(self, folder: Path, *, description: BaseDescription, first: int) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        self.model.requires_grad_(False)
        self.model.eval()
        self.first = first
        assert description.embedding is not None
        self.spec = description.embedding
        self.width = description.hidden_size
        self.encoder: nn.Module = self.model[0].auto_model
        parent, _, self._attribute = description.layers_prefix.rpartition(".")
        self._stack = self.encoder.get_submodule(parent)
        self._layers: list[nn.Module] = list(getattr(self._stack, self._attribute).children())
        in_tuple = self._answers_in_tuples()
        self._keep = _Keep(self._layers[first], in_tuple=in_tuple)
        self._enter = _Enter(self._layers[first])
        self._skips = [_Pass(layer, in_tuple=in_tuple) for layer in self._layers]

    @torch.no_grad()
    def _answers_in_tuples(self) -> bool:
        """Whether layers return their states in a tuple, found out on two tokens."""
        seen: list[bool] = []
        hook = self._layers[0].register_forward_hook(lambda _, __, out: seen.append(isinstance(out, tuple)))
        tokens = torch.full((1, 2), 2)
        self._run({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        hook.remove()
        return seen[0]

    def embed_documents(self, texts: Sequence[str], *, batch_size: int) -> Tensor:
        """The base's own vectors, prompt and normalisation included: ``(documents, dimension)`` float32."""
        found: Tensor = self.model.encode_document(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float()

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Queries as the stock model takes them, prompt included: ``input_ids`` and ``attention_mask`` and so on."""
        prompt = self.spec.prompts.get("query")
        found: dict[str, Any] = self.model.preprocess(list(texts), prompt=prompt, task="query")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def mean_tokens(self, features: dict[str, Tensor]) -> Tensor:
        """Mean token embeddings, of length 1, ``(batch, hidden)`` float32; no layer runs.

        Raises:
            TrainingError: The embedding matrix has another width than the states.
        """
        table: Tensor = self.encoder.get_input_embeddings().weight  # type: ignore[operator]
        if table.shape[1] != self.width:
            raise TrainingError(
                f"static_statistics: the base's token embeddings have {table.shape[1]} dimensions, its states "
                f"{self.width}. Leave it out."
            )
        return mean_state(F.embedding(features["input_ids"], table), features["attention_mask"])

    @torch.no_grad()
    def lower(self, features: dict[str, Tensor]) -> Tensor:
        """States entering layer ``first``: ``(batch, tokens, hidden)``."""
        parts = [*self._layers[: self.first], self._keep, *self._skips[self.first + 1 :]]
        with self._only(parts):
            self._run(features)
        states, self._keep.states = self._keep.states, None
        assert states is not None
        return states

    def upper(self, states: Tensor, mask: Tensor) -> Tensor:
        """States leaving the last layer, from those that entered layer ``first``: ``(batch, tokens, hidden)``.

        Args:
            states: ``(batch, tokens, hidden)``; padding may hold anything.
            mask: ``(batch, tokens)``, 1 for tokens.
        """
        ids = torch.zeros(
            mask.shape, dtype=torch.int64
        )  # only their number counts: what they give is replaced
        self._enter.states = states
        try:
            with self._only([*self._skips[: self.first], self._enter, *self._layers[self.first + 1 :]]):
                return self._run({"input_ids": ids, "attention_mask": mask})
        finally:
            self._enter.states = None

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """The embedding of each row, by the stock model's own modules: ``(batch, dimension)``."""
        features: dict[str, Tensor] = {"token_embeddings": states, "attention_mask": mask}
        for module in list(self.model)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def _run(self, features: dict[str, Tensor]) -> Tensor:
        known = ("input_ids", "attention_mask", "token_type_ids")
        output = self.encoder(**{name: features[name] for name in known if name in features})
        states: Tensor = output.last_hidden_state
        return states

    @contextmanager
    def _only(self, layers: list[nn.Module]) -> Iterator[None]:
        whole = getattr(self._stack, self._attribute)
        setattr(self._stack, self._attribute, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(self._stack, self._attribute, whole)
