"""A composed retriever as an embedding of LlamaIndex. Needs the extra ``llama-index``; knows no index."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
except ImportError as error:
    raise ImportError(
        "LlamaIndex is not installed. Install the extra: pip install 'coterie[llama-index]'."
    ) from error

from composer.optout import owner_names
from experts.errors import OptOutError

__all__ = ["CoterieEmbedding"]


class CoterieEmbedding(BaseEmbedding):  # type: ignore[misc]
    """Queries are routed, documents are the base's.

    Args:
        model: What `composer.load` returned.
        opt_out: Owners who must not answer queries.
        settings: Fields of LlamaIndex's class; ``embeddings_cache`` is refused, since it is keyed by text alone and
            would hand out what a left-out owner computed.

    Raises:
        OptOutError: ``embeddings_cache`` is given, or ``opt_out`` is no collection of names.
    """

    _model: Any = PrivateAttr()
    _opt_out: tuple[str, ...] = PrivateAttr()

    def __init__(self, model: Any, *, opt_out: Collection[str] = (), **settings: Any) -> None:
        if settings.get("embeddings_cache") is not None:
            raise OptOutError(
                "embeddings_cache is keyed by text alone, whoever was left out. Leave it away; coterie's own index "
                "keeps documents' vectors."
            )
        super().__init__(**settings)
        self._model = model
        self._opt_out = tuple(sorted(owner_names(opt_out)))

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in LlamaIndex's own files."""
        return "CoterieEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        options = {"opt_out": self._opt_out} if self._opt_out else {}
        vector: list[float] = self._model.encode_query(query, show_progress_bar=False, **options).tolist()
        return vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.encode_document(
            list(texts), show_progress_bar=False
        ).tolist()
        return vectors
