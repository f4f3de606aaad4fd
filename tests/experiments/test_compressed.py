"""Owners' full experts made low-rank: a third of the bytes, most of what was learned, and registered once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.compression import CompressionError
from pipelines.evaluate import measure
from pipelines.experiments import Experiment
from pipelines.experiments.compressed import compressed_experts
from pipelines.experiments.world import Texts, World


@pytest.fixture(scope="module")
def world(tiny: Experiment, tiny_texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> World:
    longer = {**tiny.to_dict()["experts"], "steps": 20}
    experiment = Experiment.from_dict({**tiny.to_dict(), "experts": longer})
    return World(experiment, tiny_texts, folder=tmp_path_factory.mktemp("compressed"), seed=0)


def _means(world: World, experts: dict[str, str], name: str) -> dict[str, float]:
    model = world.compose(name, list(experts.values()), {"top_k": 2})
    return {
        domain: score.nll for domain, score in measure(model, world.windows, batch_size=8).domains.items()
    }


def test_a_third_of_the_bytes_keeps_most_of_what_was_learned(world: World) -> None:
    full = world.train("plain")
    told: list[str] = []
    world.tell = told.append
    low = compressed_experts(world, full, rank=6)
    assert low == {"python": "python-owner/rank-6", "icd10": "icd10-owner/rank-6"}

    def bytes_of(reference: str, file: str) -> int:
        return world.registry.files(world.registry.expert(reference))[file].stat().st_size

    for domain, reference in low.items():
        record = world.registry.expert(reference)
        assert (record.owner, record.kind) == (f"{domain}-owner", "lora")
        share = bytes_of(reference, "adapter_model.safetensors") / bytes_of(full[domain], "ffn.safetensors")
        assert share < 1 / 3 + 0.05  # names of tensors weigh something at this size
    anchor = measure(world.anchor(), world.windows, batch_size=8).domains
    with_full, with_low = _means(world, full, "full"), _means(world, low, "low")
    for domain in full:
        gained = anchor[domain].nll - with_full[domain]
        assert gained > 0.1
        assert anchor[domain].nll - with_low[domain] > 0.8 * gained
    assert with_low != with_full
    before = len(list(world.registry.experts()))
    told.clear()
    assert compressed_experts(world, full, rank=6) == low
    assert (len(list(world.registry.experts())), told) == (before, [])


def test_a_rank_that_takes_too_much(world: World, tmp_path: Path) -> None:
    full = world.train("plain")
    with pytest.raises(CompressionError) as caught:
        compressed_experts(world, full, rank=16)
    assert str(caught.value) == (
        "rank 16 takes 75% of the bytes of python-owner/plain; the low-rank arm may take a third. Set a rank of at "
        "most 7."
    )
    assert not any(record.name.endswith("rank-16") for record in world.registry.experts())
