"""The YAML of an experiment: what is allowed, and one message with every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts.errors import CoterieError
from pipelines.experiments import Experiment, read_experiment
from pipelines.experiments.kind import EXPERIMENT_KINDS

_FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_the_experiments_of_the_repository_are_well_formed(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    assert len(experiment.seeds) >= 3


@pytest.mark.parametrize("kind", EXPERIMENT_KINDS)
def test_every_arm_can_be_loaded(kind: str) -> None:
    arms = EXPERIMENT_KINDS.load(kind).arms
    assert all(callable(arms.load(name)) for name in arms)


@pytest.mark.parametrize("kind", EXPERIMENT_KINDS)
def test_a_kind_is_complete(kind: str) -> None:
    made = EXPERIMENT_KINDS.load(kind)()
    assert made.settings.model_fields["kind"].default == kind
    assert made.metric


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("kind: flexolmoo\nname: some\n")
    with pytest.raises(
        CoterieError, match=r"^Unknown experiment kind 'flexolmoo'\. Did you mean 'flexolmo'\?"
    ) as caught:
        read_experiment(path)
    assert caught.value.exit_code == 2


def test_settings_survive_their_plain_form(tiny: Experiment) -> None:
    assert Experiment.from_dict(tiny.to_dict()) == tiny


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"domain": []}, "domain: unknown key; did you mean 'domains'?"),
        ({"arms": ["coteri"]}, "Unknown experiment arm 'coteri'. Did you mean 'coterie'?"),
        ({"domains": ["python", "icd"]}, "Unknown domain text 'icd'. Did you mean 'icd10'?"),
        ({"domains": ["python"]}, "name at least two domains"),
        ({"public": ["python"]}, "python: a domain cannot be public or nobody's as well"),
        ({"device": "gpu"}, "device: 'gpu' found; write auto, cpu, cuda, or a GPU's number as in cuda:1"),
        ({"seeds": [1, 1]}, "seeds must be given, each once"),
        ({"experts": {"steps": 0}}, "experts.steps"),
    ],
)
def test_mistakes_are_named(tiny_settings: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CoterieError) as caught:
        Experiment.from_dict({**tiny_settings, **change})
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file() -> None:
    with pytest.raises(CoterieError, match=r"^There is no experiment at nowhere\.yaml\.$"):
        Experiment.from_file("nowhere.yaml")
