"""The device of an experiment: looked for before anything is fetched, and everything on it; GPU against CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experts.errors import ManifestError
from pipelines.experiments import Experiment
from pipelines.experiments.runner import run_experiment
from pipelines.experiments.world import Texts, World


def test_it_is_looked_for_before_anything_is_fetched(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("pipelines.assets.domain_text", fetch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    experiment = Experiment.from_dict({**tiny_settings, "device": "cuda:1"})
    with pytest.raises(ManifestError, match=r"^device: cuda:1 is not there; this machine has cuda:0\."):
        run_experiment(experiment, work=tmp_path / "work")


def test_everything_is_told_the_device_that_was_found(
    tiny: Experiment, tiny_texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world = World(tiny, tiny_texts, folder=tmp_path, seed=0)
    assert world.device == "cuda"
    assert world._domain_job("python", "python-owner/plain", {}).device == "cuda"
    monkeypatch.setattr(World, "registry", object())
    assert world.baselines({}).device == "cuda"


def test_a_folder_may_go_on_on_another_device(tiny: Experiment) -> None:
    assert "device" in tiny.FREE


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_measures(
    tiny_settings: dict[str, Any], tiny_texts: Texts, tmp_path: Path
) -> None:
    """Float32 on both; nats per token agree within 2e-2 after anchor and experts were trained on either."""
    arms = [
        "anchor",
        "soup",
        "btm",
        "prompt_router",
        "paper",
        "btx_joint",
        "unrestricted_1x",
        "pooled",
        "coterie",
    ]
    rows = {}
    for device in ("cpu", "cuda"):
        experiment = Experiment.from_dict({**tiny_settings, "arms": arms, "device": device})
        found = run_experiment(experiment, work=tmp_path / device, texts=tiny_texts)
        rows[device] = {(row.arm, row.domain): row.value for row in found if row.metric == "nll"}
    assert rows["cuda"] == pytest.approx(rows["cpu"], abs=2e-2)
