"""A tiny experiment on invented text: two domains, an anchor of two layers, a few steps of everything."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.assets import DomainText
from pipelines.experiments import Experiment
from pipelines.experiments.world import Texts

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "anchor": {
        "vocabulary": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 2,
        "heads": 2,
        "steps": 12,
        "batch_size": 4,
    },
    "domains": ["python", "icd10"],
    "public": ["history"],
    "unowned": ["stories"],
    "sequence_length": 32,
    "held_out_windows": 4,
    "rank": 4,
    "experts": {"steps": 4, "batch_size": 2, "learning_rate": 0.01},
    "tuning": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
    "seeds": [0],
}


def _documents(words: str, *, count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(words.split(), k=80)) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_settings(pico_embedder: Path) -> dict[str, Any]:
    return {**SETTINGS, "embedder": str(pico_embedder)}


@pytest.fixture(scope="session")
def tiny(tiny_settings: dict[str, Any]) -> Experiment:
    return Experiment.from_dict(tiny_settings)


@pytest.fixture(scope="session")
def tiny_texts() -> Texts:
    code, codes = (
        "def return import class self none raise yield",
        "fracture femur closed initial encounter sequela hip",
    )
    prose = "the war congress colony president trade south north"
    return Texts(
        owned={"python": _documents(code, count=20, seed=1), "icd10": _documents(codes, count=20, seed=2)},
        held_out={
            "python": _documents(code, count=6, seed=3),
            "icd10": _documents(codes, count=6, seed=4),
            "stories": _documents("holmes said watson door night", count=6, seed=5),
        },
        public=_documents(prose, count=30, seed=6),
    )


@pytest.fixture(scope="session")
def tiny_fetch(tiny_texts: Texts) -> Callable[..., DomainText]:
    """Stands for `pipelines.assets.domain_text`: nothing is downloaded."""

    def fetch(name: str, **_: Any) -> DomainText:
        training = tiny_texts.owned.get(name, tiny_texts.public)
        held_out = tiny_texts.held_out.get(name, ())
        return DomainText(
            name=name, training=tuple(training), held_out=tuple(held_out), license="CC0-1.0", source="here"
        )

    return fetch
