"""Attention experts: equal to the dense model where all are alike, and the same with and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from composer.hf import ComposedForCausalLM
from composer.layers.moa import MoALayer
from composer.loading import load
from composer.routing.state import RouterStateLayer

FAMILIES = ("llama", "qwen3", "olmo2", "cohere", "mistral")
TOLERANCE = 1e-5
OWN: dict[str, Any] = {"attention": {"kv": "own"}}
SHARED: dict[str, Any] = {"attention": {"kv": "shared"}}


def _through_the_cache(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits of a pass whose last eight tokens come one by one."""
    steps = []
    with torch.inference_mode():
        out = model(ids[:, :-8], past_key_values=cache, use_cache=True)
        steps.append(out.logits)
        for at in range(ids.shape[1] - 8, ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    return torch.cat(steps, dim=1)


CACHED = [
    *((family, upcycle) for family in (*FAMILIES, "gemma3_text") for upcycle in (OWN, SHARED)),
    ("gpt_neox", OWN),
    ("phi3", OWN),
]


@pytest.mark.parametrize(
    ("family", "upcycle"),
    CACHED,
    ids=[f"{family}-{upcycle['attention']['kv']}" for family, upcycle in CACHED],
)
def test_cached_equals_uncached(loaded: Any, family: str, upcycle: Any, ids: torch.Tensor) -> None:
    """Grouped queries, norms of queries and keys, norms behind the block, parallel blocks, windows of 8 positions.

    Also windows in some layers only (Gemma), and queries, keys and values in one matrix (GPT-NeoX, Phi-3).
    """
    model = loaded("bam", family=family, upcycle=upcycle)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(_through_the_cache(model, ids), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("upcycle", [OWN, SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_are_the_dense_model(
    pico: Any, twins: Any, family: str, upcycle: Any, ids: torch.Tensor
) -> None:
    """Whatever the routers say, as long as their weights sum to 1; the trunk is the mean of equal trunks."""
    registry, dense = twins(family)
    router = {"normalize": True, "top_k": 1, "options": {"seed": 3, "distribution": "normal"}}
    settings = {"upcycle": {**upcycle, "seed_expert": False}, **router}
    manifest = pico.manifest(
        "dense", recipe="bam", family=family, experts=["acme/twin", "bob/twin"], **settings
    )
    model = load(pico.compose(manifest, registry=registry))
    with torch.inference_mode():
        got, expected = model(ids).logits, dense(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_copies_of_one_model_are_that_model(pico: Any, loaded: Any, state: Any, ids: torch.Tensor) -> None:
    options = {"seed": 1, "distribution": "normal"}
    model = loaded("sparse_upcycle", experts=("acme/dense",), upcycle={"copies": 3}, options=options)
    dense = pico.network()
    dense.load_state_dict(state("acme"), strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=TOLERANCE)
    assert model.expert_names == ("acme/dense#1", "acme/dense#2")


def test_not_renormalised_top_1_is_scaled_by_its_probability(
    pico: Any, twins: Any, ids: torch.Tensor
) -> None:
    """As published: equal experts are *not* the dense model, since the FFN's answer is multiplied with p."""
    registry, dense = twins("llama")
    manifest = pico.manifest(
        "dense", recipe="bam", experts=["acme/twin", "bob/twin"], upcycle={"seed_expert": False}
    )
    model = load(pico.compose(manifest, registry=registry))
    probabilities, states = [], []
    layer = model.base.model.layers[0].mlp
    layer.router.register_forward_hook(lambda _m, _i, out: probabilities.append(out.weights))
    layer.register_forward_hook(lambda _m, i, out: states.append((i[0], out)))
    with torch.inference_mode():
        model(ids)
        (before, after), weight = states[0], probabilities[0]
        expected = weight.view(*ids.shape, 1) * dense.model.layers[0].mlp(before)
    assert weight.mean() < 0.9
    torch.testing.assert_close(after, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("upcycle", [OWN, SHARED], ids=["own", "shared"])
def test_a_layer_is_the_sum_of_its_experts(loaded: Any, upcycle: Any, ids: torch.Tensor) -> None:
    """Against the equation: every expert alone, times its softmax gate."""
    model = loaded("bam", upcycle={**upcycle, "trunk": "frozen"})
    seen: list[Any] = []
    layer = model.base.model.layers[1].self_attn

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        states = kwargs.pop("hidden_states")
        gates = torch.softmax(states @ layer.router.scorer.rows.t(), dim=-1)
        answers = [expert(states, **{**kwargs, "past_key_values": None})[0] for expert in layer.experts]
        seen.append((out[0], sum(gates[..., j, None] * answer for j, answer in enumerate(answers))))

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        model(ids, use_cache=False)
    handle.remove()
    torch.testing.assert_close(seen[0][0], seen[0][1], rtol=0, atol=TOLERANCE)


def test_the_caches(loaded: Any, ids: torch.Tensor) -> None:
    """A cache per expert and layer, expert by expert; one per layer where keys and values are shared."""
    with torch.inference_mode():
        own = loaded("bam", family="mistral", upcycle=OWN)(ids, use_cache=True).past_key_values
        shared = loaded("bam", family="mistral", upcycle=SHARED)(ids, use_cache=True).past_key_values
    attention = [layer for layer in own.layers if not isinstance(layer, RouterStateLayer)]
    assert len(attention) == 4 * 4
    assert len(shared.layers) == 4 + 1
    assert {type(layer).__name__ for layer in attention} == {"DynamicSlidingWindowLayer"}
    assert {layer.keys.shape for layer in attention} == {(4, 2, 7, 8)}
    assert not torch.equal(attention[0].keys, attention[4].keys)


@pytest.mark.parametrize(
    ("recipe", "upcycle"), [("btx", {}), ("bam", OWN), ("bam", SHARED)], ids=["btx", "own", "shared"]
)
def test_a_lazy_cache_and_a_static_one(loaded: Any, recipe: str, upcycle: Any, ids: torch.Tensor) -> None:
    from transformers import StaticCache

    model = loaded(recipe, upcycle=upcycle)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
    for cache in (DynamicCache(), StaticCache(config=model.base.config, max_cache_len=32)):
        torch.testing.assert_close(_through_the_cache(model, ids, cache), whole, rtol=0, atol=TOLERANCE)


def test_top_k_attention(loaded: Any, ids: torch.Tensor) -> None:
    model = loaded("bam", upcycle={"attention": {"kv": "own", "top_k": 2}, "trunk": "frozen"})
    gates: list[torch.Tensor] = []
    layer = next(module for module in model.modules() if isinstance(module, MoALayer))
    layer.router.register_forward_hook(lambda _m, _i, out: gates.append(out.weights))
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
    assert gates[0].shape == (ids.numel(), 2)
    torch.testing.assert_close(gates[0].sum(-1), torch.ones(ids.numel()), rtol=0, atol=1e-6)
    torch.testing.assert_close(_through_the_cache(model, ids), whole, rtol=0, atol=TOLERANCE)


def test_a_gate_for_the_whole_model_routes_attention_too(loaded: Any, ids: torch.Tensor) -> None:
    """With a running mean, whose sums FFN and attention must not share."""
    model = loaded("bam", upcycle={**OWN, "trunk": "frozen"}, scorer="lda", context="running_mean", top_k=2)
    assert model.gate is not None
    assert model.attention_gate is not None
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(_through_the_cache(model, ids), whole, rtol=0, atol=TOLERANCE)


def test_it_generates_and_loads_as_any_model(pico: Any, loaded: Any, ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model = loaded("bam", upcycle=OWN)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, **other, **settings))
    out = pico.scratch("saved")
    model.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(again, ComposedForCausalLM)
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_attention_implementations_reach_every_expert(folder: Any, ids: torch.Tensor) -> None:
    path = folder("bam", upcycle=OWN)
    with torch.inference_mode():
        eager, sdpa = (load(path, attn_implementation=name)(ids).logits for name in ("eager", "sdpa"))
    assert not torch.equal(eager, sdpa)
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("upcycle", [OWN, SHARED], ids=["own", "shared"])
def test_padded_rows_with_owners_of_their_own(folder: Any, ids: torch.Tensor, upcycle: Any) -> None:
    """A padded row of a batch, without some owners, continues as it does alone in the model they never joined."""
    path = folder("bam", family="mistral", upcycle={**upcycle, "trunk": "frozen"})
    whole, pad = load(path), 7
    mask = torch.ones_like(ids[:2])
    mask[1, :pad] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    left_out: list[set[str]] = [set(), {"acme", "zoe"}]
    both = whole.generate(ids[:2], attention_mask=mask, opt_out=left_out, **settings)
    for row, (skipped, owners) in enumerate(zip((0, pad), left_out, strict=True)):
        alone = ids[row : row + 1, skipped:]
        expected = load(path, opt_out=owners).generate(
            alone, attention_mask=torch.ones_like(alone), **settings
        )
        assert torch.equal(both[row, skipped:], expected[0])
