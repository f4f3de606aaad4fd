"""Attribution: Shapley's axioms, a brute-force oracle, and values of models loaded without the others."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.attribution import (
    Attribution,
    AttributionError,
    attribute,
    log_likelihoods,
    shapley,
    subsets,
    tokenize,
)


def by_orders(value: dict[frozenset[str], float], owners: list[str]) -> dict[str, float]:
    """The definition: the mean gain that an owner brings, over every order in which owners can join."""
    gains = {owner: [] for owner in owners}
    for order in itertools.permutations(owners):
        inside: frozenset[str] = frozenset()
        for owner in order:
            gains[owner].append(value[inside | {owner}] - value[inside])
            inside |= {owner}
    return {owner: math.fsum(some) / len(some) for owner, some in gains.items()}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shapley_is_the_mean_over_orders(n: int) -> None:
    draw = random.Random(n)
    owners = [f"o{i}" for i in range(n)]
    value = {some: draw.uniform(-50, 0) for some in subsets(owners)}
    assert len(value) == 2**n
    result = shapley(value, owners)
    assert result == pytest.approx(by_orders(value, owners), abs=1e-12)
    assert sum(result.values()) == pytest.approx(value[frozenset(owners)] - value[frozenset()])


def test_shapley_of_a_known_game() -> None:
    """Gloves: one owner has a left one, two have a right one, and only a pair is worth 1: 4/6, 1/6, 1/6."""
    value = {some: float("left" in some and len(some) > 1) for some in subsets(["left", "r1", "r2"])}
    assert shapley(value, ["left", "r1", "r2"]) == pytest.approx({"left": 4 / 6, "r1": 1 / 6, "r2": 1 / 6})


def _request(pico: Any) -> tuple[list[int], int]:
    return pico.prompts(rows=4, length=20)[3].tolist(), 8


def _alone(pico: Any, folder: Any, ids: list[int], given: int, inside: frozenset[str]) -> float:
    """The log-likelihood from a model loaded without the others, through transformers' own loss."""
    from composer.loading import load

    model = load(folder, opt_out=set(pico.owners) - inside)
    row = torch.tensor([ids])
    labels = row.clone()
    labels[:, :given] = -100
    with torch.inference_mode():
        return -float(model(row, labels=labels).loss) * (len(ids) - given)


@pytest.mark.parametrize("scorer", ["lda", "learned"])
def test_against_models_that_were_loaded_apart(pico: Any, scorer: str) -> None:
    ids, given = _request(pico)
    model, folder = pico.loaded("mixed", scorer=scorer), pico.composed("mixed", scorer=scorer)
    owners = list(pico.owners)
    value = {inside: _alone(pico, folder, ids, given, inside) for inside in subsets(owners)}
    every = frozenset(owners)
    seen = []
    result = attribute(model, ids, given, progress=lambda *done: seen.append(done))
    assert seen == [(8, 8)]
    assert result.owners == tuple(owners)
    assert result.tokens == 12
    assert result.with_all == pytest.approx(value[every], abs=1e-4)
    assert result.with_none == pytest.approx(value[frozenset()], abs=1e-4)
    assert result.shapley == pytest.approx(by_orders(value, owners), abs=1e-4)
    assert result.leave_one_out == pytest.approx(
        {owner: value[every] - value[every - {owner}] for owner in owners}, abs=1e-4
    )
    assert sum(result.shapley.values()) == pytest.approx(result.with_all - result.with_none, abs=1e-9)
    assert max(map(abs, result.shapley.values())) > 0.01  # there is something to attribute


def test_mass_is_that_of_a_trace(pico: Any) -> None:
    from composer.trace import RoutingTrace

    ids, given = _request(pico)
    model = pico.loaded("mixed", scorer="learned")
    with RoutingTrace(model) as trace, torch.inference_mode():
        model(torch.tensor([ids[:-1]]))
    result = attribute(model, ids, given, methods=["mass"])
    assert result.mass == trace.mass()
    assert (result.leave_one_out, result.shapley) == (None, None)


def test_batches_do_not_matter(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.attribution as module

    ids, given = _request(pico)
    model = pico.loaded("mixed")
    at_once = log_likelihoods(model, ids, given, subsets(pico.owners))
    monkeypatch.setattr(module, "MAX_LOGIT_BYTES", 1)
    seen = []
    apart = log_likelihoods(model, ids, given, subsets(pico.owners), progress=lambda *done: seen.append(done))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert apart == pytest.approx(at_once, abs=1e-4)


def _composed_of(pico: Any, further: dict[str, Any], **router: Any) -> Any:
    """A model of acme's and zoe's experts and of owners made from a seed, layers and a bias of the router."""
    from composer.loading import load

    registry = pico.fresh_library()
    for owner, (seed, rank, layers, bias) in further.items():
        artifacts = pico.artifacts(seed=seed, layers=layers)
        if bias is not None:
            for layer in layers:
                artifacts.tensors[f"row.{layer}.bias"] = np.array([bias], dtype="f4")
        raw = pico.write_lora(pico.scratch("raw"), seed=seed, r=rank, layers_to_transform=list(layers))
        registry.register(pico.pack(raw, name=f"{owner}/low", artifacts=artifacts))
    experts = ["acme/low", "zoe/low", *(f"{owner}/low" for owner in further)]
    return load(pico.compose(pico.manifest(experts=experts, **router), registry=registry))


def test_twins_share_alike(pico: Any) -> None:
    """Symmetry: an owner with the very expert and routing artefacts of another."""
    seed, rank, layers = 1, 2, (1, 2, 3)  # acme's
    model = _composed_of(pico, {"bea": (seed, rank, layers, None)}, scorer="learned", top_k=2)
    ids, given = _request(pico)
    result = attribute(model, ids, given)
    assert result.shapley["acme"] == pytest.approx(result.shapley["bea"], abs=1e-5)
    assert result.leave_one_out["acme"] == pytest.approx(result.leave_one_out["bea"], abs=1e-5)
    assert abs(result.shapley["acme"]) > 1e-3
    assert abs(result.shapley["acme"] - result.shapley["zoe"]) > 1e-3


def test_who_is_never_chosen_gets_nothing(pico: Any) -> None:
    """Null player: an expert whose router row always loses."""
    model = _composed_of(pico, {"mute": (2, 3, (2, 3), -1e4)}, scorer="learned", top_k=1)
    ids, given = _request(pico)
    result = attribute(model, ids, given)
    assert result.mass["mute"] == 0
    assert result.leave_one_out["mute"] == pytest.approx(0, abs=1e-5)
    assert result.shapley["mute"] == pytest.approx(0, abs=1e-5)
    assert max(map(abs, result.shapley.values())) > 1e-3


class _Owners:
    """Stands for a model of that many owners."""

    def __init__(self, number: int) -> None:
        self.owners = tuple(f"owner{i}" for i in range(number))


def test_too_many_owners_are_refused() -> None:
    with pytest.raises(AttributionError) as caught:
        attribute(_Owners(9), [1, 2, 3], 1)
    assert str(caught.value) == (
        "Exact Shapley values run the model for every subset of the owners, here 512 for 9 owners; at most 8 owners "
        "are allowed. Leave owners out, or use the methods mass and leave-one-out."
    )


def test_nobody_to_attribute_to() -> None:
    with pytest.raises(AttributionError) as caught:
        attribute(_Owners(0), [1, 2, 3], 1)
    assert str(caught.value) == "This model has no owners left, so there is nobody to attribute to."


def test_what_is_given(tokenizer: Any) -> None:
    whole, given = tokenize(tokenizer, "abc", "def")
    assert (whole, given) == (tokenizer("abcdef").input_ids, 3)
    assert tokenize(tokenizer, "abc", None) == (tokenizer("abc").input_ids, 1)


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ("", "x", "The prompt is empty. Give at least one character."),
        ("x", "", "The continuation is empty. Give at least one character."),
        ("x", None, "The prompt has 1 tokens, and the first one is only given. Give a longer prompt, or a "
         "continuation."),
    ],
)  # fmt: skip
def test_nothing_to_attribute(tokenizer: Any, prompt: str, continuation: str | None, message: str) -> None:
    with pytest.raises(AttributionError) as caught:
        tokenize(tokenizer, prompt, continuation)
    assert str(caught.value) == message


def test_result_is_frozen() -> None:
    result = Attribution(owners=("a",), tokens=1, with_all=0.0, with_none=0.0)
    with pytest.raises(AttributeError):
        result.tokens = 2
