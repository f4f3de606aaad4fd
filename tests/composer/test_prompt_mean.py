"""The prompt's mean against a loop over positions, and in a model that generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer.routing.contexts import prompt_mean
from composer.routing.state import RouterState
from composer.trace import RoutingTrace


def _loop(features: torch.Tensor, mask: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One position after the other: the mean of the prompt's tokens so far, without the row's first one."""
    means, counts = torch.zeros_like(features), torch.ones(features.shape[:2])
    for row in range(features.shape[0]):
        met: list[torch.Tensor] = []
        for t in range(features.shape[1]):
            if mask[row, t]:
                if t < end or len(met) < 2:
                    met.append(features[row, t])
                used = met[1:] or met[:1]
                means[row, t] = torch.stack(used).mean(0)
                counts[row, t] = len(used)
    return means, counts


def _features(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(0))


def _state(end: int | None) -> RouterState:
    state = RouterState(composition="x", allowed=torch.ones(3, 2, dtype=torch.bool))
    if end is not None:
        state.end_prompt_at(end)
    return state


MASKS = {
    "nothing padded": torch.ones(3, 9, dtype=torch.bool),
    "padded left": torch.arange(9) >= torch.tensor([[0], [3], [4]]),
    "padded right": torch.arange(9) < torch.tensor([[9], [5], [1]]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("end", [1, 2, 5, 9])
@pytest.mark.parametrize("cuts", [(), (5,), (1, 2), (3, 4, 6, 8)])
def test_any_split_into_cached_pieces_is_the_loop(name: str, end: int, cuts: tuple[int, ...]) -> None:
    """A left-padded row of the third kind has one token in a prompt of 5: the next one joins it."""
    mask, features, state = MASKS[name], _features(), _state(end)
    features[~mask] = float("nan")
    given = None if mask.all() else mask
    pieces = [
        prompt_mean(part, layer=7, token_mask=part_mask if given is not None else None, state=state)
        for part, part_mask in zip(
            torch.tensor_split(features, list(cuts), dim=1),
            torch.tensor_split(mask, list(cuts), dim=1),
            strict=True,
        )
    ]
    expected, counts = _loop(features, mask, end)
    torch.testing.assert_close(torch.cat([means for means, _ in pieces], 1)[mask], expected[mask])
    assert torch.equal(torch.cat([n for _, n in pieces], 1)[mask], counts[mask])


def test_all_is_prompt_where_nobody_says_otherwise() -> None:
    features, mask = _features(), MASKS["nothing padded"]
    expected, counts = _loop(features, mask, 9)
    for state in (None, _state(None)):
        means, n = prompt_mean(features, layer=0, token_mask=None, state=state)
        torch.testing.assert_close(means, expected)
        assert torch.equal(n, counts)


def test_a_prompt_that_cannot_be_continued() -> None:
    state = _state(4)
    prompt_mean(_features(), layer=0, token_mask=None, state=state)
    state.end_prompt_at(4)
    with pytest.raises(ValueError, match="cache") as caught:
        state.end_prompt_at(9)
    assert str(caught.value) == (
        "This cache holds 9 positions that were routed by a prompt of 4; they cannot be continued as a prompt of 9. "
        "Start again with an empty cache, or compose with `context: running_mean`."
    )
    state.clear()
    state.end_prompt_at(9)
    with pytest.raises(ValueError, match=r"^prompt_length must be at least 1, got 0\.$"):
        state.end_prompt_at(0)
    # all that was seen so far is prompt under either length
    prefix = _state(None)
    prompt_mean(_features(length=6), layer=0, token_mask=None, state=prefix)
    prefix.end_prompt_at(8)


@pytest.fixture(params=["lda", "learned"])
def model(pico: Any, request: pytest.FixtureRequest) -> Any:
    return pico.loaded("mixed", scorer=request.param, context="prompt_mean")


NEW = 6


def _generate(model: Any, ids: torch.Tensor, **settings: Any) -> Any:
    return model.generate(
        ids,
        **{"attention_mask": torch.ones_like(ids), **settings},
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def test_the_prompt_decides_about_what_is_generated(pico: Any, model: Any) -> None:
    """At the gate's layer the choice stands still after the prompt; under a running mean it moves."""
    ids = pico.prompts()
    moved = {}
    for context in ("prompt_mean", "running_mean"):
        scorer = "lda" if model.gate is not None else "learned"
        other = pico.loaded("mixed", scorer=scorer, context=context)
        with RoutingTrace(other, keep=True) as trace, torch.inference_mode():
            _generate(other, ids)
        first, *later = (d.logits for d, _ in trace.decisions[min(trace.decisions)])
        last = first.view(len(ids), ids.shape[1], -1)[:, -1]
        assert len(later) == NEW - 1
        moved[context] = max(float((logits - last).nan_to_num().abs().max()) for logits in later)
    assert moved["prompt_mean"] < 1e-5 < 1e-3 < moved["running_mean"]


def test_cached_decoding_is_one_pass_that_is_told_the_prompt(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    out = _generate(model, ids)
    plain = _generate(model, ids, use_cache=False)
    assert torch.equal(out.sequences, plain.sequences)
    expected = torch.stack(out.logits, dim=1)
    sequences = out.sequences[:, :-1]
    with torch.inference_mode():
        told = model(sequences, prompt_length=ids.shape[1]).logits[:, -NEW:]
        untold = model(sequences).logits[:, -NEW:]
    torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)
    assert (untold - expected).abs().max() > 1e-4


def test_left_padded_rows_are_generated_as_if_alone(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    lengths = [24, 20, 1, 2]
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    together = _generate(model, torch.where(mask.bool(), ids, 0), attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = _generate(model, ids[row : row + 1, -length:])
        for one, many in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], many[row], rtol=0, atol=1e-5)


def test_a_second_turn_needs_an_empty_cache(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    out = _generate(model, ids)
    longer = torch.cat([out.sequences, ids[:, :3]], dim=1)
    with pytest.raises(ValueError, match="cache") as caught:
        _generate(model, longer, past_key_values=out.past_key_values)
    assert str(caught.value) == (
        f"This cache holds {24 + NEW - 1} positions that were routed by a prompt of 24; they cannot be continued as a "
        f"prompt of {24 + NEW + 3}. Start again with an empty cache, or compose with `context: running_mean`."
    )


def test_a_cached_prefix_of_the_prompt_may_be_continued(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    expected = _generate(model, ids)
    with torch.inference_mode():
        prefix = model(ids[:, :10], use_cache=True).past_key_values
    got = _generate(model, ids, past_key_values=prefix)
    assert torch.equal(got.sequences, expected.sequences)
