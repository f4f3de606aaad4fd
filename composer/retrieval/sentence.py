"""A composed retriever as sentence-transformers knows models: its encode calls, sets of owners, and who answered.

The stock classes do all the work. Here are the two things they have no place for: a set of owners for each text, which
has to travel with it, and the decision, which comes back beside the vector.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from composer.membership import Membership
from composer.optout import OptOut, owners_per_row
from composer.retrieval.model import RECORDER, RetrieverEncoder
from composer.retrieval.router import Decision
from experts.errors import OptOutError

__all__ = ["Retriever", "RoutedTransformer"]


_TOKENIZING = threading.RLock()
"""A fast tokenizer is set up for padding and cutting off before every call, and refuses that while another one runs."""


class _Text(str):
    """A text with the owners who must not answer it; processes may hand it on."""

    opt_out: frozenset[str]

    def __new__(cls, text: str, opt_out: frozenset[str]) -> _Text:
        made = super().__new__(cls, text)
        made.opt_out = opt_out
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Text, (str(self), self.opt_out)


class RoutedTransformer(Transformer):  # type: ignore[misc]
    """The stock first module, which reads the texts' sets of owners and reports the decision."""

    forward_kwargs: ClassVar[set[str]] = {"task", "opt_out"}
    model: RetrieverEncoder

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenize; see `Transformer.preprocess`. Sets that came with the texts become ``allowed``."""
        with _TOKENIZING:
            features: dict[str, Any] = super().preprocess(list(map(_plain, inputs)), prompt=prompt, **kwargs)
        if any(isinstance(text, _Text) for text in inputs):
            from composer.optout import allowed_experts

            members = self.model.membership
            sets: list[frozenset[str]] = [getattr(text, "opt_out", frozenset()) for text in inputs]
            features["allowed"] = allowed_experts(
                sets, batch=len(sets), owners=members.whose, known=members.known_owners
            )
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Encode; see `Transformer.forward`.

        Adds ``expert_index`` int64 ``(rows,)`` (the best, 0 the base), ``route_weights`` float32
        ``(rows, experts + 1)``, ``route_scores`` float32 ``(rows, experts)``, ``route_margin`` and
        ``route_confidence`` float32 ``(rows,)`` to the features of queries.
        """
        seen: list[Decision] = []
        token = RECORDER.set(seen.append)
        try:
            result: dict[str, Any] = super().forward(features, **kwargs)
        finally:
            RECORDER.reset(token)
        result.pop("allowed", None)
        for decision in seen:
            result |= _traced(decision, len(self.model.membership.experts), device=self.model.device)
        return result


def _plain(text: Any) -> Any:
    return str(text) if isinstance(text, _Text) else text


def _traced(decision: Decision, num_experts: int, *, device: torch.device) -> dict[str, torch.Tensor]:
    weights = torch.from_numpy(decision.dense(num_experts))
    arrays = {
        "route_weights": weights,
        "route_scores": torch.from_numpy(decision.scores),
        "route_margin": torch.from_numpy(decision.margin),
        "route_confidence": torch.from_numpy(decision.confidence),
    }
    traced = {name: array.to(device, torch.float32) for name, array in arrays.items()}
    return {**traced, "expert_index": weights.argmax(dim=1).to(device)}


class Retriever(SentenceTransformer):  # type: ignore[misc]
    """A composed retriever: queries are routed among owners' experts, documents are the base's.

    Made by `composer.load`. Everything that a `SentenceTransformer` does it does, and ``opt_out`` may also be a list
    with a set of owners for each text.
    """

    membership: Membership
    untuned: ClassVar[None] = None
    """Nothing of a retriever is trained after composing."""

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the loaded experts; ``expert_index`` 1 is the first one."""
        return self.membership.experts

    @property
    def owners(self) -> tuple[str, ...]:
        """Owners with at least one loaded expert, sorted."""
        return tuple(sorted(set(self.membership.owners)))

    def encode(self, inputs: Any, *args: Any, opt_out: OptOut | None = None, **kwargs: Any) -> Any:
        """Encode texts; see `SentenceTransformer.encode`.

        Args:
            inputs: A text or a sequence of them.
            args: As for the stock method.
            opt_out: Owners who must not answer: one collection for all texts, or one for each. It can only widen
                what was left out at build and load.
            kwargs: As for the stock method. With ``output_value=None`` every text's dict also says who answered:
                ``expert`` and ``owner`` (None: the base), ``expert_index``, ``route_weights``, ``route_scores``,
                ``route_margin``, ``route_confidence``.

        Raises:
            OptOutError: Another number of collections than texts, a bare string, or an iterator; or there is one for
                each text and an input is no string.
            UnknownNameError: An owner who is not in this composition.
        """
        if opt_out is not None:
            inputs, opt_out = self._with_sets(inputs, opt_out)
        more = {} if opt_out is None else {"opt_out": opt_out}
        found = super().encode(inputs, *args, **kwargs, **more)
        if kwargs.get("output_value", "sentence_embedding") is None:
            for item in [found] if isinstance(found, dict) else found:
                self._name(item)
        return found

    def _with_sets(self, inputs: Any, opt_out: OptOut) -> tuple[Any, Collection[str] | None]:
        """Attach sets to texts where they differ; check the names here, before any text is tokenized."""
        single = self.is_singular_input(inputs)
        texts = [inputs] if single else list(inputs)
        sets = owners_per_row(opt_out, batch=len(texts), known=self.membership.known_owners)
        if all(isinstance(entry, str) for entry in opt_out):
            return inputs, sorted(sets[0] if sets else ())
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise OptOutError(
                    f"opt_out has one set of owners per row, which travels with its text, and input {number} is a "
                    f"'{type(text).__name__}'. Give strings, or call encode_query once for each set."
                )
        marked = [_Text(text, owners) for text, owners in zip(texts, sets, strict=True)]
        return (marked[0] if single else marked), None

    def _name(self, item: dict[str, Any]) -> None:
        if "expert_index" in item:
            index = int(item["expert_index"])
            item["expert"] = self.membership.experts[index - 1] if index else None
            item["owner"] = self.membership.owners[index - 1] if index else None

    def save_pretrained(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the composed folder of this model, without the owners that were left out at load.

        Raises:
            BuildError: The model's weights were changed since it was loaded, or the target exists.
        """
        from composer.saving import save

        save(self, path)

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the composed folder; see `save_pretrained`."""
        self.save_pretrained(path)
