"""Stock embedding models as encoders: what identifies them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.errors import CoterieError
from pipelines.retrieval.encoders import Encoder, open_encoder


@pytest.fixture(scope="module")
def stock(pico: Any) -> Encoder:
    return open_encoder(pico.embedder())


def test_vectors_are_the_models_own(stock: Encoder, pico: Any) -> None:
    from sentence_transformers import SentenceTransformer

    texts = pico.domain_texts(1, count=5)
    model = SentenceTransformer(str(pico.embedder()), device="cpu")
    assert np.array_equal(stock.documents(texts), model.encode_document(texts))
    assert np.array_equal(stock.queries(texts), model.encode_query(texts))
    assert stock.owners == ()
    vectors, routes = stock.routed(texts)
    assert np.array_equal(vectors, stock.queries(texts))
    assert [route.owner for route in routes] == [None] * 5
    assert stock.documents([]).shape == (0, stock.dimension)


def test_the_digest_names_everything_that_decides_vectors(stock: Encoder, pico: Any) -> None:
    settings: list[dict[str, Any]] = [
        {"seed": 1},
        {"pooling": "cls"},
        {"max_seq_length": 32},
        {"similarity": "dot"},
        {"prompts": {"query": "find: "}},
    ]
    digests = {open_encoder(pico.embedder(**setting)).base for setting in settings}
    assert len(digests | {stock.base}) == len(settings) + 1
    assert open_encoder(pico.embedder()).base == stock.base


def test_vectors_compared_by_angle_have_length_one(pico: Any) -> None:
    raw = open_encoder(pico.embedder(normalize=False, similarity="cosine"))
    dot = open_encoder(pico.embedder(normalize=False, similarity="dot"))
    texts = pico.domain_texts(1, count=3)
    assert np.linalg.norm(raw.documents(texts), axis=1) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(raw.queries(texts), axis=1) == pytest.approx(1.0, abs=1e-5)
    assert not np.allclose(np.linalg.norm(dot.documents(texts), axis=1), 1.0)


def test_what_is_no_embedding_model_is_refused(stock: Encoder, pico: Any, tmp_path: Path) -> None:
    with pytest.raises(CoterieError) as caught:
        open_encoder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no embedding model: it holds neither composition.json (of 'coterie build') nor modules.json "
        "(of sentence-transformers)."
    )
    with pytest.raises(CoterieError, match=r"^Unknown owner 'acme'\. There is no owner yet\.$"):
        open_encoder(pico.embedder(), opt_out={"acme"})
    with pytest.raises(CoterieError) as caught:
        stock.queries(["wing", " "])
    assert str(caught.value) == "A query is empty. Write what to look for."
    with pytest.raises(CoterieError) as broken:
        stock.queries(["\ud800"])
    assert str(broken.value) == (
        "The query is not Unicode text: it has half of a surrogate pair. Write it as UTF-8."
    )
    assert caught.value.exit_code == 2


def test_tokens_beyond_the_longest_input_are_counted(stock: Encoder) -> None:
    assert stock.longest == 64
    assert stock.tokens("ba " * 10_000) > 10_000
    assert np.array_equal(stock.queries(["ba " * 10_000]), stock.queries(["ba " * 20_000]))
