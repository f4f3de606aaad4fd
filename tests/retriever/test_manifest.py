"""Manifests and plans of retrievers: every key, every refusal, what a preset means."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import yaml

from composer.lock import Lock
from composer.manifest import Manifest
from composer.planning import plan
from composer.retrieval.form import RetrieverLock, RetrieverManifest
from composer.retrieval.options import RetrievalRouter
from experts.errors import ConsentError, CoterieError, ManifestError, PlanError
from experts.retrieval_artifacts import Moments, RetrievalArtifacts, Utility
from registry import Registry

CANNOT = "Manifest 'pico' cannot be composed:\n"


def refused(manifest: Any, registry: Any) -> str:
    with pytest.raises(CoterieError) as caught:
        plan(manifest, registry)
    assert caught.type is PlanError
    return str(caught.value)


@pytest.fixture(scope="module")
def registry(pico: Any) -> Registry:
    """The pico retrievers, and some who publish something else."""
    registry = Registry(shutil.copytree(pico.retriever_library().path, pico.scratch("registry")))
    x = np.random.default_rng(0).normal(size=(40, pico.width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = pico.retrieval_scores(1, ["ann/pilots", "cid/mean"])
    utility = Utility(queries=40, experts=("ann/pilots",), gram=x.T @ x, cross=x.T @ np.full((40, 2), 0.5))
    extra = {
        "ann/pilots": {
            "scores": scores,
            "utility": utility,
        },
        "cid/mean": {"count": 8, "scatter": False},
        "dan/low": {"layers": (1, 2)},
        "eve/high": {"layer": 3, "layers": (3,)},
        "fay/none": None,
    }
    for i, (name, settings) in enumerate(extra.items()):
        given = dict(settings or {})
        raw = pico.write_retriever(pico.scratch("raw"), seed=20 + i, layers=given.pop("layers", (2, 3)))
        artifacts = None
        if settings is not None:
            scatter = given.pop("scatter", True)
            artifacts = pico.retrieval_artifacts(1, **given) if scatter else _mean_only(pico)
        registry.register(pico.pack_retriever(raw, name=name, artifacts=artifacts))
    return registry


def _mean_only(pico: Any) -> Any:
    vectors, _ = pico._embed(pico.domain_texts(1, count=8), 2)
    return RetrievalArtifacts.create(
        embedding=Moments.from_vectors(vectors, second_moment=False), normalization="l2"
    )


def test_defaults_and_every_key(retrievers: Any) -> None:
    manifest = retrievers.manifest()
    assert type(manifest) is RetrieverManifest
    assert manifest.to_dict()["router"] == {
        "scorer": "lda",
        "selector": "soft",
        "temperature": 3.0,
        "similarity": "base",
        "shrinkage": 0.1,
        "ridge": 3.0,
        "pilot_top": 3,
        "label_split": "heldout",
        "label_metric": "margin",
        "ties": "fractional",
        "fallback": "base",
        "min_margin": 0.0,
        "min_group": 5,
        "pilots_per_group": 1,
        "route_on": "embedding",
        "share_lower_layers": True,
        "default_task": None,
    }
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_the_papers_settings_by_name(retrievers: Any) -> None:
    router = retrievers.manifest(preset="paper", temperature=1.0, min_group=2).router
    assert router == RetrievalRouter(
        scorer="pilot_mean",
        selector="top1",
        similarity="dot",
        label_split="train",
        label_metric="ndcg@10",
        min_group=2,
        share_lower_layers=False,
        temperature=1.0,
    )
    with pytest.raises(ManifestError) as caught:
        retrievers.manifest(preset="papper")
    assert (
        str(caught.value)
        == "manifest has 1 problem:\n  - router.preset: input should be 'paper', given 'papper'"
    )


def test_unknown_keys_are_errors_here_and_there(retrievers: Any, pico: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        retrievers.manifest(top_k=2, min_margn=0.1)
    allowed = ", ".join(sorted(RetrievalRouter.model_fields))
    assert str(caught.value) == (
        f"manifest has 2 problems:\n  - router.top_k: unknown key; Allowed: {allowed}\n"
        f"  - router.min_margn: unknown key; did you mean 'min_margin'? Allowed: {allowed}"
    )
    with pytest.raises(ManifestError, match=r"router\.min_margin: unknown key"):
        pico.manifest(min_margin=0.1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("temperature", 0, "input should be greater than 0, given 0"),
        ("shrinkage", -1, "input should be greater than 0, given -1"),
        ("min_group", 0, "input should be greater than or equal to 1, given 0"),
        ("fallback", "best", "input should be 'base', given 'best'"),
        ("similarity", "euclidean", "input should be 'base', 'cosine' or 'dot', given 'euclidean'"),
        ("label_split", "test", "input should be 'heldout' or 'train', given 'test'"),
        ("ties", "first", "input should be 'fractional', 'own_domain' or 'drop', given 'first'"),
        ("default_task", "passage", "input should be 'query' or 'document', given 'passage'"),
    ],
)
def test_values_out_of_range(retrievers: Any, key: str, value: Any, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        retrievers.manifest(**{key: value})
    assert str(caught.value) == f"manifest has 1 problem:\n  - router.{key}: {said}"


def test_the_plan(retrievers: Any, registry: Registry) -> None:
    planned = plan(retrievers.manifest(opt_out=["bob"]), registry)
    assert [e.card.name for e in planned.experts] == ["acme/search", "zoe/search"]
    assert (planned.left_out, planned.optout_class, planned.warnings) == (("bob/search",), "exact", ())
    sizes = [e.record.parameters for e in planned.experts]
    assert planned.parameters_active == planned.parameters_total
    one = plan(retrievers.manifest(opt_out=["bob"], selector="top1"), registry)
    assert one.parameters_total - one.parameters_active == min(sizes)
    assert planned.to_dict()["router"]["scorer"] == "lda"


def test_the_lock_reads_back_as_what_it_is(retrievers: Any) -> None:
    lock = Lock.read(retrievers.folder())
    assert type(lock) is RetrieverLock
    assert lock.router == RetrievalRouter()
    written = yaml.safe_load((retrievers.folder() / "manifest.yaml").read_text())
    assert Manifest.from_dict(written) == retrievers.manifest()


def test_names_that_are_unknown(retrievers: Any, registry: Registry) -> None:
    assert refused(retrievers.manifest(scorer="ldb", selector="sof"), registry) == (
        f"{CANNOT}  - Unknown retrieval scorer 'ldb'. Did you mean 'lda'? Known: centroid, lda, pilot_logsumexp, "
        "pilot_max, pilot_mean, pilot_top_mean, ridge_utility.\n"
        "  - Unknown retrieval selector 'sof'. Did you mean 'soft'? Known: soft, top1, top2."
    )


def test_bases_and_experts_of_another_kind(retrievers: Any, pico: Any, registry: Registry) -> None:
    manifest = Manifest.from_dict(
        {"name": "pico", "recipe": "router_retriever", "base": "llama", "experts": ["acme/low"]}
    )
    assert refused(manifest, pico.library()) == (
        f"{CANNOT}  - router_retriever composes embedding models; the base is a language model"
    )
    other = Manifest.from_dict(
        {"name": "pico", "recipe": "flexolmo", "base": "embedder", "experts": ["acme/search"]}
    )
    assert "acme/search is of kind 'retriever'; flexolmo composes lora, ffn" in refused(other, registry)


def test_what_language_models_have_is_refused(retrievers: Any, registry: Registry) -> None:
    data = {**retrievers.manifest().to_dict(), "upcycle": {"copies": 2}}
    data["experts"] = [{"ref": "acme/search", "positive_prompts": ["a"]}, "bob/search"]
    assert refused(Manifest.from_dict(data), registry) == (
        f"{CANNOT}  - upcycle: router_retriever has no such settings; leave it out\n"
        "  - acme/search: prompts are given, but router_retriever reads none"
    )


def test_what_an_owner_did_not_publish(retrievers: Any, registry: Registry) -> None:
    assert refused(retrievers.manifest(["acme/search", "fay/none"]), registry) == (
        f"{CANNOT}  - fay/none publishes nothing about its queries"
    )
    few = retrievers.manifest(["acme/search", "cid/mean"], min_group=10)
    assert refused(few, registry) == (f"{CANNOT}  - cid/mean sums up 8 queries; router.min_group asks for 10")
    state = retrievers.manifest(["acme/search", "cid/mean"], scorer="centroid", route_on="layer_state")
    assert refused(state, registry) == (
        f"{CANNOT}  - cid/mean publishes no sums of layer states, which `route_on: layer_state` needs; route on the "
        "embedding"
    )
    assert plan(retrievers.manifest(["acme/search", "cid/mean"], scorer="centroid"), registry).warnings == ()


def test_an_owner_who_keeps_the_second_moment(retrievers: Any, pico: Any, registry: Registry) -> None:
    """A base that divides by length tells how much queries vary; another one does not."""
    from composer.building import build
    from composer.loading import load

    planned = plan(retrievers.manifest(["acme/search", "cid/mean"]), registry)
    assert planned.warnings == (
        "cid/mean publishes no second moment, so lda takes its queries to vary alike in all directions",
    )
    model = load(build(planned, pico.scratch("out"), registry=registry))
    alone = retrievers.model(["acme/search"])
    queries = retrievers.queries()
    assert np.array_equal(model.encode_query(queries, opt_out={"cid"}), alone.encode_query(queries))
    assert not np.array_equal(model.encode_query(queries), alone.encode_query(queries))

    lengths = Registry(pico.scratch("registry"))
    lengths.add_base(pico.embedder(normalize=False), name="embedder")
    moments = Moments(count=40, sum=np.ones(32), scatter=None)
    artifacts = RetrievalArtifacts.create(embedding=moments, normalization="none")
    raw = pico.write_retriever(pico.scratch("raw"), seed=41)
    lengths.register(pico.pack_retriever(raw, name="cid/mean", artifacts=artifacts, normalize=False))
    assert refused(retrievers.manifest(["cid/mean"]), lengths) == (
        f"{CANNOT}  - cid/mean publishes no second moment, which 'lda' needs where queries have any length; route with "
        "`scorer: centroid`"
    )


def test_labels_must_be_those_that_are_asked_for(retrievers: Any, registry: Registry) -> None:
    pair = ["acme/search", "ann/pilots"]
    assert refused(retrievers.manifest(pair, scorer="pilot_max", label_metric="mrr@10"), registry) == (
        f"{CANNOT}  - acme/search publishes no scores of its queries, which 'pilot_max' needs; publish "
        "them (`coterie expert score`), or route with "
        "`scorer: lda`\n"
        "  - ann/pilots made its scores on 'heldout' queries by 'margin'; the router asks for 'heldout' by 'mrr@10' "
        "(label_split, label_metric)"
    )
    assert refused(retrievers.manifest(pair, scorer="ridge_utility"), registry) == (
        f"{CANNOT}  - acme/search publishes no utility of its queries, which 'ridge_utility' needs; route with "
        "`scorer: lda`\n"
        "  - ann/pilots did not score acme/search on its queries, which 'ridge_utility' needs"
    )
    assert "ann/pilots did not score acme/search on its queries, which 'pilot_mean' needs" in refused(
        retrievers.manifest(pair, scorer="pilot_mean"), registry
    )
    state = retrievers.manifest(["ann/pilots"], scorer="pilot_max", route_on="layer_state")
    assert refused(state, registry) == (
        f"{CANNOT}  - scorer 'pilot_max' is made of embeddings, and `route_on: layer_state` scores something else; "
        "route on the embedding"
    )


def test_r21_small_groups_and_strangers_make_no_pilot(retrievers: Any, registry: Registry) -> None:
    from composer.loading import load

    for smallest, rows in ((1, 1), (40, 1), (41, 0)):
        manifest = retrievers.manifest(["ann/pilots"], scorer="pilot_max", min_group=smallest)
        planned = plan(manifest, registry)
        assert planned.optout_class == "exact"
        assert planned.warnings == (
            "ann/pilots publishes how well it was served by cid/mean, not in this composition; nothing of that is "
            "read, and the names go with the owner's next version",
        )
        router = load(retrievers.compose(manifest, registry=registry))[0].model.engine.router
        assert set(router.facts[0].labels.quality) == {"ann/pilots"}
        solved = router.solved([0])
        assert (np.linalg.norm(solved.vectors, axis=1) > 0).sum() == rows


def test_token_embeddings_must_be_published(retrievers: Any, pico: Any, registry: Registry) -> None:
    few = Registry(shutil.copytree(registry.path, pico.scratch("registry")))
    raw = pico.write_retriever(pico.scratch("raw"), seed=41)
    few.register(
        pico.pack_retriever(raw, name="ida/plain", artifacts=pico.retrieval_artifacts(2, static=None))
    )
    assert refused(retrievers.manifest(["acme/search", "ida/plain"], route_on="static_tokens"), few) == (
        f"{CANNOT}  - ida/plain publishes no sums of token embeddings, which `route_on: static_tokens` needs; publish "
        "them (`retrieval: {static_statistics: true}` in its job), or route on the embedding"
    )


def test_layers_of_states(retrievers: Any, registry: Registry) -> None:
    def route(*names: str) -> Any:
        return retrievers.manifest(["acme/search", *names], route_on="layer_state")

    assert refused(route("eve/high"), registry) == (
        f"{CANNOT}  - eve/high summed its states at layer 3, acme/search at layer 2"
    )
    assert refused(route("dan/low"), registry) == (
        f"{CANNOT}  - dan/low changes layer 1, below layer 2, where the router decides; route on the embedding"
    )


def test_few_queries_in_many_dimensions_are_said(retrievers: Any, pico: Any, registry: Registry) -> None:
    raw = pico.write_retriever(pico.scratch("raw"), seed=40)
    few = Registry(shutil.copytree(registry.path, pico.scratch("registry")))
    few.register(pico.pack_retriever(raw, name="gus/few", artifacts=pico.retrieval_artifacts(2, count=20)))
    assert plan(retrievers.manifest(["gus/few"]), few).warnings == (
        "gus/few sums up 20 queries in 32 dimensions; its second moment tells what they span",
    )
    assert plan(retrievers.manifest(["gus/few"], scorer="centroid"), few).warnings == ()


def test_owners_who_are_out(retrievers: Any, pico: Any) -> None:
    from composer.loading import load

    folder = retrievers.folder()
    changed = Registry(shutil.copytree(pico.retriever_library().path, pico.scratch("registry")))
    changed.opt_out("acme", reason="left", by="legal")
    with pytest.raises(ConsentError, match=r"acme/search: acme opted out on "):
        plan(retrievers.manifest(), changed)
    model = load(folder, registry=changed)
    assert model.owners == ("bob", "zoe")
    assert np.array_equal(
        model.encode_query(retrievers.queries()),
        retrievers.model(["bob/search", "zoe/search"]).encode_query(retrievers.queries()),
    )
