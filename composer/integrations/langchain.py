"""A composed retriever as an ``Embeddings`` of LangChain. Needs the extra ``langchain``; knows no vector store."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise ImportError(
        "LangChain is not installed. Install the extra: pip install 'coterie[langchain]'."
    ) from error

from composer.optout import owner_names

__all__ = ["CoterieEmbeddings"]


class CoterieEmbeddings(Embeddings):  # type: ignore[misc]
    """Queries are routed, documents are the base's.

    Args:
        model: What `composer.load` returned.
        opt_out: Owners who must not answer queries.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
    """

    def __init__(self, model: Any, *, opt_out: Collection[str] = ()) -> None:
        self.model = model
        self.opt_out = tuple(sorted(owner_names(opt_out)))

    def embed_query(self, text: str) -> list[float]:
        """Embed a query."""
        options = {"opt_out": self.opt_out} if self.opt_out else {}
        vector: list[float] = self.model.encode_query(text, show_progress_bar=False, **options).tolist()
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents."""
        if not texts:
            return []
        vectors: list[list[float]] = self.model.encode_document(list(texts), show_progress_bar=False).tolist()
        return vectors
