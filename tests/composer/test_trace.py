"""The recorder of routing decisions."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch

from composer.routing.types import RoutingDecision
from composer.trace import RoutingTrace


@pytest.fixture(params=["lda", "learned"])
def model(pico: Any, request: pytest.FixtureRequest) -> Any:
    return pico.loaded("mixed", scorer=request.param)


BY_ID = ["anchor", "acme", "bob", "zoe"]


def _run(model: Any, ids: torch.Tensor, **settings: Any) -> RoutingTrace:
    with RoutingTrace(model, keep=True) as trace, torch.inference_mode():
        model(ids, **settings)
    return trace


def test_shares_are_the_sums_of_the_weights(pico: Any, model: Any) -> None:
    trace = _run(model, pico.prompts())
    shares = dict.fromkeys(["anchor", "acme", "bob", "zoe"], 0.0)
    for decisions in trace.decisions.values():
        for decision, _ in decisions:
            for ids, weights in zip(decision.indices.tolist(), decision.weights.tolist(), strict=True):
                for expert, weight in zip(ids, weights, strict=True):
                    shares[list(shares)[expert]] += weight
    total = sum(shares.values())
    assert trace.mass() == pytest.approx({name: share / total for name, share in shares.items()})
    assert sum(trace.mass().values()) == pytest.approx(1.0, abs=1e-12)
    by_layer = trace.mass_by_layer()
    assert set(by_layer) == ({1} if len(by_layer) == 1 else {1, 2, 3})
    for layer in by_layer.values():
        assert list(layer) == ["anchor", "acme/low", "bob/full", "zoe/low"]
        assert sum(layer.values()) == pytest.approx(1.0, abs=1e-12)
    assert set(trace.tokens.values()) == {4 * 24.0}


def test_an_absent_owner_has_exactly_nothing(pico: Any, model: Any) -> None:
    whole = _run(model, pico.prompts()).mass()
    assert whole["bob"] > 0
    mass = _run(model, pico.prompts(), opt_out={"bob"}).mass()
    assert mass["bob"] == 0.0
    assert sum(mass.values()) == pytest.approx(1.0, abs=1e-12)
    assert _run(model, pico.prompts(), opt_out=set(pico.owners)).mass() == {
        "anchor": 1.0,
        "acme": 0.0,
        "bob": 0.0,
        "zoe": 0.0,
    }


def test_padding_is_not_counted(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    trace = _run(model, ids, attention_mask=mask, position_ids=positions)
    assert set(trace.tokens.values()) == {24.0 + 14.0}
    apart = [_run(model, ids[:1]), _run(model, ids[1:, 10:])]
    for layer, total in trace.weights.items():
        torch.testing.assert_close(
            total, apart[0].weights[layer] + apart[1].weights[layer], atol=1e-5, rtol=0
        )


def test_domains_go_to_their_owners(pico: Any) -> None:
    """Each owner's own text gives them more than the others' text does."""
    model = pico.loaded("mixed", scorer="lda")
    masses = [_run(model, pico.domain_tokens(number, rows=4, length=24)).mass() for number in range(1, 4)]
    for number, owner in enumerate(pico.owners):
        own = masses[number][owner]
        assert all(own > masses[other][owner] for other in range(3) if other != number)


def test_recording_changes_nothing_and_ends_with_the_block(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    with torch.inference_mode():
        plain = model(ids).logits
        with RoutingTrace(model) as trace:
            traced = model(ids).logits
        before = trace.mass()
        model(ids)
    assert torch.equal(plain, traced)
    assert trace.mass() == before
    assert trace.decisions == {}


def _by_hand(trace: RoutingTrace, owner_of: list[str]) -> tuple[dict[str, float], list[float], float]:
    """Who each token is sent to, who uses what, and how sure the router was: a loop over single tokens."""
    sent = dict.fromkeys(owner_of, 0)
    used = [0] * len(owner_of)
    tokens, entropy = 0, 0.0
    for decision, mask in itertools.chain.from_iterable(trace.decisions.values()):
        real = [True] * len(decision.indices) if mask is None else mask.flatten().tolist()
        for token, (ids, weights) in enumerate(
            zip(decision.indices.tolist(), decision.weights.tolist(), strict=True)
        ):
            if not real[token]:
                continue
            tokens += 1
            weight = dict.fromkeys(owner_of, 0.0)
            for expert, value in zip(ids, weights, strict=True):
                if expert >= 0:
                    weight[owner_of[expert]] += value
                    used[expert] += 1
            sent[max(weight, key=lambda owner: weight[owner])] += 1
            if decision.logits is not None:
                finite = [x for x in decision.logits[token].tolist() if x > -math.inf]
                normal = sum(math.exp(x - max(finite)) for x in finite)
                p = [math.exp(x - max(finite)) / normal for x in finite]
                entropy -= sum(value * math.log(value) for value in p if value)
    shares = {owner: count / tokens for owner, count in sent.items()}
    return shares, [count / tokens for count in used], entropy / tokens


CASES = {
    "whole": {},
    "without one": {"opt_out": {"bob"}},
    "row by row": {"opt_out": [set(), {"acme"}, {"acme", "zoe"}, {"acme", "bob", "zoe"}]},
    "nobody": {"opt_out": {"acme", "bob", "zoe"}},
    "padded": {"attention_mask": torch.ones(4, 24, dtype=torch.int64).tril(20)},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_sent_load_and_entropy_by_hand(pico: Any, model: Any, settings: dict[str, Any]) -> None:
    trace = _run(model, pico.prompts(), **settings)
    sent, used, entropy = _by_hand(trace, BY_ID)
    assert trace.sent() == pytest.approx(sent)
    assert sum(sent.values()) == pytest.approx(1.0)
    assert list(trace.load().values()) == pytest.approx(used)
    assert list(trace.load()) == ["anchor", "acme/low", "bob/full", "zoe/low"]
    assert trace.entropy() == pytest.approx(entropy, abs=1e-6)
    assert (entropy == 0) == (settings == CASES["nobody"])


def test_an_owners_experts_count_together(pico: Any) -> None:
    """Two halves of 0.3 outweigh one expert of 0.4; a tie goes to the lower id."""
    model = pico.loaded(experts=["acme/low", "acme/full", "zoe/low"], scorer="lda")
    names = list(model.expert_names)
    assert names == ["acme/full", "acme/low", "zoe/low"]
    trace = RoutingTrace(model)
    weights = torch.tensor([[0.3, 0.3, 0.4], [0.25, 0.25, 0.5], [0.2, 0.2, 0.6]])
    trace._record(1, RoutingDecision(indices=torch.tensor([[1, 2, 3]] * 3), weights=weights), None)
    assert trace.sent() == pytest.approx({"anchor": 0.0, "acme": 2 / 3, "zoe": 1 / 3})
    assert trace.mass() == pytest.approx({"anchor": 0.0, "acme": 0.5, "zoe": 0.5})


def test_indifference_is_the_logarithm(pico: Any) -> None:
    model = pico.loaded("mixed", scorer="lda")
    trace = RoutingTrace(model)
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, -math.inf, 2.0, -math.inf]])
    decision = RoutingDecision(
        indices=torch.zeros(2, 1, dtype=torch.int64), weights=torch.ones(2, 1), logits=logits
    )
    trace._record(1, decision, None)
    assert trace.entropy() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_threads_record_their_own(pico: Any, model: Any) -> None:
    results: dict[str, dict[str, float]] = {}

    def run(owner: str) -> None:
        results[owner] = _run(model, pico.prompts(), opt_out={owner}).mass()

    threads = [threading.Thread(target=run, args=(owner,)) for owner in ("acme", "zoe")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for owner in ("acme", "zoe"):
        assert results[owner] == _run(model, pico.prompts(), opt_out={owner}).mass()
        assert results[owner][owner] == 0.0


def test_nothing_recorded(model: Any) -> None:
    with RoutingTrace(model) as trace:
        pass
    assert trace.mass() == trace.sent() == {"anchor": 0.0, "acme": 0.0, "bob": 0.0, "zoe": 0.0}
    assert trace.load() == {"anchor": 0.0, "acme/low": 0.0, "bob/full": 0.0, "zoe/low": 0.0}
    assert math.isnan(trace.entropy())
