"""Tuning jobs as written: what is allowed, every mistake at once, and the mix that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.errors import CoterieError, ManifestError
from pipelines.tune import TuneJob
from pipelines.tune.mix import plan_mix

Job = Callable[..., TuneJob]


def test_every_prefix_of_the_mix_has_its_shares() -> None:
    plan = plan_mix(steps=50, batch_size=4, counts=(30, 7, 11), weights=(1.0, 2.0, 1.0), seed=0)
    sources = np.digitize(plan.flatten(), [30, 37])
    for draws in range(1, 201):
        shares = np.bincount(sources[:draws], minlength=3) - np.array([0.25, 0.5, 0.25]) * draws
        assert np.abs(shares).max() <= 1
    mine = plan.flatten()[sources == 1] - 30
    assert sorted(mine[:7]) == list(range(7)), "an epoch visits every window once"
    assert list(mine[:7]) != list(mine[7:14])


def test_the_mix_depends_on_the_seed_alone() -> None:
    sizes: dict[str, Any] = {"steps": 5, "batch_size": 4, "counts": (9, 9), "weights": (1, 1)}
    assert np.array_equal(plan_mix(**sizes, seed=1), plan_mix(**sizes, seed=1))
    assert not np.array_equal(plan_mix(**sizes, seed=1), plan_mix(**sizes, seed=2))


def test_paths_and_checkpoints_are_no_part_of_the_digest(job: Job, texts: Path, tmp_path: Path) -> None:
    plain = job()
    assert job(workdir=str(tmp_path / "other"), checkpoint_every=7).digest() == plain.digest()
    assert job(steps=5).digest() != plain.digest()
    assert job(data=[{"text": "acme.jsonl", "owner": "zed"}]).digest() != plain.digest()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train": "router"}, "train: input should be 'routers', 'trunk' or 'all', given 'router'"),
        ({"step": 5}, "step: unknown key; did you mean 'steps'?"),
        ({"data": []}, "name at least one source under data"),
        ({"data": [{"text": "acme.jsonl"}]}, "say whose text it is: either 'owner: NAME' or 'public: true'"),
        (
            {"data": [{"text": "acme.jsonl", "owner": "acme", "public": True}]},
            "say whose text it is: either 'owner: NAME' or 'public: true'",
        ),
        ({"data": [{"text": "no.jsonl", "public": True}]}, "there is no file '"),
        ({"data": [{"text": "acme.csv", "public": True}]}, "'acme.csv' does not end in .jsonl or .txt"),
        ({"data": [{"text": "acme.jsonl", "owner": "A C"}]}, "'A C' is not an owner name"),
        ({"micro_batch": 3}, "micro_batch 3 does not divide batch_size 4 into equal parts"),
        ({"load_balancing": {"over": "batch"}}, "load_balancing.over"),
        ({"learning_rate": 0}, "learning_rate"),
    ],
)
def test_mistakes_are_named(job: Job, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CoterieError) as caught:
        job(**change)
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_is_missing_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"^There is no tuning job at nowhere\.yaml\.$"):
        TuneJob.from_file("nowhere.yaml")
    path = tmp_path / "tune.yaml"
    path.write_text("- a\n")
    with pytest.raises(
        ManifestError, match=r"^tuning job tune\.yaml: not a mapping; write 'train:' and 'data:'\.$"
    ):
        TuneJob.from_file(path)


def test_several_processes_share_the_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.tune import devices

    class Three(devices.OneDevice):
        count = 3

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(devices, "SeveralDevices", Three)
    with pytest.raises(ManifestError) as caught:
        devices.find_devices("cpu", batch_size=8)
    assert str(caught.value) == (
        "batch_size 8 cannot be shared out evenly among 3 processes; make it a multiple of 3."
    )
