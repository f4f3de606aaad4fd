"""Parameter counts: those published for BAM and BTX, from the plan's arithmetic and from the model itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from composer.configuration import ComposedConfig
from composer.manifest import AttentionSpec, Manifest
from composer.model import ComposedForCausalLM
from composer.recipes import RECIPES
from composer.routing.router import Router
from composer.routing.scorers.random import RandomScorer
from composer.routing.selectors.topk import TopK
from composer.upcycling.assembly import Seats, install
from experts.base import BaseDescription

WIDTH, DEPTH, EXPERTS = 1024, 6, 4
ROUTER = WIDTH * EXPERTS * DEPTH
"""Rows of one router in every layer."""


@pytest.fixture(scope="module")
def published() -> tuple[Any, BaseDescription]:
    """The paper's 590 M seed, a parallel block with one norm, without any memory for its weights."""
    from transformers import AutoModelForCausalLM, CohereConfig

    config = CohereConfig(
        vocab_size=256000,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=DEPTH,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    record = {
        "format_version": 1,
        "config": config.to_dict(),
        "fingerprint": "0" * 64,
        "tensors": {name: ["F32", list(tensor.shape)] for name, tensor in model.state_dict().items()},
    }
    return config, BaseDescription.from_json(json.dumps(record))


def test_the_seed(published: Any) -> None:
    _, base = published
    assert sum(torch.Size(spec.shape).numel() for spec in base.tensors.values()) == 587_209_728


@pytest.mark.parametrize(
    ("recipe", "kv", "total", "active_without_routers"),
    [
        ("btx", None, 700_480_512, 587_209_728),
        ("bam", "own", 776_002_560, 662_707_200),
        # the paper's table gives 612,400,128, without the shared keys and values, and counts one router of the two
        ("bam", "shared", 738_253_824, 624_983_040 - ROUTER),
    ],
)
def test_published_counts(
    published: Any, recipe: str, kv: Any, total: int, active_without_routers: int
) -> None:
    config, base = published
    upcycle = {} if kv is None else {"upcycle": {"attention": {"kv": kv}}}
    written = {"name": "m", "recipe": recipe, "base": "seed", "experts": ["a/x", "b/x", "c/x"], **upcycle}
    maker = RECIPES.load(recipe)()
    manifest = maker.expand(Manifest.from_dict({**written, "router": {"top_k": 1}}))
    counted = maker.parameters(manifest=manifest, base=base, experts=[None] * 3)
    routers = 1 if kv is None else 2
    assert counted == (total, active_without_routers + routers * ROUTER)
    assert _built(config, base, None if kv is None else AttentionSpec(kv=kv)) == total


def _built(config: Any, base: BaseDescription, attention: AttentionSpec | None) -> int:
    """Count what a model of this make has."""
    names = dict(enumerate(["anchor", "a/x", "b/x", "c/x"]))

    def router(layer: int) -> Router:
        rows = torch.empty(EXPERTS, WIDTH, device="meta")
        scorer = RandomScorer(ids=tuple(names), rows=rows)
        return Router(scorer=scorer, selector=TopK(top_k=1), context="token", num_experts=3)

    with torch.device("meta"):
        model = ComposedForCausalLM(ComposedConfig(base_config=config))
    seats = Seats(names=names, sources={1: None, 2: None, 3: None})
    install(model, base, seats, attention, ffn_router=router, attention_router=router)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("btx", {}),
        ("btx", {"upcycle": {"seed_expert": False}}),
        ("bam", {"upcycle": {"attention": {"kv": "own"}}}),
        ("bam", {"upcycle": {"attention": {"kv": "shared"}, "seed_expert": False}}),
        ("sparse_upcycle", {"experts": ("acme/dense",), "upcycle": {"copies": 3}}),
    ],
)
def test_the_plan_counts_what_is_loaded(pico: Any, loaded: Any, recipe: str, settings: Any) -> None:
    from composer.planning import plan

    manifest = pico.manifest("dense", recipe=recipe, **settings)
    planned = plan(manifest, pico.dense_library())
    model = loaded(recipe, **settings)
    assert planned.parameters_total == sum(parameter.numel() for parameter in model.parameters())
    assert planned.parameters_active < planned.parameters_total
