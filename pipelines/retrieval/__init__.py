"""Retrieval with composed encoders: test collections, measures, an index of documents, and who may be found in it.

Knows files, matrices and ids; models come in through their ``encode_query`` and ``encode_document``. Light to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.retrieval.collection import Collection, Document, read_collection, read_corpus

if TYPE_CHECKING:
    from pipelines.retrieval.index import DocumentIndex

__all__ = ["Collection", "Document", "DocumentIndex", "read_collection", "read_corpus"]


def __getattr__(name: str) -> Any:
    if name == "DocumentIndex":
        from pipelines.retrieval.index import DocumentIndex

        return DocumentIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
