"""LangChain, LlamaIndex and Haystack get the very vectors of encode_query and encode_document.

Each test runs where the framework is installed (extras ``langchain``, ``llama-index``, ``haystack``).
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from typing import Any

import numpy as np
import pytest

OPT_OUT = {"acme"}


def _framework(module: str, wrapper: str) -> Any:
    """Import a wrapper; the frameworks' own deprecations are no business of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(module)
        __import__(wrapper)
    return sys.modules[wrapper]


def _same(found: Any, expected: Any) -> bool:
    return np.array_equal(np.array(found, dtype=np.float32), expected)


def _expected(retriever: Any, texts: list[str]) -> tuple[Any, Any, Any]:
    queries = np.stack([retriever.encode_query(text) for text in texts])
    without = np.stack([retriever.encode_query(text, opt_out=sorted(OPT_OUT)) for text in texts])
    documents = retriever.encode_document(texts)
    assert not np.array_equal(queries, without)
    assert not np.array_equal(queries, documents)
    return queries, without, documents


def test_langchain(retriever: Any, texts: list[str]) -> None:
    wrapper = _framework("langchain_core.embeddings", "composer.integrations.langchain")
    queries, without, documents = _expected(retriever, texts)
    embeddings = wrapper.CoterieEmbeddings(retriever)
    assert _same([embeddings.embed_query(text) for text in texts], queries)
    assert _same(embeddings.embed_documents(texts), documents)
    assert embeddings.embed_documents([]) == []
    left_out = wrapper.CoterieEmbeddings(retriever, opt_out=OPT_OUT)
    assert _same([left_out.embed_query(text) for text in texts], without)
    assert _same(asyncio.run(left_out.aembed_query(texts[0])), without[0])
    assert _same(left_out.embed_documents(texts), documents)


def test_langchains_own_vector_store(retriever: Any, texts: list[str]) -> None:
    wrapper = _framework("langchain_core.vectorstores", "composer.integrations.langchain")
    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore.from_texts(texts, wrapper.CoterieEmbeddings(retriever))
    scores = retriever.encode_query(texts[5]) @ retriever.encode_document(texts).T
    found = store.similarity_search(texts[5], k=3)
    assert [document.page_content for document in found] == [texts[i] for i in np.argsort(-scores)[:3]]


def test_llama_index(retriever: Any, texts: list[str]) -> None:
    wrapper = _framework("llama_index.core", "composer.integrations.llama_index")
    queries, without, documents = _expected(retriever, texts)
    embedding = wrapper.CoterieEmbedding(retriever)
    assert _same([embedding.get_query_embedding(text) for text in texts], queries)
    assert _same(embedding.get_text_embedding_batch(texts), retriever.encode_document(texts[:10]).tolist()
                 + retriever.encode_document(texts[10:]).tolist())  # fmt: skip
    left_out = wrapper.CoterieEmbedding(retriever, opt_out=OPT_OUT, embed_batch_size=len(texts))
    assert _same([left_out.get_query_embedding(text) for text in texts], without)
    assert _same(asyncio.run(left_out.aget_query_embedding(texts[0])), without[0])
    assert _same(left_out.get_text_embedding_batch(texts), documents)
    assert embedding.class_name() == "CoterieEmbedding"


def test_llama_indexs_cache_is_refused(retriever: Any) -> None:
    wrapper = _framework("llama_index.core", "composer.integrations.llama_index")
    from experts.errors import OptOutError

    with pytest.raises(OptOutError) as caught:
        wrapper.CoterieEmbedding(retriever, embeddings_cache=object())
    assert str(caught.value) == (
        "embeddings_cache is keyed by text alone, whoever was left out. Leave it away; coterie's own index keeps "
        "documents' vectors."
    )


def test_haystack(retriever: Any, texts: list[str]) -> None:
    wrapper = _framework("haystack", "composer.integrations.haystack")
    from haystack import Document, Pipeline

    queries, without, documents = _expected(retriever, texts)
    embedder = wrapper.CoterieTextEmbedder(retriever)
    assert _same([embedder.run(text)["embedding"] for text in texts], queries)
    left_out = wrapper.CoterieTextEmbedder(retriever, opt_out=OPT_OUT)
    assert _same([left_out.run(text)["embedding"] for text in texts], without)
    pipeline = Pipeline()
    pipeline.add_component("embedder", wrapper.CoterieDocumentEmbedder(retriever))
    found = pipeline.run({"embedder": {"documents": [Document(content=text) for text in texts]}})
    embedded = found["embedder"]["documents"]
    assert _same([document.embedding for document in embedded], documents)
    assert [document.content for document in embedded] == texts
    assert wrapper.CoterieDocumentEmbedder(retriever).run([]) == {"documents": []}


@pytest.mark.parametrize(
    ("module", "wrapper", "name"),
    [
        ("langchain_core.embeddings", "langchain", "CoterieEmbeddings"),
        ("llama_index.core", "llama_index", "CoterieEmbedding"),
        ("haystack", "haystack", "CoterieTextEmbedder"),
    ],
)
def test_owners_are_named_in_a_collection(retriever: Any, module: str, wrapper: str, name: str) -> None:
    from experts.errors import OptOutError

    made = getattr(_framework(module, f"composer.integrations.{wrapper}"), name)
    with pytest.raises(OptOutError, match=r"^opt_out is or holds a 'list_iterator', which is no collection"):
        made(retriever, opt_out=iter(["acme"]))
    with pytest.raises(OptOutError, match=r"^opt_out is the string 'acme'"):
        made(retriever, opt_out="acme")


_INDEX = "llama_index.core.base.embeddings.base"


@pytest.mark.parametrize(
    ("wrapper", "missing", "name", "extra"),
    [
        ("composer.integrations.langchain", "langchain_core.embeddings", "LangChain", "langchain"),
        ("composer.integrations.llama_index", _INDEX, "LlamaIndex", "llama-index"),
        ("composer.integrations.haystack", "haystack", "Haystack", "haystack"),
        ("pipelines.integrations.mteb", "mteb", "MTEB", "mteb"),
    ],
)
def test_a_missing_framework_is_named(
    wrapper: str, missing: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, wrapper, raising=False)
    with pytest.raises(ImportError) as caught:
        __import__(wrapper)
    assert str(caught.value) == f"{name} is not installed. Install the extra: pip install 'coterie[{extra}]'."
