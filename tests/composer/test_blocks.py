"""Expert blocks against PEFT, against the library's own mixture classes, and against plain loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from composer.blocks.low_rank import LowRankExpert, LowRankFFN
from composer.blocks.mixed import MixedFFN
from composer.blocks.parts import FFNParts
from composer.blocks.stacked import StackedFFN
from composer.loading import load
from composer.routing.selectors.topk import TopK
from experts.errors import PlanError

D, WIDTH, TOKENS = 16, 24, 40


def _random(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _choice(num_experts: int, k: int, *, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, k, generator=generator)
    return indices, weights / weights.sum(-1, keepdim=True)


# Low-rank experts


class _Adapted:
    """The base, an adapter by PEFT on it, and the model composed of this expert alone."""

    def __init__(self, pico: Any, family: str, config: dict[str, Any]) -> None:
        from peft import PeftModel

        raw = pico.write_lora(pico.scratch("raw"), family=family, seed=5, **config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft = PeftModel.from_pretrained(pico.network(family), raw).eval()
        registry = pico.fresh_library(family)
        package = pico.pack(
            raw,
            name="dan/low",
            family=family,
            artifacts=pico.artifacts(family=family, seed=1, layers=self.layers(raw)),
        )
        registry.register(package)
        manifest = pico.manifest(family=family, experts=["dan/low"], scorer="learned")
        self.model = load(pico.compose(manifest, registry=registry))

    @staticmethod
    def layers(raw: Any) -> tuple[int, ...]:
        from safetensors import safe_open

        with safe_open(raw / "adapter_model.safetensors", framework="np") as file:
            found = {int(name.split("layers.")[1].split(".")[0]) for name in file.keys()}  # noqa: SIM118
        return tuple(sorted(found))


LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "layers_to_transform": [1, 3]},
    "rslora": {"r": 4, "use_rslora": True, "layers_to_transform": [2]},
    "patterns": {
        "r": 2,
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
        "layers_to_transform": [1, 2, 3],
    },
    "one linear": {"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [3]},
}
FAMILIES = ("llama", "qwen3", "olmo2", "gemma3_text", "gpt_neox", "phi3")


@pytest.mark.parametrize(
    ("family", "name"), [("llama", name) for name in LORAS] + [(family, "plain") for family in FAMILIES[1:]]
)
def test_an_expert_with_all_the_weight_is_its_peft_model(
    pico: Any, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole network, with the adapter beside the weights and merged into them."""
    adapted = _Adapted(pico, family, LORAS[name])
    ids = pico.prompts()

    def expert_alone(_: TopK, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(logits), 1, dtype=torch.int64), torch.ones(len(logits), 1)

    monkeypatch.setattr(TopK, "forward", expert_alone)
    with torch.inference_mode():
        got = adapted.model(ids).logits
        torch.testing.assert_close(got, adapted.peft(ids).logits, rtol=0, atol=2e-5)
        assert (got - pico.dense(family)(ids).logits).abs().max() > 0.01
        torch.testing.assert_close(got, adapted.peft.merge_and_unload()(ids).logits, rtol=0, atol=2e-5)


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(D, WIDTH)
        self.up_proj = nn.Linear(D, WIDTH)
        self.down_proj = nn.Linear(WIDTH, D)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


_LAYOUT: Any = SimpleNamespace(linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


def _low_rank(*, normalized: bool = True) -> tuple[_Gated, LowRankFFN, list[Callable[..., torch.Tensor]]]:
    """A block of two experts on an anchor with biases, and every expert's FFN written out."""
    anchor = _Gated().requires_grad_(False)
    factors = [
        {
            role: (_random(r, i, seed=10 * e + n), _random(o, r, seed=10 * e + n + 3), 2.0 / r)
            for n, (role, i, o) in enumerate((("gate", D, WIDTH), ("up", D, WIDTH), ("down", WIDTH, D)))
            if not (e == 1 and role == "up")  # the second expert leaves one linear alone
        }
        for e, r in enumerate((3, 5))
    ]

    def ffn(changes: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        weights = {
            role: getattr(anchor, f"{role}_proj").weight
            + (changes[role][2] * changes[role][1] @ changes[role][0] if role in changes else 0)
            for role in ("gate", "up", "down")
        }

        def run(x: torch.Tensor) -> torch.Tensor:
            hidden = F.silu(F.linear(x, weights["gate"], anchor.gate_proj.bias)) * F.linear(
                x, weights["up"], anchor.up_proj.bias
            )
            return F.linear(hidden, weights["down"], anchor.down_proj.bias)

        return run

    block = LowRankFFN(
        anchor=anchor,
        parts=FFNParts(anchor, _LAYOUT),
        experts=[LowRankExpert(f) for f in factors],
        normalized=normalized,
    )
    return anchor, block, [ffn({}), *map(ffn, factors)]


def _mixture(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, experts: list[Callable[..., torch.Tensor]]
) -> torch.Tensor:
    """One token and one expert after the other."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for index, weight in zip(indices[token].tolist(), weights[token], strict=True):
            if index >= 0:
                out[token] += weight * experts[index](x[token : token + 1])[0]
    return out


@pytest.mark.parametrize("k", [1, 2, 3])
def test_low_rank_mixture(k: int) -> None:
    _, block, experts = _low_rank()
    x = _random(TOKENS, D, seed=1)
    indices, weights = _choice(3, k)
    torch.testing.assert_close(block(x, indices, weights), _mixture(x, indices, weights, experts))


def test_low_rank_mixture_whose_weights_do_not_sum_to_one() -> None:
    """Only then does the bias of the down-projection have to be weighted."""
    x = _random(TOKENS, D, seed=1)
    indices, weights = _choice(3, 2)
    weights = weights * 0.6
    _, block, experts = _low_rank(normalized=False)
    torch.testing.assert_close(block(x, indices, weights), _mixture(x, indices, weights, experts))


def test_low_rank_mixture_with_empty_slots_and_absent_experts() -> None:
    """Two slots on the anchor add up; -1 is nobody."""
    _, block, experts = _low_rank()
    x = _random(3, D, seed=1)
    indices = torch.tensor([[0, 1, 0], [2, -1, -1], [0, 0, -1]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.4, 0.6, 0.0]])
    got = block(x, indices, weights, has_unused=True)
    torch.testing.assert_close(got, _mixture(x, indices, weights, experts))


def test_an_activation_under_an_unknown_name_is_refused() -> None:
    module = _Gated()
    module.nonlinearity = module.act_fn
    del module.act_fn
    with pytest.raises(PlanError) as caught:
        FFNParts(module, _LAYOUT)
    assert str(caught.value) == (
        "_Gated has no activation under any of the names act_fn, act, activation_fn, activation, "
        "activation_function, so its experts cannot be composed. Report the model family."
    )


# Stacked experts


def _stack(
    *, implementation: str, gated: bool = True, bias: bool = False, experts: int = 5, seed: int = 0
) -> StackedFFN:
    stack = StackedFFN(
        num_experts=experts,
        hidden_size=D,
        intermediate_size=WIDTH,
        gated=gated,
        bias=bias,
        activation=F.silu if gated else F.gelu,
        config=SimpleNamespace(_experts_implementation=implementation),
        dtype=torch.float32,
    ).requires_grad_(False)
    for number, parameter in enumerate(stack.parameters()):
        parameter.copy_(_random(*parameter.shape, seed=seed + number))
    return stack


def _stock(name: str, implementation: str) -> nn.Module:
    """The experts of a mixture class of transformers, five of them, of the same sizes."""
    from transformers.models.flex_olmo.configuration_flex_olmo import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {
        "hidden_size": D,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "experts_implementation": implementation,
    }
    match name:
        case "mixtral":
            return MixtralExperts(MixtralConfig(**sizes, intermediate_size=WIDTH, num_local_experts=5))
        case "qwen3_moe":
            return Qwen3MoeExperts(Qwen3MoeConfig(**sizes, moe_intermediate_size=WIDTH, num_experts=5))
        case _:
            return FlexOlmoExperts(FlexOlmoConfig(**sizes, intermediate_size=WIDTH, num_experts=5))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "flex_olmo"])
def test_a_stack_is_the_stock_mixture(name: str, implementation: str) -> None:
    ours = _stack(implementation=implementation)
    stock = _stock(name, implementation)
    with torch.no_grad():
        stock.load_state_dict(ours.state_dict())
        x = _random(TOKENS, D, seed=1)
        indices, weights = _choice(5, 2)
        assert torch.equal(ours(x, indices, weights), stock(x, indices, weights))


def _ffns(stack: StackedFFN) -> list[Callable[..., torch.Tensor]]:
    def ffn(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            bias = getattr(stack, f"{stack.input_name}_bias")[index] if stack.has_bias else None
            projected = F.linear(x, getattr(stack, stack.input_name)[index], bias)
            gated = stack.has_gate
            hidden = F.silu(projected[:, :WIDTH]) * projected[:, WIDTH:] if gated else F.gelu(projected)
            return F.linear(
                hidden, stack.down_proj[index], stack.down_proj_bias[index] if stack.has_bias else None
            )

        return run

    return [ffn(index) for index in range(stack.num_experts)]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stack_is_a_loop(gated: bool, bias: bool, implementation: str) -> None:
    stack = _stack(implementation=implementation, gated=gated, bias=bias)
    x = _random(TOKENS, D, seed=1)
    indices, weights = _choice(5, 3)
    torch.testing.assert_close(stack(x, indices, weights), _mixture(x, indices, weights, _ffns(stack)))
    for index, ffn in enumerate(_ffns(stack)):
        torch.testing.assert_close(stack.one(index, x), ffn(x))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_empty_slots_meet_no_expert(implementation: str) -> None:
    """A slot of -1 must not be filled by a product with 0, which NaN would survive."""
    stack = _stack(implementation=implementation)
    for parameter in stack.parameters():
        parameter[4] = float("nan")
        parameter[0] = float("nan")
    x = _random(TOKENS, D, seed=1)
    indices, weights = _choice(3, 3)
    indices = indices + 1
    indices[::2, 2], weights[::2, 2] = -1, 0.0
    indices[::4, 1], weights[::4, 1] = -1, 0.0
    got = stack(x, indices, weights, has_unused=True)
    assert got.isfinite().all()
    torch.testing.assert_close(got, _mixture(x, indices, weights, _ffns(stack)))


# Both in one layer


@pytest.mark.parametrize("k", [1, 2, 4])
def test_mixed_layer(k: int) -> None:
    """Anchor, two low-rank and two full experts; the anchor's down bias is weighted though nobody asked."""
    _, low_rank, experts = _low_rank(normalized=True)
    stacked = _stack(implementation="eager", bias=True, experts=2, seed=50)
    block = MixedFFN(low_rank=low_rank, stacked=stacked)
    x = _random(TOKENS, D, seed=1)
    indices, weights = _choice(5, k)
    torch.testing.assert_close(
        block(x, indices, weights), _mixture(x, indices, weights, [*experts, *_ffns(stacked)])
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_full_experts_are_the_network_with_their_ffn(
    pico: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all the weight, a full expert is the base with its own matrices swapped in."""
    from safetensors.torch import load_file

    registry = pico.library(family)
    expected = pico.network(family)
    state = load_file(registry.files(registry.expert("acme/full"))["ffn.safetensors"])
    assert expected.load_state_dict(state, strict=False).unexpected_keys == []
    model = load(pico.composed(family=family, experts=["acme/full"], scorer="learned"))

    def expert_alone(_: TopK, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(logits), 1, dtype=torch.int64), torch.ones(len(logits), 1)

    monkeypatch.setattr(TopK, "forward", expert_alone)
    with torch.inference_mode():
        got = model(pico.prompts()).logits
        torch.testing.assert_close(got, expected(pico.prompts()).logits, rtol=0, atol=2e-5)
    assert (got - pico.dense(family)(pico.prompts()).logits).abs().max() > 0.01


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm", "batched_mm"])
def test_the_kernel_is_chosen_at_load(
    pico: Any, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    asked = []
    real = ALL_EXPERTS_FUNCTIONS.get_interface

    def listen(name: str, default: Any) -> Any:
        asked.append(name)
        return real(name, default)

    folder = pico.composed("stacked")
    model = load(folder, experts_implementation=implementation)
    monkeypatch.setattr(ALL_EXPERTS_FUNCTIONS, "get_interface", listen)
    with torch.inference_mode():
        got = model(pico.prompts()).logits
        assert set(asked) == {implementation or "grouped_mm"}, "the library's own default"
        torch.testing.assert_close(got, load(folder, experts_implementation="eager")(pico.prompts()).logits)
