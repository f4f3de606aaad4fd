"""Every arm runs on a tiny world; oracles and sums are what they say; results are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.errors import CoterieError
from pipelines.experiments.results import Row
from pipelines.experiments.retrieval.arms import ARMS, classifier_router, dataset_router
from pipelines.experiments.retrieval.comparison import RetrieverComparison
from pipelines.experiments.retrieval.data import RetrievalData, read_data
from pipelines.experiments.retrieval.report import figures
from pipelines.experiments.retrieval.settings import RetrieverExperiment
from pipelines.experiments.retrieval.world import RetrieverWorld
from pipelines.experiments.runner import run_experiment

Done = tuple[Path, list[Row]]


def _values(rows: list[Row], arm: str, metric: str = "ndcg@10") -> dict[str, float]:
    return {row.domain: row.value for row in rows if row.arm == arm and row.metric == metric}


def test_every_arm_is_measured_on_every_collection(done: Done, domains: RetrievalData) -> None:
    _, rows = done
    several = {"expert": "expert:functions", "without": "coterie-without-own"}
    for name in ARMS:
        arm = several.get(name, name)
        expected = set(domains.owned) if name == "without" else set(domains.collections)
        for metric in ("ndcg@10", "recall@100", "mrr@10"):
            assert set(_values(rows, arm, metric)) == expected, arm
        assert all(0 <= value <= 1 for value in _values(rows, arm).values())
    assert all(row.split == "test" for row in rows)


def test_oracles_are_maxima_of_the_experts(done: Done, domains: RetrievalData) -> None:
    _, rows = done
    experts = [_values(rows, f"expert:{domain}") for domain in domains.owned]
    for name in domains.collections:
        assert _values(rows, "dataset_oracle")[name] == max(values[name] for values in experts)
        assert _values(rows, "instance_oracle")[name] >= _values(rows, "dataset_oracle")[name]
    best = max(experts, key=lambda values: sum(values[name] for name in domains.owned))
    assert _values(rows, "best_single_expert") == best


def test_experts_help_at_home(done: Done, domains: RetrievalData) -> None:
    _, rows = done
    base = _values(rows, "base")
    gains = [_values(rows, f"expert:{domain}")[domain] - base[domain] for domain in domains.owned]
    assert sum(gains) > 0
    for arm in ("coterie", "coterie_one_pass", "dataset_router", "paper"):
        assert set(_values(rows, arm, "routed_to_owner")) == set(domains.owned)
    for domain in domains.owned:
        sent = {row.metric: row.value for row in rows if (row.arm, row.domain) == ("coterie", domain)}
        assert sum(
            value for metric, value in sent.items() if metric.startswith("routed_to:")
        ) == pytest.approx(1)


def test_routers_know_the_queries_they_are_made_of(
    done: Done, comparison: RetrieverExperiment, domains: RetrievalData
) -> None:
    """Each labelled query is among the 100 that the nearest one is looked for in, so it is routed home."""
    world = RetrieverWorld(comparison, domains, folder=done[0], seed=0)
    weights = dataset_router(world)["dataset_router"].weights
    for position, domain in enumerate(domains.owned, start=1):
        assert (weights[f"{domain} labelled"][:, position] == 1.0).all()
    best = {
        domain: scores.max(axis=1, keepdims=True) == scores for domain, scores in world.label_scores.items()
    }
    weights = classifier_router(world)["classifier_router"].weights
    for domain, winners in best.items():
        alone = winners.sum(axis=1) == 1
        chosen = weights[f"{domain} labelled"][alone, 1:].argmax(axis=1)
        assert (chosen == winners[alone].argmax(axis=1)).mean() > 0.7


def test_significance_is_against_the_base(done: Done) -> None:
    _, rows = done
    assert not _values(rows, "base", "p_vs_base")
    assert set(_values(rows, "coterie", "p_vs_base")) == {"owned", "unseen"}
    assert set(_values(rows, "coterie-without-own", "p_vs_base")) == {"owned"}
    assert all(0 < row.value <= 1 for row in rows if row.metric == "p_vs_base")


def test_documents_are_encoded_once_and_cells_kept(
    done: Done, comparison: RetrieverExperiment, domains: RetrievalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rows = done
    assert len(list((work / "documents").glob("*.npy"))) == len(domains.collections)
    monkeypatch.setattr(ARMS, "load", lambda name: pytest.fail(f"{name} ran again"))
    assert run_experiment(comparison, work=work) == rows


def test_a_work_folder_of_before_gets_the_new_arms_without_training(
    done: Done, comparison: RetrieverExperiment, domains: RetrievalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor what was published change; sums over token embeddings come beside it, from the pairs."""
    from experts.routing_artifacts import RoutingArtifacts
    from pipelines.experiments.retrieval.republished import static_experts

    monkeypatch.setattr("pipelines.train.train_jobs", lambda *_, **__: pytest.fail("trained again"))
    world = RetrieverWorld(comparison, domains, folder=done[0], seed=0)
    for domain, name in static_experts(world).items():
        first, second = (world.registry.card(ref) for ref in (world.experts[domain], name))
        assert first.files[:-1] == second.files[:-1]
        loaded = [
            RoutingArtifacts.load(world.registry.files(card)["routing.safetensors"], card.routing).retrieval
            for card in (first, second)
        ]
        assert [made.info.static_tokens for made in loaded] == [False, True]
        added = loaded[1].tensors()
        assert set(added) - set(loaded[0].tensors()) == {"retrieval.static.sum", "retrieval.static.scatter"}
        assert all(np.array_equal(added[name], tensor) for name, tensor in loaded[0].tensors().items())


def test_experts_of_means_keep_their_second_moments(
    done: Done, comparison: RetrieverExperiment, domains: RetrievalData
) -> None:
    from experts.routing_artifacts import RoutingArtifacts
    from pipelines.experiments.retrieval.republished import experts_of_means

    world = RetrieverWorld(comparison, domains, folder=done[0], seed=0)
    for domain, name in experts_of_means(world).items():
        card = world.registry.card(name)
        made = RoutingArtifacts.load(
            world.registry.files(card)["routing.safetensors"], card.routing
        ).retrieval
        assert not made.info.second_moment
        assert set(made.tensors()) == {
            "retrieval.embedding.sum",
            "retrieval.state.sum",
            "retrieval.pilots",
        }
        assert card.files[:-1] == world.registry.card(world.experts[domain]).files[:-1]
    assert _values(done[1], "coterie_means", "ndcg@10") != _values(done[1], "coterie", "ndcg@10")


def test_what_is_written(done: Done, comparison: RetrieverExperiment, tmp_path: Path) -> None:
    _, rows = done
    paths = RetrieverComparison().write(comparison, rows, out=tmp_path / "results")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    data = json.loads(paths[0].read_text())
    assert data["settings"]["collections"] is None
    assert {
        "arm": "base",
        "seed": 0,
        "domain": "functions",
        "split": "test",
        "metric": "ndcg@10",
    }.items() <= next(
        row for row in data["rows"] if row["arm"] == "base" and row["domain"] == "functions"
    ).items()
    text = paths[1].read_text()
    assert "| coterie - base |" in text
    assert text.count("| base |") == 2
    # of four layers the upper two are adapted, by two experts
    for cost in ("base | 1.00", "coterie | 2.00", "coterie_top1 | 2.00", "coterie_one_pass | 1.00"):
        assert f"| {cost} | 0." in text
    for cost in ("coterie_static_tokens | 1.00", "coterie_static_tokens_soft | 1.50", "uniform | 1.50"):
        assert f"| {cost} | 0." in text
    assert "| dataset_oracle | 1" not in text
    assert "* `uniform`: The mean of all experts' query vectors." in text


def test_figures_are_differences_of_means() -> None:
    def row(arm: str, domain: str, value: float) -> Row:
        return Row(arm=arm, seed=0, domain=domain, split="test", metric="ndcg@10", value=value)

    rows = [
        *(row("base", domain, value) for domain, value in (("a", 0.5), ("b", 0.6), ("u", 0.4))),
        *(row("coterie", domain, value) for domain, value in (("a", 0.6), ("b", 0.64), ("u", 0.45))),
        *(row("dataset_oracle", domain, value) for domain, value in (("a", 0.6), ("b", 0.7), ("u", 0.5))),
    ]
    assert figures(rows, owned=("a", "b")) == {
        "coterie - base": [pytest.approx(7.0)],
        "coterie - base, unseen": [pytest.approx(5.0)],
        "% of the gap from base to dataset_oracle": [pytest.approx(70.0)],
    }


def test_training_and_test_documents_are_disjoint(domains: RetrievalData) -> None:
    for owned in domains.owned.values():
        trained = {pair.id for pair in owned.training}
        assert not trained & set(owned.collection.queries)
        assert set(owned.labelled.queries) <= trained
        ids = {document.id for document in owned.collection.documents}
        assert ids >= set(owned.collection.queries) | set(owned.labelled.queries)


def test_collections_that_are_not_there_are_left_out(
    comparison: RetrieverExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_COLLECTIONS", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "1", "text": "wing"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "a", "text": "lift"}\n')
    (folder / "qrels.tsv").write_text("a\t1\t1\n")
    monkeypatch.setattr(
        "pipelines.experiments.retrieval.data.domain_pairs", lambda name, progress: _no_pairs(name)
    )
    told: list[str] = []
    changed = comparison.model_copy(update={"unseen": ("med", "mine")})
    data = read_data(changed, tell=told.append)
    assert list(data.unseen) == ["mine"]
    assert told == [f"med is left out: there is no folder of that name in {tmp_path}"]


def _no_pairs(name: str) -> Any:
    from pipelines.assets.pairs import DomainPairs

    return DomainPairs(name=name, training=(), held_out=(), license="CC0-1.0", source="Nothing.")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"domains": ["icd10", "functoins"]},
            "Unknown domain of pairs 'functoins'. Did you mean 'functions'?",
        ),
        ({"domains": ["icd10"]}, "name at least two domains"),
        ({"unseen": ["icd10"]}, "icd10: a domain cannot be unseen as well"),
        ({"labelled": 40}, "labelled must not be larger than documents"),
        ({"arms": ["coteri"]}, "Unknown retriever arm 'coteri'. Did you mean 'coterie'?"),
        ({"stepz": 3}, "stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_mistakes_are_named(comparison: RetrieverExperiment, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CoterieError) as caught:
        RetrieverExperiment.from_dict({**comparison.to_dict(), **change})
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2
