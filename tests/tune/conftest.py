"""A pico composition with learned rows, three owners' texts, and a job on two of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.tune import TuneJob


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with acme.jsonl and public.jsonl, in letters of the pico vocabulary."""
    folder = tmp_path_factory.mktemp("texts")
    for number, (name, letters) in enumerate(
        {"acme": "abcdefg ", "public": "!#$%&()*+ ", "word": "xyz "}.items()
    ):
        chosen = random.Random(number)
        documents = ["".join(chosen.choices(letters, k=120)) for _ in range(6)]
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def job(texts: Path, tmp_path: Path) -> Callable[..., TuneJob]:
    """A job of a few steps; further arguments are its fields."""

    def make(**changes: Any) -> TuneJob:
        return TuneJob.from_dict(
            {
                "data": [
                    {"text": "acme.jsonl", "owner": "acme"},
                    {"text": "public.jsonl", "public": True, "weight": 3},
                ],
                "sequence_length": 16,
                "batch_size": 4,
                "steps": 4,
                "warmup": 1,
                "learning_rate": 0.01,
                "checkpoint_every": 2,
                "workdir": str(tmp_path / "work"),
                **changes,
            },
            root=texts,
        )

    return make
