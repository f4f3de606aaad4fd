"""The proof of an opt-out: that it passes, and that it fails on models that leak."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.blocks.low_rank import LowRankFFN
from composer.routing.router import Router
from composer.routing.scorers.lda import LDAScorer
from composer.routing.selectors.topk import TopK
from composer.verify import TOLERANCE, verify_optout
from experts.errors import OptOutError, UnknownNameError


@pytest.mark.parametrize(("block", "scorer"), [("low_rank", "lda"), ("stacked", "learned"), ("mixed", "lda")])
def test_it_passes(pico: Any, block: str, scorer: str) -> None:
    told: list[str] = []
    rows = verify_optout(
        pico.composed(block, scorer=scorer), prompts=["ABCDEFGHIJ", "x"], progress=told.append
    )
    assert [(row.owner, row.door) for row in rows] == [
        (owner, door) for owner in pico.owners for door in ("build", "load", "request")
    ]
    assert told == [f"{row.owner}: {row.door}" for row in rows]
    for row in rows:
        assert row.passed
        assert row.prompts == 5, "four random ones and the text that is long enough"
        assert row.max_abs_diff <= TOLERANCE
        if row.door != "request":
            assert row.bit_identical
            assert row.max_abs_diff == 0.0


def test_one_owner(pico: Any) -> None:
    rows = verify_optout(pico.composed(), owner="bob")
    assert [row.door for row in rows] == ["build", "load", "request"]
    assert {row.owner for row in rows} == {"bob"}


def test_it_leaves_nothing_beside_the_folder(pico: Any) -> None:
    folder = pico.composed()
    before = sorted(folder.parent.iterdir())
    verify_optout(folder, owner="acme")
    assert sorted(folder.parent.iterdir()) == before


def _request(folder: Path) -> Any:
    build, load, request = verify_optout(folder, owner="acme")
    assert build.passed
    assert load.passed
    return request


def test_it_fails_where_the_mask_is_ignored(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that lets everybody in."""
    real = Router.forward

    def everybody(self: Router, context: Any, *, trace: bool = False) -> Any:
        from dataclasses import replace

        from composer.routing.types import AllowedGroup

        group = AllowedGroup(experts=tuple(range(self.num_experts + 1)))
        return real(self, replace(context, groups=(group,)), trace=trace)

    monkeypatch.setattr(Router, "forward", everybody)
    request = _request(pico.composed())
    assert not request.passed
    assert not request.bit_identical
    assert request.max_abs_diff > 100 * TOLERANCE


def test_it_fails_where_the_gate_still_knows_them(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that was solved with the owner and masked afterwards: a leak of one number per expert."""
    real = LDAScorer.discriminants

    def with_everybody(self: LDAScorer, experts: Any, device: torch.device) -> Any:
        weights, biases = real(self, tuple(sorted(self.statistics)), device)
        return weights[list(experts)], biases[list(experts)]

    monkeypatch.setattr(LDAScorer, "discriminants", with_everybody)
    request = _request(pico.composed())
    assert not request.passed
    assert request.max_abs_diff > TOLERANCE


def test_it_fails_on_nan(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights multiplied by zero let NaN through, which a maximum alone would not show."""
    real = LowRankFFN.forward

    def dense(self: LowRankFFN, x: Any, indices: Any, weights: Any, **more: Any) -> Any:
        out = real(self, x, indices, weights, **more)
        absent = torch.full_like(out, float("nan")) if len(self.experts) == 3 else torch.zeros_like(out)
        return out + absent * 0.0

    monkeypatch.setattr(LowRankFFN, "forward", dense)
    request = _request(pico.composed())
    assert not request.passed
    assert request.max_abs_diff == float("inf")


def test_it_fails_where_a_slot_is_dropped(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing first and leaving out afterwards: the freed slot goes to nobody."""
    real = TopK.forward

    def one_less(self: TopK, logits: torch.Tensor) -> Any:
        positions, weights = real(self, logits)
        return (positions, weights) if logits.shape[1] == 4 else (positions[:, :1], weights[:, :1])

    folder = pico.composed()
    from composer.loading import load

    whole = load(folder)
    expected = load(folder, opt_out={"acme"})(pico.prompts()).logits
    monkeypatch.setattr(TopK, "forward", one_less)
    assert (whole(pico.prompts(), opt_out={"acme"}).logits - expected).abs().max() > 100 * TOLERANCE


def test_mistakes(pico: Any) -> None:
    with pytest.raises(UnknownNameError) as caught:
        verify_optout(pico.composed(), owner="acne")
    assert str(caught.value) == "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, bob, zoe."
    folder = Path(shutil.copytree(pico.composed(), pico.scratch("mixed")))
    lock = json.loads((folder / "composition.json").read_text())
    (folder / "composition.json").unlink()
    (folder / "composition.json").write_text(json.dumps({**lock, "optout_class": "retrain"}))
    with pytest.raises(OptOutError) as refused:
        verify_optout(folder)
    assert str(refused.value) == (
        f"{folder} is of opt-out class 'retrain': no door promises the never-joined model."
    )
