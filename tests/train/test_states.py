"""The cut decoder against transformers' own forward, on five families."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.base import BaseDescription
from pipelines.train.states import SplitDecoder, StateCache

FAMILIES = ("llama", "qwen3", "olmo2", "gemma3", "gpt_neox")


@pytest.fixture(params=FAMILIES)
def cut(request, anchor):
    """A function of the layer: the decoder cut there."""
    folder = anchor(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    prefix = BaseDescription.from_folder(folder).layers_prefix
    return lambda first: SplitDecoder(model, layers_prefix=prefix, first=first)


@pytest.fixture(scope="module")
def ids():
    # longer than the pico anchors' sliding windows, so that a confused mask or rotary table shows
    return torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_parts_make_the_whole(cut, ids, first):
    split = cut(first)
    with torch.no_grad():
        whole = split.model(input_ids=ids, output_hidden_states=True)
        states = split.lower(ids)
        upper = split.logits(ids, states=states)
    torch.testing.assert_close(states, whole.hidden_states[first], rtol=0, atol=0)
    torch.testing.assert_close(upper, whole.logits, rtol=0, atol=0)
    assert split.agrees(ids)


def test_the_upper_part_sees_only_the_stored_states(cut, ids):
    split = cut(2)
    with torch.no_grad():
        states = split.lower(ids)
        assert torch.equal(
            split.logits(ids, states=states), split.logits(torch.zeros_like(ids), states=states)
        )


def test_the_model_is_whole_again_afterwards(cut, ids):
    split = cut(2)
    with torch.no_grad():
        before = split.model(input_ids=ids).logits
        split.logits(ids, states=split.lower(ids))
        assert torch.equal(split.model(input_ids=ids).logits, before)


def test_a_family_that_does_not_fit_is_noticed(cut, ids):
    split = cut(2)
    embed = split.model.get_input_embeddings()
    # what a family would do that adds the embeddings to a later layer's input
    layer = split.layers[2]
    plain = layer.forward
    layer.forward = lambda hidden_states, *a, **k: plain(hidden_states + embed.recent, *a, **k)
    embed.register_forward_hook(lambda m, i, out: setattr(m, "recent", out))
    assert split.agrees(ids)
    split.lower = lambda ids: torch.zeros(*ids.shape, embed.weight.shape[1])
    assert not split.agrees(ids)


def test_states_beyond_the_limit_are_computed_again(cut, ids):
    split = cut(2)
    expected = split.lower(ids)
    cache = StateCache(split, ids, limit_bytes=2 * expected[0].numel() * expected.element_size())
    parts = [(part, states.clone()) for part, states in cache.fill(batch_size=2)]
    assert [part for part, _ in parts] == [slice(0, 2), slice(2, 3)]
    assert cache.filled == 2
    calls = []
    lower = split.lower
    split.lower = lambda ids: calls.append(len(ids)) or lower(ids)
    assert torch.equal(cache.get(torch.tensor([1, 0])), expected[[1, 0]])
    assert calls == []
    torch.testing.assert_close(cache.get(torch.tensor([2, 0])), expected[[2, 0]])
    assert calls == [2]


def test_an_unusable_cache_sends_everything_through_the_whole_model(cut, ids):
    cache = StateCache(cut(2), ids, limit_bytes=1 << 30, usable=False)
    list(cache.fill(batch_size=2))
    assert cache.get(torch.tensor([0])) is None
