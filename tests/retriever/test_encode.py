"""Encoding: documents are the base's, queries the chosen experts', passes as few as promised, the stock API whole."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch

from composer.retrieval.request import EncodingPass, Slots, encoding_pass
from pipelines.experiments.retrieval.costs import routed_passes

WAYS: dict[str, dict[str, Any]] = {
    "two passes": {"selector": "top1"},
    "two passes, two experts": {"selector": "top2"},
    "all experts, lower layers shared": {"selector": "soft"},
    "all experts, 1 + E passes": {"selector": "soft", "share_lower_layers": False},
    "one pass": {"selector": "top1", "route_on": "layer_state"},
    "one pass, two experts from the middle": {"selector": "top2", "route_on": "layer_state"},
    "one pass, all experts from the middle": {"selector": "soft", "route_on": "layer_state"},
    "before any layer": {"selector": "top1", "route_on": "static_tokens"},
    "before any layer, all experts": {"selector": "soft", "route_on": "static_tokens"},
}


@pytest.fixture(params=WAYS, scope="module")
def way(request: Any) -> dict[str, Any]:
    return WAYS[request.param]


def traced(model: Any, texts: list[str], **kwargs: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model.encode_query(texts, output_value=None, **kwargs)
    return found


def alone(model: Any, texts: list[str], slot: int) -> np.ndarray:
    """Embeddings by one expert, before any normalisation is undone: the plain adapted encoder, then the stock tail."""
    features = model[0].preprocess(texts)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    running = EncodingPass(slots=Slots.of([slot] * len(texts), torch.device("cpu")))
    with torch.no_grad(), encoding_pass(running):
        states = model[0].model.run_base(inputs).last_hidden_state
    out = {"token_embeddings": states, "attention_mask": inputs["attention_mask"]}
    for module in list(model)[1:]:
        out = module(out)
    return out["sentence_embedding"].numpy()


def test_r1_documents_are_the_stock_models_bit_for_bit(
    retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    model, stock = retrievers.model(**way), retrievers.stock()
    expected = stock.encode_document(texts)
    assert np.array_equal(model.encode_document(texts), expected)
    assert np.array_equal(model.encode_document(texts, opt_out={"acme"}), expected)
    assert not np.allclose(model.encode_query(texts), expected, atol=1e-3)


def test_queries_are_the_weighted_sum_of_the_experts_embeddings(
    retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    model = retrievers.model(**way)
    weights = np.stack([item["route_weights"].numpy() for item in traced(model, texts)])
    each = np.stack([alone(model, texts, slot) for slot in range(4)], axis=1)
    fused = np.einsum("qe,qed->qd", weights, each)
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    assert np.abs(model.encode_query(texts) - fused).max() < 1e-5
    assert (weights[:, 0] == 0).all()
    assert ((weights > 0).sum(axis=1) == {"top1": 1, "top2": 2, "soft": 3}[way["selector"]]).all()


def test_r10_searching_with_the_fused_vector_is_fusing_the_scores(retrievers: Any, texts: list[str]) -> None:
    model = retrievers.model(selector="soft")
    documents = model.encode_document(retrievers.queries(40))
    weights = np.stack([item["route_weights"].numpy() for item in traced(model, texts)])
    scores = sum(weights[:, slot, None] * (alone(model, texts, slot) @ documents.T) for slot in range(4))
    assert np.array_equal(
        np.argsort(-scores, axis=1, kind="stable")[:, :10],
        np.argsort(-(model.encode_query(texts) @ documents.T), axis=1, kind="stable")[:, :10],
    )


def test_queries_of_a_domain_find_its_expert(retrievers: Any, pico: Any) -> None:
    """The statistics are of disjoint vocabularies, though of a random encoder: most queries find their own."""
    model = retrievers.model(selector="top1")
    for seed, owner in enumerate(retrievers.owners, start=1):
        found = [item["owner"] for item in traced(model, pico.domain_texts(seed, count=120)[100:])]
        assert found.count(owner) >= 12, (owner, found)


# -------------------------------------------------------------------- passes


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Count the rows that go through every layer of the base."""
    layers = model[0].model.base.encoder.layer
    rows = [0] * len(layers)

    def count(number: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], __: Any) -> None:
            rows[number] += len(args[0])

        return hook

    handles = [layer.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two passes", [2, 2, 2, 2]),
        ("two passes, two experts", [3, 3, 3, 3]),
        ("all experts, lower layers shared", [1, 1, 4, 4]),
        ("all experts, 1 + E passes", [4, 4, 4, 4]),
        ("one pass", [1, 1, 1, 1]),
        ("one pass, two experts from the middle", [1, 1, 2, 2]),
        ("one pass, all experts from the middle", [1, 1, 3, 3]),
        ("before any layer", [1, 1, 1, 1]),
        ("before any layer, all experts", [1, 1, 3, 3]),
    ],
)
def test_r15_rows_that_each_layer_sees(
    retrievers: Any, texts: list[str], name: str, expected: list[int]
) -> None:
    model = retrievers.model(**WAYS[name])
    with counting(model) as rows:
        model.encode_query(texts)
    assert [count / len(texts) for count in rows] == expected
    # what the comparison of retrievers says that it costs
    assert routed_passes(WAYS[name], experts=3, first=2, layers=4) == sum(expected) / 4
    with counting(model) as rows:
        model.encode_query(texts, opt_out=set(retrievers.owners))
    assert [count / len(texts) for count in rows] == [1, 1, 1, 1]


def test_r15_the_state_routed_on_is_the_bases(retrievers: Any, pico: Any, texts: list[str]) -> None:
    from composer.retrieval.pooling import mean_state

    model = retrievers.model(**WAYS["one pass"])
    features = model[0].preprocess(texts)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    seen = []

    def look(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].clone())

    handle = model[0].model.base.encoder.layer[2].register_forward_pre_hook(look)
    model[0]({**features, "task": "query"}, task="query")
    handle.remove()
    with torch.no_grad():
        states = pico.encoder()(**inputs, output_hidden_states=True).hidden_states[2]
    assert torch.equal(seen[0], states)
    # the same feature in a pass of its own gives the same routes
    router = model[0].model.engine.router
    pooled = mean_state(states, inputs["attention_mask"]).numpy()
    expected = router.decide(pooled, np.ones((1, 3), dtype=bool)).slots[:, 0]
    assert [int(item["expert_index"]) for item in traced(model, texts)] == expected.tolist()


def test_token_embeddings_are_routed_on_before_any_layer_runs(
    retrievers: Any, pico: Any, texts: list[str]
) -> None:
    """The feature made text by text, from the matrix alone, gives the same routes; so does any padding."""
    model = retrievers.model(**WAYS["before any layer"])
    router = model[0].model.engine.router
    expected = router.decide(pico._token_means(texts).astype("f8"), np.ones((1, 3), dtype=bool)).slots[:, 0]
    assert [int(item["expert_index"]) for item in traced(model, texts)] == expected.tolist()
    assert len(set(expected.tolist())) == 3
    longer = traced(model, [*texts, " ".join(texts)])
    assert [int(item["expert_index"]) for item in longer[:-1]] == expected.tolist()
    seen: list[int] = []
    decide = router.decide
    router.decide = lambda *args, **kwargs: (seen.append(sum(rows)), decide(*args, **kwargs))[1]
    try:
        with counting(model) as rows:
            model.encode_query(texts)
    finally:
        del router.decide
    assert seen == [0]


def test_sharing_the_lower_layers_changes_nothing_but_rounding(retrievers: Any, texts: list[str]) -> None:
    shared = retrievers.model(selector="soft").encode_query(texts)
    apart = retrievers.model(selector="soft", share_lower_layers=False).encode_query(texts)
    assert np.abs(shared - apart).max() < 1e-6


# -------------------------------------------------------------------- the stock API


def test_who_answered_comes_beside_the_vector(retrievers: Any, way: dict[str, Any], texts: list[str]) -> None:
    model = retrievers.model(**way)
    items = traced(model, texts)
    vectors = model.encode_query(texts)
    for item, vector in zip(items, vectors, strict=True):
        index = int(item["expert_index"])
        assert np.array_equal(item["sentence_embedding"].numpy(), vector)
        assert item["expert"] == retrievers.experts[index - 1]
        assert item["owner"] == item["expert"].partition("/")[0]
        assert int(item["route_weights"].argmax()) == index
        assert int(item["route_scores"].argmax()) + 1 == index
        assert float(item["route_weights"].sum()) == pytest.approx(1.0)
        best, second = item["route_scores"].sort(descending=True).values[:2]
        assert float(item["route_margin"]) == pytest.approx(float(best - second), abs=1e-4)
        assert 0.5 <= float(item["route_confidence"]) <= 1
    one = model.encode_query(texts[0], output_value=None, opt_out=set(retrievers.owners))
    assert (one["expert"], one["owner"], int(one["expert_index"])) == (None, None, 0)
    assert "expert" not in model.encode_document(texts[0], output_value=None)


def test_encode_without_a_task_is_said_to_be_the_base(
    retrievers: Any, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from composer.loading import load

    model = load(retrievers.folder())
    with caplog.at_level(logging.WARNING, logger="coterie.retrieval"):
        first, again = model.encode(texts), model.encode(texts)
    assert np.array_equal(first, model.encode_document(texts))
    assert np.array_equal(again, first)
    assert [record.getMessage() for record in caplog.records] == [
        "encode() was called without a task, so the texts were encoded as documents, by the base alone. Call "
        "encode_query for queries, or compose with `router: {default_task: query}`."
    ]
    routed = retrievers.model(default_task="query")
    assert np.array_equal(routed.encode(texts), routed.encode_query(texts))
    caplog.clear()
    quiet = retrievers.model(default_task="document")
    assert np.array_equal(quiet.encode(texts), quiet.encode_document(texts))
    assert caplog.records == []
    with pytest.raises(ValueError, match=r"^task is 'both'\. Allowed: 'query' \(encode_query\), 'document'"):
        routed.encode(texts, task="both")


def test_a_model_of_another_process_encodes_alike(retrievers: Any, texts: list[str]) -> None:
    """What a pool's worker gets: the model by the pickler of multiprocessing, and texts with their sets."""
    model = copy.copy(retrievers.model())
    sent = ForkingPickler.loads(bytes(ForkingPickler.dumps(model)))
    assert np.array_equal(sent.encode_query(texts), model.encode_query(texts))
    assert sent.owners == model.owners
    marked, _ = model._with_sets(texts, [{"acme"}] * len(texts))
    again = ForkingPickler.loads(bytes(ForkingPickler.dumps(marked)))
    assert [text.opt_out for text in again] == [frozenset({"acme"})] * len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True], ids=["composer.load", "SentenceTransformer"])
def test_a_pool_of_processes_encodes_alike(retrievers: Any, texts: list[str], stock: bool) -> None:
    """Also with the class of sentence-transformers, which takes one set of owners for all texts."""
    from sentence_transformers import SentenceTransformer

    import composer.hf  # noqa: F401
    from composer.loading import load

    folder = str(retrievers.folder())
    model = SentenceTransformer(folder, device="cpu", local_files_only=True) if stock else load(folder)
    gone: Any = {"acme"} if stock else [{"acme"}, set()] * 6
    calls: list[dict[str, Any]] = [{}, {"opt_out": gone}]
    expected = [model.encode_query(texts, **call) for call in calls]
    documents = model.encode_document(texts)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        for call, vectors in zip(calls, expected, strict=True):
            found = model.encode_query(texts, pool=pool, chunk_size=4, **call)
            assert np.abs(found - vectors).max() < 1e-5
        assert np.abs(model.encode_document(texts, pool=pool, chunk_size=4) - documents).max() < 1e-5
    finally:
        model.stop_multi_process_pool(pool)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    assert np.abs(expected[0] - documents).max() > 1e-3


def test_the_stock_settings_are_the_bases(retrievers: Any) -> None:
    model, stock = retrievers.model(), retrievers.stock()
    assert model.max_seq_length == stock.max_seq_length
    assert model.get_embedding_dimension() == stock.get_embedding_dimension()
    assert model.similarity_fn_name == stock.similarity_fn_name
    assert model.prompts == stock.prompts
    assert sorted(model.get_model_kwargs()) == ["opt_out", "task"]
