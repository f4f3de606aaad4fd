"""Generation: rows with their own sets, samples, beams, threads, and caches that are refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from composer.loading import load
from composer.routing.state import RouterState, RouterStateLayer
from experts.errors import OptOutError

NEW = 6


def _generate(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
    options.setdefault("attention_mask", torch.ones_like(ids))
    result: torch.Tensor = model.generate(ids, **options)
    return result


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(OptOutError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(params=["lda", "learned"])
def model(pico: Any, request: pytest.FixtureRequest) -> Any:
    return pico.loaded("mixed", scorer=request.param)


def test_every_row_is_generated_as_if_alone(pico: Any, model: Any) -> None:
    ids, opt_out = pico.prompts(), [set(), {"acme"}, {"bob", "zoe"}, {"acme", "bob", "zoe"}]
    together = _generate(model, ids, opt_out=opt_out)
    for row, owners in enumerate(opt_out):
        alone = _generate(model, ids[row : row + 1], opt_out=owners)
        assert torch.equal(together[row : row + 1], alone)
    dense = _generate(pico.dense(), ids[3:])
    assert torch.equal(together[3:], dense), "with nobody left the base generates"


def test_left_padded_rows_are_generated_as_if_alone(pico: Any, model: Any) -> None:
    ids = pico.prompts()
    lengths = [24, 20, 13, 17]
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    opt_out = [set(), {"acme"}, {"zoe"}, set()]
    together = _generate(model, torch.where(mask.bool(), ids, 0), attention_mask=mask, opt_out=opt_out)
    for row, length in enumerate(lengths):
        alone = _generate(model, ids[row : row + 1, -length:], opt_out=opt_out[row])
        assert torch.equal(together[row, 24:], alone[0, length:])


def test_return_sequences_keep_their_rows_sets(pico: Any, model: Any) -> None:
    """Samples of a row that leaves everybody out are what the base samples."""
    ids = pico.prompts(rows=2)
    settings = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    torch.manual_seed(0)
    ours = _generate(model, ids, opt_out=[set(pico.owners)] * 2, **settings)
    torch.manual_seed(0)
    assert torch.equal(ours, _generate(pico.dense(), ids, **settings))
    torch.manual_seed(0)
    mixed = _generate(model, ids, opt_out=[set(), set(pico.owners)], **settings)
    assert mixed.shape == (6, 24 + NEW)
    assert torch.equal(mixed[3:], ours[3:])
    assert not torch.equal(mixed[:3], ours[:3])


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_keep_their_rows_sets(pico: Any, model: Any, beams: int) -> None:
    ids, opt_out = pico.prompts(rows=3), [{"acme"}, set(), {"acme", "bob", "zoe"}]
    together = _generate(model, ids, opt_out=opt_out, num_beams=beams)
    for row, owners in enumerate(opt_out):
        alone = _generate(model, ids[row : row + 1], opt_out=owners, num_beams=beams)
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[2:], _generate(pico.dense(), ids[2:], num_beams=beams))


def test_prompts_as_embeddings(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=2)
    embeds = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    got = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), opt_out=[{"acme"}, set()], **options
    )
    assert torch.equal(got, _generate(model, ids, opt_out=[{"acme"}, set()])[:, 24:])


def test_a_text_goes_on_under_the_same_sets(pico: Any, model: Any) -> None:
    ids, opt_out = pico.prompts(rows=2), [{"acme"}, set()]
    whole = _generate(model, ids, opt_out=opt_out)
    cache = DynamicCache(config=model.config)
    first = _generate(model, ids, opt_out=opt_out, past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
    rest = _generate(
        model, first, opt_out=opt_out, past_key_values=cache, max_new_tokens=NEW - 2, min_new_tokens=NEW - 2
    )
    assert torch.equal(rest, whole)


def test_f12_a_cache_of_another_set_is_refused(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=2)
    with torch.inference_mode():
        filled = model(ids, opt_out=[{"acme"}, set()], use_cache=True).past_key_values
        message = _refused(
            lambda: model(ids[:, :1], past_key_values=filled, opt_out=[{"acme"}, {"bob"}], use_cache=True)
        )
    assert message == (
        "This cache was filled under another set of allowed experts, so its keys and values hold traces of experts "
        "that this request may not use (filled under [[2, 3], [1, 2, 3]], asked for [[2, 3], [1, 3]]). Start again "
        "with an empty cache."
    )
    # a smaller set is no better: what is in the cache stays in it; and nothing was used up by the refusal
    with torch.inference_mode():
        again = model(ids[:, :1], past_key_values=filled, opt_out=[{"acme"}, set()], use_cache=True).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), opt_out=[{"acme"}, set()]).logits[:, -1:]
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-5)


def test_f12_generation_does_not_go_on_under_another_set(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=1)
    cache = DynamicCache(config=model.config)
    first = _generate(model, ids, past_key_values=cache)
    message = _refused(lambda: _generate(model, first, past_key_values=cache, opt_out={"acme"}))
    assert message == (
        "This cache was filled under another set of allowed experts, so its keys and values hold traces of experts "
        "that this request may not use (filled under [[1, 2, 3]], asked for [[2, 3]]). Start again with an empty "
        "cache."
    )


def test_f12_a_foreign_cache_is_refused(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=1)
    with torch.inference_mode():
        foreign = pico.dense()(ids, use_cache=True).past_key_values
        message = _refused(lambda: model(ids[:, :1], past_key_values=foreign, use_cache=True))
    assert message == (
        "This cache was not filled by a composed model, so nothing tells which experts wrote it. Start with an empty "
        "cache."
    )


def test_f12_a_cache_of_another_composition_is_refused(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=1)
    other = load(pico.composed("mixed", scorer="learned"), opt_out={"acme"})
    with torch.inference_mode():
        filled = other(ids, use_cache=True).past_key_values
        message = _refused(lambda: model(ids[:, :1], past_key_values=filled, use_cache=True))
    assert message == (
        f"This cache was filled by another composition ({other.membership.digest[:12]}, this one is "
        f"{model.membership.digest[:12]}). Start again with an empty cache."
    )


def test_an_emptied_cache_takes_another_set(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=2)
    with torch.inference_mode():
        cache = model(ids, opt_out={"acme"}, use_cache=True).past_key_values
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        got = model(ids, opt_out={"bob"}, past_key_values=cache, use_cache=True).logits
        assert torch.equal(got, model(ids, opt_out={"bob"}).logits)


def test_threads_do_not_see_each_others_sets(pico: Any, model: Any) -> None:
    """Two threads with different sets, many times over, give what they give one after the other."""
    requests = [({"acme"}, pico.prompts(seed=1)), ({"bob", "zoe"}, pico.prompts(seed=2))]
    expected = [_generate(model, ids, opt_out=owners) for owners, ids in requests]
    start = threading.Barrier(2)
    failures: list[str] = []

    def serve(number: int) -> None:
        owners, ids = requests[number]
        start.wait()
        for _ in range(4):
            try:
                if not torch.equal(_generate(model, ids, opt_out=owners), expected[number]):
                    failures.append(f"thread {number} got something else")
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=serve, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# The router's state among the layers of a cache


def _state() -> RouterState:
    state = RouterState(composition="x", allowed=torch.tensor([[True, False], [True, True]]))
    state.sums[3] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    state.seen[3] = torch.tensor([5.0, 6.0])
    return state


def test_rows_are_reordered_repeated_and_selected_together() -> None:
    for call, rows in {
        "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }.items():
        state = _state()
        getattr(RouterStateLayer(state, is_sliding=False), call)(rows[0])
        before = _state()
        assert torch.equal(state.allowed, before.allowed[rows[1]]), call
        assert torch.equal(state.sums[3], before.sums[3][rows[1]]), call
        assert torch.equal(state.seen[3], before.seen[3][rows[1]]), call


def test_positions_cannot_be_taken_out_of_a_mean() -> None:
    layer = RouterStateLayer(_state(), is_sliding=False)
    assert not layer.is_croppable
    assert _refused(lambda: layer.crop(-1)) == (
        "A running-mean context cannot take positions back (assisted decoding does). Compose with `context: token`, "
        "or decode without an assistant."
    )
    layer.reset()
    assert layer.is_croppable
    layer.crop(-1)


def test_long_lists_of_sets_are_cut_short() -> None:
    filled = RouterState(composition="x", allowed=torch.ones(6, 2, dtype=torch.bool))
    message = _refused(lambda: filled.check(composition="x", allowed=torch.zeros(6, 2, dtype=torch.bool)))
    assert "(filled under [[1], [1], [1], [1], '...'], asked for [[], [], [], [], '...'])" in message


def test_no_warning_reaches_the_user(pico: Any, model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _generate(model, pico.prompts(rows=1), opt_out={"acme"})
