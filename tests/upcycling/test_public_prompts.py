"""Rows made of prompts beside public ones: the same whether or not the base is an expert, whoever else is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import pytest
import torch

from composer.loading import load
from composer.manifest import Manifest
from composer.upcycling.measuring import router_inputs
from composer.verify import verify_optout
from experts.errors import BuildError

OWN = {"attention": {"kv": "own"}}
KERNELS = ("eager", "batched_mm", "grouped_mm", None)


def _manifest(pico: Any, recipe: str, *, experts: Sequence[str], **upcycle: Any) -> Manifest:
    wish = pico.manifest("dense", recipe=recipe, scorer="prompts", experts=experts, upcycle=upcycle).to_dict()
    wish["router"]["public_prompts"] = [pico.prompt(0), pico.prompt(2)]
    return Manifest.from_dict(wish)


def _composed(
    pico: Any, recipe: str, *, experts: Sequence[str] = ("acme", "bob", "zoe"), **upcycle: Any
) -> Any:
    manifest = _manifest(pico, recipe, experts=[f"{owner}/dense" for owner in experts], **upcycle)
    return pico.once(lambda: pico.compose(manifest), "public prompts", manifest.digest)


def _scorer(model: Any, layer: int, branch: str = "mlp") -> Any:
    return getattr(model.base.model.layers[layer], branch).router.scorer


def _row(model: Any, owner: str, layer: int = 3, branch: str = "mlp") -> torch.Tensor:
    scorer = _scorer(model, layer, branch)
    return scorer.rows[scorer.position[1 + model.owners_of_experts.index(owner)]].detach()


def _dense(pico: Any, *states: dict[str, torch.Tensor]) -> Any:
    """The plain network of transformers with the last given tensor of every name."""
    network = pico.network()
    network.load_state_dict(reduce(lambda one, other: {**one, **other}, states))
    return network


def _inputs(network: Any, text: Sequence[int], layer: int, branch: str) -> torch.Tensor:
    """The mean state that a module of the plain network reads."""
    found: list[torch.Tensor] = []
    module = getattr(network.model.layers[layer], branch)

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].mean(0))

    with torch.inference_mode():
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        network(torch.tensor([text]))
        handle.remove()
    return found[0]


def _expected(pico: Any, own: Any, base: Any, branch: str) -> torch.Tensor:
    """Bob's direction in the last layer, from plain networks alone."""

    def mean(network: Any, seed: int) -> torch.Tensor:
        return _inputs(network, pico.tokens(pico.prompt(seed)), 3, branch)

    direction = mean(own, 2) - (mean(base, 0) + mean(base, 2)) / 2
    return direction / direction.norm()


CASES = [
    ("btx", {}, (".mlp.",)),
    ("bam", OWN, (".mlp.", ".self_attn.")),
    ("bam", {}, (".mlp.", ".q_proj.", ".o_proj.")),
]


@pytest.mark.parametrize("seed_expert", [False, True])
@pytest.mark.parametrize(("recipe", "upcycle", "theirs"), CASES, ids=["btx", "own", "shared"])
def test_rows_are_those_of_plain_networks(
    recipe: str, upcycle: Any, theirs: Any, seed_expert: bool, pico: Any, state: Any
) -> None:
    """Of the base's trunk with the owner's modules for the owner's prompts, of the base for public ones."""
    model = load(_composed(pico, recipe, trunk="frozen", seed_expert=seed_expert, **upcycle))
    own = {name: tensor for name, tensor in state("bob").items() if any(part in name for part in theirs)}
    base = _dense(pico, state("base"))
    for branch in ("mlp", "self_attn") if recipe == "bam" else ("mlp",):
        expected = _expected(pico, _dense(pico, state("base"), own), base, branch)
        torch.testing.assert_close(_row(model, "bob", branch=branch), expected, rtol=0, atol=1e-5)


def test_a_merged_trunk_without_the_base(pico: Any, state: Any) -> None:
    """Public prompts pass the trunk that the experts make together, and the base's own FFNs."""
    model = load(_composed(pico, "btx", seed_expert=False))
    owners = [state(owner) for owner in ("acme", "bob", "zoe")]
    trunk = {name: reduce(torch.add, [owner[name] for owner in owners]) / 3 for name in owners[0]}
    ffns = [{n: t for n, t in state(who).items() if ".mlp." in n} for who in ("bob", "base")]
    expected = _expected(pico, *(_dense(pico, trunk, own) for own in ffns), "mlp")
    torch.testing.assert_close(_row(model, "bob"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_load_and_kernel_makes_the_same_rows(kernel: str | None, pico: Any) -> None:
    path = _composed(pico, "btx", trunk="frozen", seed_expert=False)
    made = [load(path, experts_implementation=kernel) for _ in range(2)]
    without = load(path, experts_implementation=kernel, opt_out={"zoe"})
    never = load(
        _composed(pico, "btx", experts=("acme", "bob"), trunk="frozen", seed_expert=False),
        experts_implementation=kernel,
    )
    plain = load(path, experts_implementation="eager")
    for layer in range(4):
        first, *others = (_row(model, "bob", layer) for model in (*made, without, never))
        assert first.isfinite().all()
        assert all(torch.equal(row, first) for row in others)
        torch.testing.assert_close(first, _row(plain, "bob", layer), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("recipe", "upcycle"), [("btx", {}), ("bam", OWN)], ids=["btx", "own"])
def test_leaving_is_never_having_joined(recipe: str, upcycle: Any, pico: Any) -> None:
    rows = verify_optout(_composed(pico, recipe, trunk="frozen", seed_expert=False, **upcycle), owner="zoe")
    assert [(row.door, row.passed) for row in rows] == [("build", True), ("load", True), ("request", True)]


def test_experts_of_some_layers_have_rows_there(pico: Any) -> None:
    """In other recipes a layer may lack an expert: it has no row to fill in."""
    wish = pico.manifest("low_rank", scorer="prompts", context="token").to_dict()
    wish["router"]["public_prompts"] = [pico.prompt(0)]
    model = load(pico.compose(Manifest.from_dict(wish)))
    lengths = [_scorer(model, layer).rows.norm(dim=1).tolist() for layer in (1, 2, 3)]
    experts = [2, 2, 3]  # acme and zoe, acme and bob, everybody
    assert lengths == [pytest.approx([0.0, *[1.0] * count], abs=1e-5) for count in experts]


def test_nothing_is_measured_on_an_expert_that_is_not_there(pico: Any, ids: torch.Tensor) -> None:
    """Its place in the stack would be -1: the last owner's block, or memory that nobody wrote."""
    model = load(_composed(pico, "bam", trunk="frozen", seed_expert=False, **OWN))
    with pytest.raises(ValueError, match="the base is no expert") as caught:
        router_inputs(model, [ids], expert=0)
    assert str(caught.value) == (
        "All tokens were to go to the base's own modules, but the base is no expert of this composition (seed_expert: "
        "false). Measure them in the base itself, or in a composition with seed_expert: true."
    )
    assert all(bool(sums.count) for sums in router_inputs(model, [ids], expert=1).values())


def test_states_that_are_not_finite_make_no_row(pico: Any) -> None:
    """Weights that may be published overflow in a smaller dtype; whoever leaves the model out has a sound one."""
    from safetensors.torch import load_file, save_file

    registry = pico.fresh_dense_library()
    raw = pico.write_dense(pico.scratch("raw"), seed=9)
    tensors = load_file(raw / "model.safetensors")
    gate, up = (tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    gate.fill_(99.0)[::2].neg_()  # some unit is open to every token
    up.fill_(99.0)
    save_file(tensors, raw / "model.safetensors", metadata={"format": "pt"})
    registry.register(pico.pack(raw, name="acme/huge"))
    wish = _manifest(pico, "btx", experts=["acme/huge", "bob/dense"], trunk="frozen", seed_expert=False)
    path = pico.compose(wish, registry=registry)
    with pytest.raises(BuildError) as caught:
        load(path, dtype="float16")
    assert str(caught.value) == (
        "The states that the ffn router of layer 2 reads on the prompts of acme/huge are not finite in float16, so no "
        "row can be made of them. Load in float32, or leave acme/huge out."
    )
    assert _row(load(path), "acme").isfinite().all()
    assert _row(load(path, dtype="float16", opt_out={"acme"}), "bob").isfinite().all()
