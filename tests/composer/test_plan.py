"""Plans: what is resolved and counted, and everything that stands in the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from composer.planning import plan
from experts.errors import ConsentError, CoterieError, PlanError, UnknownNameError


def _refused(manifest: Any, registry: Any, error: type[CoterieError] = PlanError) -> str:
    with pytest.raises(error) as caught:
        plan(manifest, registry)
    assert type(caught.value) is error
    assert caught.value.exit_code == 2
    return str(caught.value)


CANNOT = "Manifest 'pico' cannot be composed:\n"


def test_a_plan_counts_what_is_there(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.library()
    planned = plan(manifest("low_rank", top_k=2), registry)
    assert [expert.card.name for expert in planned.experts] == ["acme/low", "bob/low", "zoe/low"]
    assert planned.owners == ("acme", "bob", "zoe")
    assert planned.optout_class == "exact"
    assert planned.warnings == ()
    sizes = {owner: len(layers) * rank * 3 * (32 + 48) for owner, (_, rank, layers) in _OWNERS(pico).items()}
    anchor = sum(parameter.numel() for parameter in pico.dense().parameters())
    assert planned.parameters_total == anchor + sum(sizes.values())
    # the anchor's FFN is always computed beside low-rank experts, and two of them may be chosen
    active = anchor + sum(sorted(sizes.values())[-2:])
    assert planned.parameters_active == active
    assert planned.flops_per_token == 2 * (active - 97 * 32), "looking an embedding up multiplies nothing"
    folder = pico.composed("low_rank")
    files = [*(folder / "base").iterdir(), *(p for p in (folder / "experts").rglob("*") if p.is_file())]
    assert planned.bytes == sum(p.stat().st_size for p in files if p.name != "card.json")


def _OWNERS(pico: Any) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    cards = {owner: pico.card(f"{owner}/low") for owner in pico.owners}
    return {owner: (0, card.rank, card.layers) for owner, card in cards.items()}


def test_full_experts_stand_in_for_the_anchor(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.library()
    largest = max(registry.expert(f"{owner}/full").parameters for owner in pico.owners)
    planned = plan(manifest("stacked", top_k=2), registry)
    anchor = sum(parameter.numel() for parameter in pico.dense().parameters())
    assert largest == 3 * math.prod((32, 48)) * 3
    assert planned.parameters_active == anchor + largest


def test_a_plan_is_plain_data(pico: Any, manifest: Callable[..., Any]) -> None:
    import json

    shown = json.loads(json.dumps(plan(manifest("mixed"), pico.library()).to_dict()))
    assert shown["base"]["fingerprint"] == pico.description().fingerprint
    assert [(e["name"], e["kind"], e["rank"], e["layers"]) for e in shown["experts"]] == [
        ("acme/low", "lora", 2, [1, 2, 3]),
        ("bob/full", "ffn", None, [2, 3]),
        ("zoe/low", "lora", 4, [1, 3]),
    ]
    assert shown["owners"] == ["acme", "bob", "zoe"]
    assert shown["router"]["scorer"] == "lda"


def test_more_experts_per_token_than_there_are(pico: Any, manifest: Callable[..., Any]) -> None:
    assert _refused(manifest(top_k=5), pico.library()) == (
        "Manifest 'pico' cannot be composed:\n"
        "  - router.top_k: 5 found, but 3 experts and the anchor are all that a token can be sent to; write at most 4"
    )
    assert plan(manifest(top_k=4), pico.library()).warnings == ()


def test_more_experts_per_token_than_are_left(pico: Any, manifest: Callable[..., Any]) -> None:
    """Whoever leaves must not make the manifest wrong; nor must a preset that is meant for more experts."""
    expected = ("router.top_k is 4; with 2 experts and the anchor every token uses all 3.",)
    assert plan(manifest(top_k=4, opt_out=("bob",)), pico.library()).warnings == expected
    two = manifest(experts=("acme/full", "zoe/full"), preset="paper")
    assert plan(two, pico.library()).warnings == expected
    assert (
        plan(manifest(experts=("acme/low", "zoe/low"), top_k=4), pico.library(), changed=True).warnings
        == expected
    )


SCALED = (
    "router.normalize is false, and '{}' does not normalise what its FFNs return, as OLMo-2 does: the weights of the "
    "chosen experts sum to less than 1 and scale every FFN down, so that even copies of the anchor's would change the "
    "model. Write 'normalize: true'."
)


@pytest.mark.parametrize(
    ("family", "router", "warned"),
    [
        ("llama", {"top_k": 2, "normalize": False}, True),
        ("llama", {"top_k": 2, "normalize": True}, False),
        ("llama", {"top_k": 4, "normalize": False}, False),  # the anchor and all three experts: they sum to 1
        ("llama", {"top_k": 4, "normalize": False, "selector": "topp"}, True),
        ("olmo2", {"top_k": 2, "normalize": False}, False),
    ],
)
def test_weights_that_scale_the_ffn(
    pico: Any, manifest: Callable[..., Any], family: str, router: dict[str, Any], warned: bool
) -> None:
    planned = plan(manifest(family=family, **router), pico.library(family))
    assert planned.warnings == ((SCALED.format(family),) if warned else ())


@pytest.mark.parametrize(("top_k", "same"), [(2, False), (4, True)])
def test_the_warning_of_the_scale_is_right(pico: Any, top_k: int, same: bool) -> None:
    """Copies of the anchor's FFN are the anchor wherever no warning is given, and not where one is."""
    import torch

    import composer
    from composer import build

    registry = pico.fresh_library()
    for owner in ("ann", "ben", "cat"):
        raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(2, 3), copy=True)
        registry.register(
            pico.pack(raw, name=f"{owner}/copy", artifacts=pico.artifacts(seed=1, layers=(2, 3)))
        )
    experts = ("ann/copy", "ben/copy", "cat/copy")
    planned = plan(pico.manifest(experts=experts, top_k=top_k, normalize=False), registry)
    assert bool(planned.warnings) is not same
    model = composer.load(build(planned, pico.scratch("copies"), registry=registry), dtype="float32")
    with torch.no_grad():
        difference = (model(pico.prompts()).logits - pico.dense()(pico.prompts()).logits).abs().max()
    assert bool(difference < 1e-4) is same


def test_unknown_names(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.library()
    known = "acme/full, acme/low, bob/full, bob/low, zoe/full, zoe/low"
    where = f"The registry is '{registry.path}'."
    assert _refused(manifest(experts=["acme/lo", "bob/low", "dan/low@3"]), registry) == (
        f"{CANNOT}"
        f"  - experts[0]: Unknown expert 'acme/lo'. Did you mean 'acme/low'? Known: {known}. {where}\n"
        f"  - experts[2]: Unknown expert 'dan/low'. Did you mean 'acme/low'? Known: {known}. {where}"
    )
    assert _refused(manifest(recipe="flexolm"), registry, UnknownNameError) == (
        "Unknown recipe 'flexolm'. Did you mean 'flexolmo'? Known: bam, btx, flexolmo, merge, "
        "router_retriever, soup, sparse_upcycle."
    )
    assert _refused(manifest(scorer="ldb"), registry) == (
        f"{CANNOT}  - Unknown scorer 'ldb'. Did you mean 'lda'? Known: dume, lda, learned, prompts, random, ridge."
    )
    assert _refused(manifest(selector="top_p"), registry) == (
        f"{CANNOT}  - Unknown selector 'top_p'. Did you mean 'topp'? Known: topk, topp."
    )
    assert _refused(manifest(opt_out=["acne"]), registry) == (
        f"{CANNOT}  - opt_out: Unknown owner 'acne'. Did you mean 'acme'? Known: acme, bob, zoe."
    )
    wrong = pico.manifest(family="llama").model_copy(update={"base": "lama"})
    assert _refused(wrong, registry, UnknownNameError) == (
        f"Unknown base 'lama'. Did you mean 'llama'? Known: llama. Add it to the registry '{registry.path}' with: "
        "coterie base add PATH --name lama"
    )


def test_router_options(pico: Any, manifest: Callable[..., Any]) -> None:
    message = _refused(manifest(options={"shrinkag": 0.5, "temperature": 0.0}), pico.library())
    assert message == (
        f"{CANNOT}"
        "  - router.options.temperature: input should be greater than 0, given 0.0\n"
        "  - router.options.shrinkag: unknown key; did you mean 'shrinkage'? Allowed: anchor_prior, evidence, "
        "shrinkage, temperature"
    )
    options = {"shrinkage": -1.0}
    selector_options = {"topp": 0.5, "top_p": 1.5}
    wrong = manifest(selector="topp", options=options, selector_options=selector_options)
    assert _refused(wrong, pico.library()) == (
        f"{CANNOT}"
        "  - router.options.shrinkage: input should be greater than 0, given -1.0\n"
        "  - router.selector_options.top_p: input should be less than or equal to 1, given 1.5\n"
        "  - router.selector_options.topp: unknown key; did you mean 'top_p'? Allowed: top_p"
    )
    assert _refused(manifest(selector_options={"top_p": 0.5}), pico.library()) == (
        f"{CANNOT}  - router.selector_options: 'topk' has no options; leave out top_p"
    )


def test_a_token_blended_with_itself(pico: Any, manifest: Callable[..., Any]) -> None:
    assert _refused(manifest(context="token", token_weight=0.5), pico.library()) == (
        f"{CANNOT}  - router.token_weight is 0.5, but the context 'token' has no mean to blend with; leave it out, or "
        "write `context: running_mean`"
    )
    built = pico.loaded(token_weight=0.5)
    assert built.gate.token_weight == 0.5


def test_another_anchor_with_equal_shapes(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.fresh_library()
    registry.add_base(pico.base(seed=1), name="twin")
    mine, other = pico.description().fingerprint, pico.description(seed=1).fingerprint
    assert mine != other
    wanted = manifest(experts=["acme/low", "bob/low"]).model_copy(update={"base": "twin"})
    assert _refused(wanted, registry) == (
        f"{CANNOT}"
        f"  - acme/low was trained on another anchor: 'llama' with fingerprint {mine}; this composition's is 'twin' "
        f"with {other}\n"
        f"  - bob/low was trained on another anchor: 'llama' with fingerprint {mine}; this composition's is 'twin' "
        f"with {other}"
    )


def test_duplicates(pico: Any, manifest: Callable[..., Any]) -> None:
    assert _refused(manifest(experts=["acme/low", "acme/low@1"]), pico.library()) == (
        f"{CANNOT}  - acme/low is listed more than once"
    )


def _register(
    pico: Any, registry: Any, name: str, *, lora: dict[str, Any] | None = None, **artifacts: Any
) -> None:
    settings = {"r": 2, "layers_to_transform": [1, 2, 3], **(lora or {})}
    raw = pico.write_lora(pico.scratch("raw"), seed=7, **settings)
    made = pico.artifacts(seed=1, **artifacts) if artifacts.pop("routing", True) else None
    registry.register(pico.pack(raw, name=name, artifacts=made))


def test_experts_without_what_the_router_needs(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.fresh_library()
    _register(pico, registry, "dan/norows", rows=False)
    _register(pico, registry, "dan/nostatistics", statistics=False)
    _register(pico, registry, "dan/above", gate_layer=2)
    _register(pico, registry, "dan/beside", public_digest="1" * 64)
    _register(pico, registry, "dan/below", lora={"layers_to_transform": [0, 1]})
    experts = ["acme/low", "dan/above", "dan/below", "dan/beside", "dan/norows", "dan/nostatistics"]
    assert _refused(manifest(experts=experts), registry) == (
        f"{CANNOT}"
        "  - dan/above took its statistics at layer 2 with normalization 'rms', the base at layer 1 with 'rms'\n"
        "  - dan/below changes layer 0, below layer 1, where the gate decides\n"
        "  - dan/nostatistics publishes no statistics (train it with `statistics: true`)"
    )
    beside = ", ".join(sorted([pico.public_digest()[:12], "1" * 12]))
    assert _refused(manifest(experts=experts, scorer="learned"), registry) == (
        f"{CANNOT}"
        "  - dan/below has no router row for its layers [0]\n"
        "  - dan/below changes layers [0], for which the base publishes no public row\n"
        "  - dan/norows publishes no router rows (train it with `coordination: {enabled: true}`)\n"
        f"  - the experts' rows were trained beside different public rows ({beside})"
    )


def test_a_base_without_public_artefacts(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.fresh_library("qwen3")
    from registry import Registry

    bare = Registry(pico.scratch("registry"))
    bare.add_base(pico.base("qwen3"), name="qwen3")
    raw = pico.write_lora(pico.scratch("raw"), family="qwen3", seed=7, r=2, layers_to_transform=[1])
    artifacts = pico.artifacts(family="qwen3", seed=1, layers=(1,))
    bare.register(pico.pack(raw, name="acme/low", family="qwen3", artifacts=artifacts))
    assert _refused(manifest(family="qwen3", experts=["acme/low"]), bare) == (
        f"{CANNOT}  - the base publishes no public statistics, which are the class of text that is nobody's "
        "(see `coterie base public-routing --help`)"
    )
    assert plan(manifest(family="qwen3", experts=["acme/low"]), registry)


def test_adapters_on_attention(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.fresh_library()
    _register(pico, registry, "dan/attention", lora={"target_modules": ["q_proj", "down_proj"]})
    assert _refused(manifest(experts=["acme/low", "dan/attention"]), registry) == (
        f"{CANNOT}  - dan/attention adapts linears outside of the FFN; flexolmo routes FFN experts only"
    )


def test_opted_out_owners_with_who_when_and_why(pico: Any, manifest: Callable[..., Any]) -> None:
    registry = pico.fresh_library()
    acme = registry.opt_out("acme", reason="contract ended", by="ann")
    zoe = registry.opt_out("zoe", reason="changed her mind", by="zoe herself")
    assert _refused(manifest(), registry, ConsentError) == (
        "The manifest names experts of owners who have opted out. Remove them, or list the owners under "
        "'opt_out':\n"
        f"  - acme/low: acme opted out on {acme.when} (recorded by ann): contract ended\n"
        f"  - zoe/low: zoe opted out on {zoe.when} (recorded by zoe herself): changed her mind"
    )
    planned = plan(manifest(opt_out=("acme", "zoe")), registry)
    assert planned.owners == ("bob",)
    assert planned.left_out == ("acme/low", "zoe/low")
    registry.opt_in("acme", reason="new contract", by="ann")
    assert plan(manifest(opt_out=("zoe",)), registry).owners == ("acme", "bob")


def test_opting_everybody_out(pico: Any, manifest: Callable[..., Any]) -> None:
    assert _refused(manifest(opt_out=pico.owners), pico.library()) == (
        "Manifest 'pico': opt_out leaves no expert (acme/low, bob/low, zoe/low). Use the base 'llama' itself, or "
        "leave fewer owners out."
    )
