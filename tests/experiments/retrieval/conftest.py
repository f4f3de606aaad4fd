"""A tiny comparison of retrievers: three invented domains of syllables on the pico embedder, a few steps each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.assets.pairs import DomainPairs, Pair
from pipelines.experiments.results import Row
from pipelines.experiments.retrieval.data import RetrievalData, owned_domain
from pipelines.experiments.retrieval.settings import RetrieverExperiment
from pipelines.experiments.runner import run_experiment

DOMAINS = ("icd10", "functions")


def _pairs(pico: Any, seed: int, count: int) -> list[Pair]:
    draw = random.Random(seed)
    found = []
    for number, text in enumerate(pico.domain_texts(seed, count=count, words=10)):
        words = text.split()
        found.append(Pair(id=f"{seed}-{number}", query=" ".join(draw.sample(words, 4)), document=text))
    return found


def _domain(pico: Any, name: str, seed: int) -> DomainPairs:
    pairs = _pairs(pico, seed, 92)
    return DomainPairs(
        name=name,
        training=tuple(pairs[:28]),
        held_out=tuple(pairs[28:]),
        license="CC0-1.0",
        source="Invented.",
    )


@pytest.fixture(scope="session")
def comparison(pico: Any) -> RetrieverExperiment:
    return RetrieverExperiment.from_dict(
        {
            "name": "tiny_retrievers",
            "base": str(pico.embedder()),
            "domains": list(DOMAINS),
            "unseen": ["surgery"],
            "pairs": 80,
            "documents": 30,
            "queries": 8,
            "labelled": 8,
            "layers": "2-3",
            "rank": 2,
            "steps": 12,
            "batch_size": 8,
            "learning_rate": 0.01,
            "router": {"min_group": 1, "temperature": 1.0},
            "seeds": [0],
        }
    )


@pytest.fixture(scope="session")
def domains(pico: Any, comparison: RetrieverExperiment) -> RetrievalData:
    owned = {
        name: owned_domain(_domain(pico, name, seed), experiment=comparison)
        for seed, name in enumerate(DOMAINS, start=1)
    }
    unseen = owned_domain(_domain(pico, "surgery", 0), experiment=comparison).collection
    return RetrievalData(owned=owned, unseen={"surgery": unseen})


@pytest.fixture(scope="session")
def done(
    comparison: RetrieverExperiment, domains: RetrievalData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    work = tmp_path_factory.mktemp("retrievers") / "work"
    return work, run_experiment(comparison, work=work, texts=domains)
