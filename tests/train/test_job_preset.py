"""The job's preset: what it stands for, what wins over it, and what it cannot choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts.errors import ManifestError
from pipelines.train.job import DomainJob


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "law.jsonl").write_text('{"text": "hereby"}\n')
    return {
        "name": "acme/contracts",
        "domain": "law",
        "license": "Apache-2.0",
        "base": "smollm2",
        "data": str(tmp_path / "law.jsonl"),
    }


@pytest.fixture
def embedder(tmp_path: Path) -> str:
    folder = tmp_path / "gritlm"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    return str(folder)


def test_the_paper_written_out(job: dict[str, Any], embedder: str) -> None:
    preset = DomainJob.from_dict({**job, "preset": "paper", "row_init": embedder})
    written = DomainJob.from_dict(
        {
            **job,
            "kind": "ffn",
            "layers": "all",
            "coordination": True,
            "bias": {"form": "clamp"},
            "row_init": embedder,
        }
    )
    assert preset.model_dump(exclude={"preset"}) == written.model_dump(exclude={"preset"})
    assert preset.digest() == written.digest()
    assert preset.card_settings() == written.card_settings()
    assert (preset.public_fraction, preset.row_negatives, preset.weight_decay) == (0.0, 0.0, 0.0)
    assert (preset.coordination.enabled, preset.bias.enabled) == (True, True)


def test_what_is_written_beside_the_preset_wins(job: dict[str, Any]) -> None:
    own = DomainJob.from_dict(
        {
            **job,
            "preset": "paper",
            "kind": "lora",
            "layers": "3,5",
            "bias": False,
            "coordination": {"router_z_loss": 0.0},
            "row_init": "random",
        }
    )
    assert (own.kind, own.layers, own.row_init) == ("lora", "3,5", "random")
    assert (own.bias.enabled, own.coordination.enabled, own.coordination.router_z_loss) == (False, True, 0.0)
    without = DomainJob.from_dict({**job, "preset": "paper", "coordination": False, "row_init": "anchor"})
    assert not without.coordination.enabled
    # as plain data on its way to the owner's process, it stays what it is
    assert DomainJob.from_dict(own.model_dump(mode="json")) == own


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"preset": "paper"},
            "the preset 'paper' starts rows at an embedding of the domain: give row_init the folder of a "
            "SentenceTransformer (the paper's is GritLM-7B), or write 'anchor' or 'random' to depart from it",
        ),
        ({"preset": "best"}, "preset: input should be 'paper', given 'best'"),
        ({"bias": {"init": 0.5}}, "bias.init: input should be less than 0, given 0.5"),
        ({"bias": {"init": 0.0}}, "bias.init: input should be less than 0, given 0.0"),
        (
            {"preset": "paper", "row_init": "anchor", "bias": {"init": 0.5}},
            "bias.init: input should be less than 0, given 0.5",
        ),
    ],
)
def test_mistakes(job: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        DomainJob.from_dict({**job, **change})
    assert str(caught.value) == f"job has 1 problem:\n  - {problem}"
