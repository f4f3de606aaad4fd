"""Properties of the mathematics that a change of code must not lose: here, and where they are tested elsewhere.

======  ==================================================================  =======================================
F1      gate rows of a subset == composed from that subset, bit for bit     here; test_router, test_scorers;
                                                                            conformance/test_optout (u1)
F2      a mask of -inf over all rows is close to slicing, in float32 only   here
F3      masking after the softmax is something else (control)               test_router
F4      NaN in whoever is left out reaches nothing                          conformance/test_optout (u2)
F5      nobody but the anchor == the base, bit for bit                      here; conformance/test_optout (u12)
F6      whoever is left out gets no gradient                                conformance/test_routing
F7      training moves the owner's half alone, whatever the weight decay    train/test_coordination, train/test_worker
F8      the order of experts matters to rounding only; builds are           conformance/test_folder (u8, u7)
        deterministic
F9      copies of the base's FFN give the base                              here; conformance/test_optout (u12)
F10     only a norm behind the experts hides their scale                    here
F11     per-expert and fused checkpoints, numeric order, gaps refused       export/test_import
F12     a cache of another active set is refused                            test_generate
F13     add, remove, add again == composed once, byte for byte              test_build, test_editing
F14     requests with sets of their own in one batch == each alone          here; conformance/test_optout (u1 request)
F15     statistics summed again == never joined, bit for bit                test_ridge
======  ==================================================================  =======================================
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer.layers.moe import MoELayer


def _logits(model: Any, ids: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Run a model in float64 whose experts, the anchor among them, put out ``scale`` times as much."""
    model = model.double()  # so that the scale alone is seen, not rounding
    model.config._experts_implementation = "eager"
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.experts.down_proj.data *= scale
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize(("family", "same"), [("olmo2", True), ("llama", False)])
def test_f10_only_a_norm_behind_the_experts_hides_their_scale(pico: Any, family: str, same: bool) -> None:
    """On OLMo-2 the mixture's output is normed, so the weights' total mass is irrelevant; elsewhere it is not."""
    import composer

    folder = pico.composed("stacked", family=family)
    ids = pico.prompts(rows=2, length=12)
    plain = _logits(composer.load(folder, dtype="float32"), ids, scale=1.0)
    scaled = _logits(composer.load(folder, dtype="float32"), ids, scale=7.0)
    difference = float((plain - scaled).abs().max())
    assert difference < 2e-6 if same else difference > 1e-2


KERNELS = ("eager", "grouped_mm", "batched_mm")
ROUTER = {"scorer": "learned", "context": "token", "top_k": 2}


def _load(pico: Any, dtype: str, kernel: str, *, without: tuple[str, ...] = (), **settings: Any) -> Any:
    """The stacked composition, or the one that ``without`` never joined, with one kernel for its experts."""
    import composer

    experts = [name for name in ("acme/full", "bob/full", "zoe/full") if name.split("/")[0] not in without]
    folder = pico.composed("stacked", experts=experts, **{**ROUTER, **settings})
    return composer.load(folder, dtype=dtype, experts_implementation=kernel)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_f1_leaving_in_a_request_is_never_having_joined(
    pico: Any, dtype: str, kernel: str, normalize: bool
) -> None:
    """Bit for bit in every kernel and dtype, also where k exceeds who is left; ties in bfloat16 fall alike."""
    ids = pico.prompts()
    family = (
        "olmo2" if not normalize else "llama"
    )  # only a norm behind the experts allows weights that do not sum to 1
    whole = _load(pico, dtype, kernel, family=family, normalize=normalize)
    with torch.inference_mode():
        everybody = whole(ids).logits
        for absent in (("bob",), ("acme", "bob")):
            never = _load(pico, dtype, kernel, without=absent, family=family, normalize=normalize)
            left = whole(ids, opt_out=set(absent)).logits
            assert torch.equal(left, never(ids).logits)
            assert not torch.equal(left, everybody)


def test_f2_a_mask_over_all_rows_is_close_to_slicing(pico: Any) -> None:
    """What stock code would do with a mask: the same mathematics through other kernels."""
    ids = pico.prompts()
    model = _load(pico, "float32", "eager")
    with torch.inference_mode():
        sliced = model(ids, opt_out={"bob"}).logits
        for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
            _mask(layer, expert=2)
        masked = model(ids).logits
    torch.testing.assert_close(masked, sliced, rtol=0, atol=1e-5)


def _mask(layer: Any, *, expert: int) -> None:
    """Score everybody and put -inf where the expert stands."""
    scorer = layer.router.scorer
    score = scorer.forward

    def forward(features: torch.Tensor, counts: Any, experts: Any) -> torch.Tensor:
        logits: torch.Tensor = score(features, counts, experts)
        gone = [at for at, one in enumerate(experts) if one == expert]
        return logits.index_fill(-1, torch.tensor(gone, dtype=torch.int64), float("-inf"))

    scorer.forward = forward


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_f5_nobody_left_is_the_base(pico: Any, dtype: str, kernel: str) -> None:
    from transformers import AutoModelForCausalLM

    ids = pico.prompts()
    base = AutoModelForCausalLM.from_pretrained(pico.base("llama"), dtype=getattr(torch, dtype))
    model = _load(pico, dtype, kernel)
    with torch.inference_mode():
        expected = base.eval()(ids).logits
        assert torch.equal(model(ids, opt_out={"acme", "bob", "zoe"}).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_f9_copies_of_the_base_are_the_base_where_weights_sum_to_one(pico: Any) -> None:
    """A choice that is not renormalised scales the FFN; the norm behind it hides that but for its epsilon."""
    ids = pico.prompts()

    def gap(family: str, *, normalize: bool, epsilon: bool = True) -> float:
        model = _load(pico, "float32", "eager", family=family, normalize=normalize, top_k=1)
        base = pico.network(family)
        for module in model.modules():
            if isinstance(module, MoELayer):
                for stack in (module.experts.gate_up_proj.data, module.experts.down_proj.data):
                    stack.copy_(stack[:1].expand_as(stack))
        for module in () if epsilon else (*model.modules(), *base.modules()):
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
        with torch.inference_mode():
            return float((model(ids).logits - base(ids).logits).abs().max())

    assert gap("llama", normalize=True) <= 2e-6
    assert gap("olmo2", normalize=True) <= 2e-6
    assert gap("olmo2", normalize=False) > 1e-4
    assert gap("olmo2", normalize=False, epsilon=False) <= 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_f14_sets_of_their_own_in_one_batch(pico: Any, kernel: str) -> None:
    """Rows with different owners left out, against each of them alone."""
    ids = pico.prompts()
    model = _load(pico, "float32", kernel)
    sets: list[set[str]] = [{"bob"}, set(), {"acme", "zoe"}, {"acme", "bob", "zoe"}]
    with torch.inference_mode():
        together = model(ids, opt_out=sets).logits
        for row, (one, logits) in enumerate(zip(sets, together, strict=True)):
            alone = model(ids[row : row + 1], opt_out=one).logits[0]
            torch.testing.assert_close(logits, alone, rtol=0, atol=2e-6)
