"""MTEB on a local collection with every socket shut: its scores are ours, and models keep apart.

Runs where MTEB is installed (extra ``mteb``).
"""

from __future__ import annotations

import random
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from experts.errors import OptOutError
from pipelines.retrieval.collection import Collection, Document
from pipelines.retrieval.encoders import open_encoder
from pipelines.retrieval.metrics import measure


@pytest.fixture(scope="module")
def wrapper() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mteb")
        import pipelines.integrations.mteb as module
    return module


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any connection."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def collection(pico: Any) -> Collection:
    draw = random.Random(0)
    texts = [text for seed in (1, 2, 3) for text in pico.domain_texts(seed, count=15)]
    queries = {f"q{n}": " ".join(draw.sample(texts[n].split(), 4)) for n in range(0, 45, 4)}
    grades = {query: {f"d{query[1:]}": 2, f"d{draw.randrange(45)}": 1} for query in queries}
    documents = tuple(Document(id=f"d{n}", text=text) for n, text in enumerate(texts))
    return Collection(name="Syllables", documents=documents, queries=queries, judgements=grades)


def _ours(folder: Path, collection: Collection, opt_out: set[str]) -> dict[str, float]:
    encoder = open_encoder(folder)
    queries = encoder.queries(list(collection.queries.values()), opt_out=opt_out)
    scores = queries @ encoder.documents([document.text for document in collection.documents]).T
    run = {
        query: {document.id: float(s) for document, s in zip(collection.documents, row, strict=True)}
        for query, row in zip(collection.queries, scores, strict=True)
    }
    values = measure(run, collection.judgements)
    return {metric: sum(found.values()) / len(found) for metric, found in values.items()}


@pytest.mark.usefixtures("shut")
@pytest.mark.filterwarnings("ignore")
def test_scores_are_ours_without_a_network(
    wrapper: Any, retriever_folder: Path, collection: Collection
) -> None:
    task = wrapper.local_task(collection)
    found = {}
    for opt_out in (set(), {"acme"}):
        model = wrapper.CoterieEncoder(open_encoder(retriever_folder), name="trio", opt_out=opt_out)
        (scores,) = wrapper.evaluate(model, [task]).values()
        expected = _ours(retriever_folder, collection, opt_out)
        # MTEB rounds to five digits
        assert scores["ndcg_at_10"] == pytest.approx(expected["ndcg@10"], abs=1e-5)
        assert scores["recall_at_10"] == pytest.approx(expected["recall@10"], abs=1e-5)
        assert scores["mrr_at_10"] == pytest.approx(expected["mrr@10"], abs=1e-5)
        found[bool(opt_out)] = scores["ndcg_at_10"]
    assert found[True] != found[False]
    with pytest.raises(OptOutError) as caught:
        wrapper.evaluate(model, [task], encode_kwargs={"opt_out": ["bob"]})
    assert str(caught.value) == (
        "encode_kwargs leave owners out, which MTEB keeps under the same revision as if nobody were. Give opt_out to "
        "CoterieEncoder instead."
    )


def test_models_have_an_identity_for_each_set_of_owners(
    wrapper: Any, retriever_folder: Path, pico: Any
) -> None:
    def revision(**options: Any) -> tuple[str, str]:
        meta = wrapper.CoterieEncoder(open_encoder(retriever_folder), name="trio", **options).mteb_model_meta
        return meta.name, meta.revision

    revisions = {revision(), revision(opt_out={"acme"}), revision(opt_out={"acme", "bob"})}
    stock = wrapper.CoterieEncoder.open(pico.embedder()).mteb_model_meta
    assert len({*revisions, (stock.name, stock.revision)}) == 4
    assert revision() in revisions
    assert (
        wrapper.CoterieEncoder.open(retriever_folder).mteb_model_meta.name
        == f"coterie/{retriever_folder.name}"
    )
    loaded = wrapper.CoterieEncoder.open(retriever_folder, opt_out={"acme"}).mteb_model_meta
    assert loaded.revision not in {revision()[1]}
    with pytest.raises(OptOutError, match=r"^opt_out is or holds a 'map', which is no collection"):
        revision(opt_out=map(str.strip, ["acme"]))
    with pytest.raises(OptOutError, match=r"^opt_out is the string 'acme'"):
        revision(opt_out="acme")


def test_tasks_have_an_identity_for_each_content(wrapper: Any, collection: Collection) -> None:
    from dataclasses import replace

    changed = replace(collection, documents=collection.documents[:-1])
    revisions = {wrapper.local_task(one).metadata.dataset["revision"] for one in (collection, changed)}
    assert len(revisions) == 2
    assert "datasets" in sys.modules
