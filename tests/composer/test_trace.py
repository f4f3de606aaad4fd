"""The recorder of routing decisions."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from composer.trace import RoutingTrace


@pytest.fixture(params=["lda", "learned"])
def model(pico: Any, request: pytest.FixtureRequest) -> Any:
    return pico.loaded("mixed", scorer=request.param)


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
    assert trace.mass() == {"anchor": 0.0, "acme": 0.0, "bob": 0.0, "zoe": 0.0}
