"""Leaving an owner out: at build, at load and in a request it is the model they never joined, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import composer.hf  # noqa: F401 - registers the Auto classes
from composer.loading import load
from composer.lock import Lock
from composer.retrieval.cache import QueryCache
from composer.verify import verify_optout
from experts.errors import OptOutError, UnknownNameError
from pipelines.retrieval.encoders import open_encoder
from pipelines.retrieval.evaluation import evaluate
from pipelines.retrieval.index import owner_mask

WAYS: dict[str, dict[str, Any]] = {
    "two passes": {"selector": "top1"},
    "two experts": {"selector": "top2"},
    "all experts": {},
    "one pass": {"selector": "top1", "route_on": "layer_state"},
    "one pass, all": {"route_on": "layer_state"},
    "centroids": {"scorer": "centroid", "temperature": 0.1},
    "abstaining": {"selector": "top1", "min_margin": 1.0},
    "pilots": {"scorer": "pilot_mean", "selector": "top2", "similarity": "dot", "temperature": 0.1},
    "nearest pilots, ties their own": {"scorer": "pilot_max", "ties": "own_domain", "temperature": 0.1},
    "all pilots": {"scorer": "pilot_logsumexp", "temperature": 0.1},
    "gains over the base": {"scorer": "ridge_utility", "min_margin": -9.0, "temperature": 0.1},
    "before any layer": {"selector": "top1", "route_on": "static_tokens"},
    "before any layer, all": {"route_on": "static_tokens"},
}
SETS: list[set[str]] = [{"acme"}, set(), {"bob", "zoe"}, {"acme", "bob", "zoe"}]


@pytest.fixture(params=WAYS, scope="module")
def way(request: Any) -> dict[str, Any]:
    return WAYS[request.param]


def never(retrievers: Any, gone: str, way: dict[str, Any]) -> Any:
    return retrievers.model([e for e in retrievers.experts if not e.startswith(f"{gone}/")], **way)


@pytest.mark.parametrize("gone", ["acme", "bob", "zoe"])
def test_r2_a_request_is_the_never_joined_model_bit_for_bit(
    retrievers: Any, way: dict[str, Any], texts: list[str], gone: str
) -> None:
    expected = never(retrievers, gone, way)
    assert np.array_equal(
        retrievers.model(**way).encode_query(texts, opt_out={gone}), expected.encode_query(texts)
    )
    loaded = load(retrievers.folder(**way), opt_out={gone})
    assert np.array_equal(loaded.encode_query(texts), expected.encode_query(texts))
    assert loaded.expert_names == expected.expert_names
    assert not np.array_equal(expected.encode_query(texts), retrievers.model(**way).encode_query(texts))


def test_r2_everybody_out_is_the_base_bit_for_bit(
    retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    expected = retrievers.stock().encode_query(texts)
    model = retrievers.model(**way)
    assert np.array_equal(model.encode_query(texts, opt_out=retrievers.owners), expected)
    empty = load(retrievers.folder(**way), opt_out=retrievers.owners)
    assert np.array_equal(empty.encode_query(texts), expected)
    assert np.array_equal(empty.encode_query(texts, opt_out={"acme"}), expected)


def test_r7_rows_with_sets_of_their_own(retrievers: Any, way: dict[str, Any], texts: list[str]) -> None:
    model = retrievers.model(**way)
    sets = [SETS[i % 4] for i in range(len(texts))]
    together = model.encode_query(texts, opt_out=sets, output_value=None)
    vectors = model.encode_query(texts, opt_out=sets)
    for text, owners, item, vector in zip(texts, sets, together, vectors, strict=True):
        alone = model.encode_query(text, opt_out=owners, output_value=None)
        assert item["expert"] == alone["expert"]
        assert item["owner"] not in owners
        assert torch.allclose(item["route_weights"], alone["route_weights"], atol=1e-5)
        assert np.abs(vector - alone["sentence_embedding"].numpy()).max() < 1e-5
        assert all(
            item["route_weights"][i] == 0
            for i, e in enumerate(model.expert_names, start=1)
            if e.partition("/")[0] in owners
        )
    # prompts are put before the texts without losing their sets
    prompted = model.encode_query(texts, opt_out=sets, prompt="duba ")
    expected = [model.encode_query(f"duba {t}", opt_out=s) for t, s in zip(texts, sets, strict=True)]
    assert np.abs(prompted - np.stack(expected)).max() < 1e-5


def test_r5_a_left_out_owners_files_are_not_needed(retrievers: Any, pico: Any, texts: list[str]) -> None:
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    [acme] = [e for e in Lock.read(folder).experts if e.owner == "acme"]
    shutil.rmtree(folder / acme.folder)
    loaded = load(folder, opt_out={"acme"})
    assert np.array_equal(
        loaded.encode_query(texts), retrievers.model().encode_query(texts, opt_out={"acme"})
    )


def test_r5_nothing_of_a_left_out_owner_is_multiplied(
    retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    """NaN goes through any product, by zero too."""
    clean = retrievers.model(**way).encode_query(texts, opt_out={"acme"})
    poisoned = load(retrievers.folder(**way))
    slot = 1 + poisoned.expert_names.index("acme/search")
    for layer in poisoned.modules():
        if type(layer).__name__ == "StackedLoRA":
            layer.down.data[slot] = float("nan")
            layer.up.data[slot] = float("nan")
    router = poisoned[0].model.engine.router
    facts = list(router.facts)
    bad = facts[slot - 1]
    labels = bad.labels and replace(bad.labels, vectors=bad.labels.vectors * np.nan)
    facts[slot - 1] = replace(
        bad,
        sum=bad.sum * np.nan,
        scatter=bad.scatter * np.nan,
        count=np.nan,
        labels=labels,
        gram=None if bad.gram is None else bad.gram * np.nan,
    )
    # what the others say of the owner's expert is not read either
    facts = [
        replace(f, utility={n: v * np.nan if bad.name in (n, f.name) else v for n, v in f.utility.items()})
        for f in facts
    ]
    router.facts = tuple(facts)
    assert np.array_equal(poisoned.encode_query(texts, opt_out={"acme"}), clean)
    mixed = poisoned.encode_query(texts[:2], opt_out=[{"acme"}, {"acme", "bob"}])
    assert not np.isnan(mixed).any()
    with np.errstate(all="ignore"):  # the control: asked for everybody, the solver meets the poison
        assert np.isnan(router.solved((0, 1, 2)).vectors).any()


def test_r6_a_request_only_widens(retrievers: Any, texts: list[str]) -> None:
    """Who was left out at build is unknown afterwards, who was left out at load stays out."""
    built = load(retrievers.folder(opt_out=["acme"]))
    assert built.owners == ("bob", "zoe")
    with pytest.raises(UnknownNameError, match=r"^Unknown owner 'acme'\. Known: bob, zoe\.$"):
        built.encode_query(texts, opt_out={"acme"})
    loaded = load(retrievers.folder(), opt_out={"acme"})
    for asked in (set(), {"acme"}, None):
        assert np.array_equal(loaded.encode_query(texts, opt_out=asked), loaded.encode_query(texts))
    narrowed = loaded.encode_query(texts, opt_out={"bob"}, output_value=None)
    assert {item["owner"] for item in narrowed} == {"zoe"}


def test_r6_mistakes_are_named(retrievers: Any, texts: list[str]) -> None:
    model = retrievers.model()
    with pytest.raises(
        UnknownNameError, match=r"^Unknown owner 'bobb'\. Did you mean 'bob'\? Known: acme, bob, zoe\.$"
    ):
        model.encode_query(texts, opt_out={"bobb"})
    with pytest.raises(
        UnknownNameError, match=r"^Unknown owner 'bobb'\. Did you mean 'bob'\? Known: acme, bob, zoe\.$"
    ):
        model.encode_document(texts, opt_out={"bobb"})
    with pytest.raises(OptOutError) as caught:
        model.encode_query(texts, opt_out="acme")
    assert str(caught.value) == (
        "opt_out is the string 'acme'. Write {'acme'} for every row or a list with one set per row."
    )
    with pytest.raises(OptOutError) as caught:
        model.encode_query(texts, opt_out=[{"acme"}, set()])
    assert str(caught.value) == (
        "opt_out has 2 entries for 12 rows. Give one collection of owner names per row, or one set of names for the "
        "whole batch."
    )
    with pytest.raises(
        ValueError, match=r"additional keyword arguments that this model does not use: \['opt_out'\]"
    ):
        retrievers.stock().encode_query(texts, opt_out={"acme"})


def _asked(retrievers: Any, inputs: Any, opt_out: Any) -> Any:
    return retrievers.model().encode_query(inputs, opt_out=opt_out)


@pytest.mark.parametrize(
    "wrap",
    [lambda text: {"text": text}, lambda text: (text, "duba hugo"), lambda text: [text, "duba hugo"]],
    ids=["dict", "tuple", "list"],
)
def test_r7_a_set_travels_with_a_string_only(retrievers: Any, texts: list[str], wrap: Any) -> None:
    """What sentence-transformers reads besides strings has the whole batch's set, or none: never another text."""
    inputs = [wrap(text) for text in texts]
    sets = [SETS[i % 4] for i in range(len(texts))]
    kind = type(inputs[0]).__name__
    said = (
        f"opt_out has one set of owners per row, which travels with its text, and input 2 is a '{kind}'. Give strings, "
        "or call encode_query once for each set."
    )
    for given, opt_out in (([texts[0], *inputs[1:]], sets), ([texts[0], inputs[1]], [set(), set()])):
        with pytest.raises(OptOutError) as caught:
            _asked(retrievers, given, opt_out)
        assert str(caught.value) == said
    never = retrievers.model([e for e in retrievers.experts if not e.startswith("acme/")])
    assert np.array_equal(_asked(retrievers, inputs, {"acme"}), never.encode_query(inputs))


def test_r7_a_single_input_is_one_row(retrievers: Any, texts: list[str]) -> None:
    never = retrievers.model([e for e in retrievers.experts if not e.startswith("acme/")])
    text = texts[0]
    assert np.array_equal(_asked(retrievers, text, [{"acme"}]), never.encode_query(text))
    assert np.array_equal(_asked(retrievers, {"text": text}, {"acme"}), never.encode_query(text))
    array = np.array(texts)
    assert np.array_equal(_asked(retrievers, array, [{"acme"}] * len(texts)), never.encode_query(texts))
    with pytest.raises(OptOutError, match=r"travels with its text, and input 1 is a 'dict'\. Give strings"):
        _asked(retrievers, {"text": text}, [{"acme"}])


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"selector": "top1"},
        {"selector": "top1", "route_on": "layer_state"},
        {"scorer": "pilot_mean", "selector": "top1"},
    ],
    ids=str,
)
def test_every_door_is_proved_bit_for_bit(retrievers: Any, router: dict[str, Any], texts: list[str]) -> None:
    rows = verify_optout(retrievers.folder(**router), prompts=texts)
    assert [(row.owner, row.door) for row in rows] == [
        (owner, door) for owner in retrievers.owners for door in ("build", "load", "request")
    ]
    assert all(row.passed and row.bit_identical and row.max_abs_diff == 0 for row in rows)
    assert {row.prompts for row in rows} == {16 + len(texts)}


def test_the_proof_finds_what_is_not_the_never_joined_model(
    retrievers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a request that is not honoured."""
    from composer.retrieval.router import Router

    honest = Router.decide
    monkeypatch.setattr(
        Router, "decide", lambda self, x, allowed, **k: honest(self, x, np.ones_like(allowed), **k)
    )
    rows = verify_optout(retrievers.folder(), owner="bob")
    assert {row.door: row.passed for row in rows} == {"build": True, "load": True, "request": False}


@pytest.mark.parametrize("kind", ["generator", "map"])
def test_r6_what_can_be_read_only_once_is_refused_at_every_door(
    retrievers: Any, texts: list[str], kind: str
) -> None:
    """Whoever read it for the second batch would find nobody in it."""
    folder, model = retrievers.folder(), retrievers.model()
    stock = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    encoder = open_encoder(folder)
    given = map(str.strip, ["acme"]) if kind == "map" else (name for name in ["acme"])
    doors: list[Callable[[], Any]] = [
        lambda: model.encode_query(texts, opt_out=given),
        lambda: model.encode_query(texts, opt_out=[given, *[set()] * (len(texts) - 1)]),
        lambda: model.encode_document(texts, opt_out=given),
        lambda: QueryCache().encode_query(model, texts, opt_out=given),
        lambda: load(folder, opt_out=given),
        lambda: open_encoder(folder, opt_out=given),
        lambda: open_encoder(retrievers.pico.embedder(), opt_out=given),
        lambda: encoder.queries(texts, opt_out=given),
        lambda: encoder.routed(texts, opt_out=given),
        lambda: encoder.revision(opt_out=given),
        lambda: evaluate(encoder, [], opt_out=given),
        lambda: owner_mask(["acme", None], given),
        lambda: stock.encode_query(texts, opt_out=given, batch_size=4),
    ]
    for number, door in enumerate(doors):
        with pytest.raises(OptOutError) as caught:
            door()
        assert str(caught.value) == (
            f"opt_out is or holds a '{kind}', which is no collection of owner names: what can be read only once leaves "
            "nobody out the next time. Write a set, a list or a tuple."
        ), number
    assert list(given) == ["acme"], "nothing was taken out of it"
