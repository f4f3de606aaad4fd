"""A composed retriever as two embedders of Haystack. Needs the extra ``haystack``; knows no document store."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

try:
    from haystack import Document, component
except ImportError as error:
    raise ImportError(
        "Haystack is not installed. Install the extra: pip install 'coterie[haystack]'."
    ) from error

from composer.optout import owner_names

__all__ = ["CoterieDocumentEmbedder", "CoterieTextEmbedder"]


@component
class CoterieTextEmbedder:
    """Embeds a query, routed.

    Args:
        model: What `composer.load` returned.
        opt_out: Owners who must not answer queries.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
    """

    def __init__(self, model: Any, *, opt_out: Collection[str] = ()) -> None:
        self.model = model
        self.opt_out = tuple(sorted(owner_names(opt_out)))

    @component.output_types(embedding=list[float])  # type: ignore[untyped-decorator]
    def run(self, text: str) -> dict[str, Any]:
        """Return ``embedding``, a list of floats."""
        options = {"opt_out": self.opt_out} if self.opt_out else {}
        return {"embedding": self.model.encode_query(text, show_progress_bar=False, **options).tolist()}


@component
class CoterieDocumentEmbedder:
    """Embeds documents, by the base.

    Args:
        model: What `composer.load` returned.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @component.output_types(documents=list[Document])  # type: ignore[untyped-decorator]
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Return ``documents``: the same with their embeddings."""
        if not documents:
            return {"documents": []}
        texts = [document.content or "" for document in documents]
        vectors = self.model.encode_document(texts, show_progress_bar=False).tolist()
        embedded = [replace(d, embedding=vector) for d, vector in zip(documents, vectors, strict=True)]
        return {"documents": embedded}
