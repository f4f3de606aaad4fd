"""A retriever's expert that was made from another owner's leaves with that owner, through every door.

``bob/made`` says that it was made from acme's expert. In `PAIR` acme has no expert besides; without acme, zoe is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import composer.hf  # noqa: F401 - registers the Auto classes
from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.membership import Membership
from composer.retrieval.cache import QueryCache
from composer.verify import verify_optout
from experts.errors import ConsentError, UnknownNameError
from pipelines.retrieval.collection import Collection, Document
from pipelines.retrieval.encoders import open_encoder
from pipelines.retrieval.evaluation import evaluate, leave_one_out
from registry import Registry

PAIR = ("bob/made", "zoe/search")
FOUR = ("acme/search", "bob/made", "bob/search", "zoe/search")
LEFT = {PAIR: ("zoe/search",), FOUR: ("bob/search", "zoe/search")}
"""Who is left without acme."""


@pytest.fixture(scope="module")
def descended(pico: Any) -> Registry:
    """The pico retrievers, and one that bob made from acme's."""
    registry = Registry(shutil.copytree(pico.retriever_library().path, pico.scratch("registry")))
    raw = pico.write_retriever(pico.scratch("raw"), seed=5, r=2)
    parent = registry.expert("acme/search").digest
    artifacts = pico.retrieval_artifacts(1)
    registry.register(pico.pack_retriever(raw, name="bob/made", artifacts=artifacts, derived_from=(parent,)))
    return registry


@pytest.fixture(scope="module")
def compose(retrievers: Any, descended: Registry) -> Callable[..., Path]:
    """A folder of experts, shared."""

    def make(experts: tuple[str, ...], **settings: Any) -> Path:
        manifest = retrievers.manifest(experts, **settings)
        path: Path = retrievers.pico.once(
            lambda: retrievers.compose(manifest, registry=descended), "descended", manifest.digest
        )
        return path

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Call the command line; what it prints as JSON."""
    from pipelines.cli.app import app

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("COTERIE_REGISTRY", raising=False)

    def call(*words: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, words), "--json"], prog_name="coterie")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return call


def test_the_lock_says_whose_it_is(compose: Any) -> None:
    made, zoe = Lock.read(compose(PAIR)).experts
    assert (made.name, made.parent_owners, zoe.parent_owners) == ("bob/made", ("acme",), ())
    encoder = open_encoder(compose(PAIR))
    assert (encoder.owners, encoder.known) == (("bob", "zoe"), ("acme", "bob", "zoe"))
    assert encoder.involved == ("acme", "bob", "zoe")
    left = open_encoder(compose(PAIR), opt_out={"acme"})
    assert (left.owners, left.known, left.involved) == (("zoe",), ("acme", "bob", "zoe"), ("zoe",))


@pytest.mark.parametrize("experts", [PAIR, FOUR], ids=["parent only", "parent and more"])
def test_r2_whoever_leaves_takes_along_what_was_made_of_theirs(
    compose: Any, retrievers: Any, descended: Registry, texts: list[str], experts: tuple[str, ...]
) -> None:
    """Built, loaded, asked, saved, removed, kept and read from a ledger: the model that acme never was in."""
    folder, never = compose(experts), load(compose(LEFT[experts]))
    expected = never.encode_query(texts)
    model, encoder = load(folder), open_encoder(folder)
    assert not np.allclose(model.encode_query(texts), expected, atol=1e-3), (
        "the control: there is a difference"
    )
    pico = retrievers.pico
    saved, removed = pico.scratch("saved"), Path(shutil.copytree(folder, pico.scratch("removed")))
    load(folder, opt_out={"acme"}).save_pretrained(str(saved))
    remove_experts(removed, ["acme"])
    ledger = Registry(shutil.copytree(descended.path, pico.scratch("ledger")))
    ledger.opt_out("acme", reason="left")
    stock = {"device": "cpu", "local_files_only": True}
    loaded = SentenceTransformer(str(folder), model_kwargs={"opt_out": {"acme"}}, **stock)
    doors = {
        "build": load(compose(experts, opt_out=["acme"])).encode_query(texts),
        "load": load(folder, opt_out={"acme"}).encode_query(texts),
        "ledger": load(folder, registry=ledger).encode_query(texts),
        "request": model.encode_query(texts, opt_out={"acme"}),
        "row": model.encode_query(texts, opt_out=[{"acme"}] * len(texts)),
        "stock load": loaded.encode_query(texts),
        "stock request": SentenceTransformer(str(folder), **stock).encode_query(texts, opt_out={"acme"}),
        "save": load(saved).encode_query(texts),
        "remove": load(removed).encode_query(texts),
        "encoder load": open_encoder(folder, opt_out={"acme"}).queries(texts),
        "encoder ledger": open_encoder(folder, registry=ledger).routed(texts)[0],
        "encoder request": encoder.queries(texts, opt_out={"acme"}),
        "encoder route": encoder.routed(texts, opt_out={"acme"})[0],
    }
    assert [door for door, found in doors.items() if not np.array_equal(found, expected)] == []
    assert Lock.read(removed).experts == Lock.read(compose(LEFT[experts])).experts
    _, routes = encoder.routed(texts, opt_out={"acme"})
    assert {route.expert for route in routes} <= set(LEFT[experts])


def test_rows_and_kept_queries_keep_sets_apart(compose: Any, texts: list[str]) -> None:
    model, never = load(compose(PAIR)), load(compose(LEFT[PAIR]))
    with_acme, without = model.encode_query(texts), never.encode_query(texts)
    sets = [{"acme"} if row % 2 else set[str]() for row in range(len(texts))]
    expected = np.where(np.arange(len(texts))[:, None] % 2 == 1, without, with_acme)
    assert np.abs(model.encode_query(texts, opt_out=sets) - expected).max() < 1e-5
    cache = QueryCache()
    for opt_out, vectors in ((set[str](), with_acme), ({"acme"}, without), (set[str](), with_acme)):
        assert np.abs(cache.encode_query(model, texts, opt_out=opt_out) - vectors).max() < 1e-5
    assert (cache.hits, len(cache)) == (len(texts), 2 * len(texts))
    cache.encode_query(model, texts, opt_out={"bob"})  # takes the same expert along
    assert cache.hits == 2 * len(texts)


def test_results_are_kept_under_who_may_answer(compose: Any) -> None:
    encoder = open_encoder(compose(PAIR))
    revisions = [encoder.revision(opt_out=out) for out in ((), ("acme",), ("bob",), ("acme", "zoe"))]
    assert revisions[1] == revisions[2]  # the same expert leaves
    assert len(set(revisions)) == 3
    with pytest.raises(UnknownNameError, match=r"^Unknown owner 'acne'\. Did you mean 'acme'\?"):
        encoder.queries(["duba"], opt_out={"acne"})


def _collection(texts: list[str], *, owners: bool) -> Collection:
    whose = ("acme", "bob", "zoe", None)
    documents = tuple(
        Document(id=f"d{n}", text=text, owner=whose[n % 4] if owners else None)
        for n, text in enumerate(texts)
    )
    queries = {f"q{n}": text for n, text in enumerate(texts)}
    return Collection(
        name="c",
        documents=documents,
        queries=queries,
        judgements={f"q{n}": {f"d{n}": 1} for n in range(len(texts))},
    )


def test_each_owner_left_out_in_turn(compose: Any, texts: list[str]) -> None:
    tests = [_collection(texts, owners=False)]
    arms = leave_one_out(open_encoder(compose(PAIR)), tests)
    assert list(arms) == ["composed", "without acme", "without bob", "without zoe"]
    (never,) = evaluate(open_encoder(compose(LEFT[PAIR])), tests).values()
    assert arms["without acme"]["c"].metrics == never.metrics
    assert arms["without acme"]["c"].routing == {"base": 0.0, "bob": 0.0, "zoe": 1.0}
    assert arms["without acme"] == arms["without bob"]


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "no documents"])
def test_search_is_that_of_a_model_and_an_index_without_the_owner(
    compose: Any, run: Any, texts: list[str], tmp_path: Path, documents: bool
) -> None:
    folder, never = compose(PAIR), compose(LEFT[PAIR])
    rows = [
        {"_id": d.id, "text": d.text, **({"owner": d.owner} if d.owner else {})}
        for d in _collection(texts, owners=True).documents
    ]
    without = [row for row in rows if row.get("owner") != "acme"]
    for name, part in (("with", rows if documents else without), ("without", without)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        run("index", tmp_path / name, "--model", folder / "base", "--corpus", tmp_path / f"{name}.jsonl")
    query = texts[0]
    expected = run("search", tmp_path / "without", never, query)
    found = run("search", tmp_path / "with", folder, query, "--opt-out", "acme")
    assert found == {**expected, "opt_out": ["acme"]}
    whole = run("search", tmp_path / "with", folder, query)
    assert whole["weights"] != expected["weights"], "the control: there is a difference"


def test_a_measurement_says_who_was_left_out(
    compose: Any, run: Any, texts: list[str], tmp_path: Path
) -> None:
    """Acme was, and has no expert of its own; bob was not, although bob's expert is gone."""
    collection = _collection(texts, owners=False)
    for name, rows in (
        ("corpus", [{"_id": document.id, "text": document.text} for document in collection.documents]),
        ("queries", [{"_id": query, "text": text} for query, text in collection.queries.items()]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in range(len(texts))))
    data = ("--data", f"c={tmp_path}")
    found = run("evaluate", compose(PAIR), *data, "--opt-out", "acme")
    assert found == {**run("evaluate", compose(LEFT[PAIR]), *data), "opt_out": ["acme"]}


def test_an_owner_of_documents_alone_takes_no_expert_along(
    compose: Any, run: Any, texts: list[str], tmp_path: Path
) -> None:
    row = {"_id": "d", "text": texts[0], "owner": "yan"}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row) + "\n")
    folder = compose(PAIR)
    run("index", tmp_path / "index", "--model", folder / "base", "--corpus", tmp_path / "corpus.jsonl")
    whole = run("search", tmp_path / "index", folder, texts[0])
    left = run("search", tmp_path / "index", folder, texts[0], "--opt-out", "yan")
    assert left == {**whole, "opt_out": ["yan"], "documents": []}


def test_the_proof_covers_owners_of_parents(
    compose: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = verify_optout(compose(PAIR), prompts=texts[:4])
    assert [(row.owner, row.door, row.passed) for row in rows] == [
        (owner, door, True) for owner in ("acme", "bob", "zoe") for door in ("build", "load", "request")
    ]
    own = property(lambda self: tuple(frozenset((owner,)) for owner in self.owners))
    monkeypatch.setattr(Membership, "whose", own)  # the control: a request that knows no parents
    rows = verify_optout(compose(PAIR), owner="acme")
    assert {row.door: row.passed for row in rows} == {"build": True, "load": True, "request": False}


def test_it_does_not_join_once_the_parent_left(compose: Any, retrievers: Any, descended: Registry) -> None:
    folder = Path(shutil.copytree(compose(LEFT[PAIR]), retrievers.pico.scratch("grows")))
    add_experts(folder, ["bob/made"], registry=descended)
    assert Lock.read(folder).experts == Lock.read(compose(PAIR)).experts
    remove_experts(folder, ["acme"])
    ledger = Registry(shutil.copytree(descended.path, retrievers.pico.scratch("ledger")))
    ledger.opt_out("acme", reason="left")
    with pytest.raises(ConsentError, match="acme opted out on "):
        add_experts(folder, ["bob/made"], registry=ledger)
    assert Lock.read(folder).experts == Lock.read(compose(LEFT[PAIR])).experts
