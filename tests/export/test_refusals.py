"""What has no exact stock form is refused with every reason at once, and with what would help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS_LACK = (
    "and a stock gate routes to every expert in every layer; a copy of the anchor is exact with `top_k: 1` and "
    "`normalize: true` only, so compose experts of the same layers"
)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], bool, tuple[str, ...]]] = {
    "bias": (
        "llama",
        ("acme/biased", "bob/full"),
        {},
        False,
        (
            "acme/biased has a negative router bias (-1), and stock gates have none and would ignore it; --calibrate "
            "drops it and measures what that costs",
        ),
    ),
    "running mean": (
        "llama",
        ("bob/full",),
        {"context": "running_mean"},
        False,
        (
            "the context 'running_mean' has no stock form, stock gates look at one token; compose with "
            "`context: token`",
        ),
    ),
    "normalisation": (
        "llama",
        ("acme/full", "bob/full"),
        {"normalize": False},
        False,
        (
            "Mixtral lets the chosen weights sum to 1 and the composition does not; compose with `normalize: true`",
        ),
    ),
    "low rank": (
        "llama",
        ("acme/low", "bob/full"),
        {},
        False,
        ("acme/low is low-rank (at most 2); --densify writes it in full",),
    ),
    "layers without experts": (
        "llama",
        ("acme/some", "bob/some"),
        {},
        False,
        ("layers 0, 3 have no experts and need copies of the anchor; --densify does it",),
    ),
    "layers without experts, weights of another sum": (
        "olmo2",
        ("acme/some", "bob/some"),
        {"normalize": False},
        True,
        (
            "layers 0, 3 have no experts, and copies of the anchor stand for it only where weights sum to 1; compose "
            "with `normalize: true`",
        ),
    ),
    "layers of some": (
        "llama",
        ("acme/some", "bob/full", "zoe/full"),
        {},
        True,
        (f"layers 0, 3 lack acme/some, {LAYERS_LACK}",),
    ),
    "layers of some, one choice": (
        "llama",
        ("acme/some", "bob/full"),
        {"top_k": 1},
        False,
        (
            "layers 0, 3 lack acme/some, and a stock gate routes to every expert in every layer, which a copy of the "
            "anchor with its row answers; --densify does it",
        ),
    ),
    "everything at once": (
        "olmo2",
        ("acme/biased", "bob/some", "acme/low"),
        {"context": "running_mean", "normalize": False},
        False,
        (
            "the base is of the family 'olmo2', Mixtral is exact for llama and mistral; use --to flex_olmo",
            "the context 'running_mean' has no stock form, stock gates look at one token; compose with "
            "`context: token`",
            "Mixtral lets the chosen weights sum to 1 and the composition does not; compose with `normalize: true`",
            "acme/biased has a negative router bias (-1), and stock gates have none and would ignore it; --calibrate "
            "drops it and measures what that costs",
            "acme/low is low-rank (at most 2); --densify writes it in full",
            f"layers 0, 3 lack bob/some, {LAYERS_LACK}",
        ),
    ),
}


@pytest.mark.parametrize(("family", "experts", "router", "densify", "problems"), CASES.values(), ids=CASES)
def test_refusal_lists_every_reason(
    family: str,
    experts: tuple[str, ...],
    router: dict[str, Any],
    densify: bool,
    problems: tuple[str, ...],
    stock: Any,
    message: Callable[..., str],
) -> None:
    from composer.export.exporting import plan_export

    target = "mixtral" if len(problems) > 1 else stock.targets[family]
    title = {"mixtral": "Mixtral", "flex_olmo": "FlexOlmo"}[target]
    folder = stock.composed(family, experts, **router)
    said = message(plan_export, folder, target, densify=densify)
    assert said == "\n".join([f"{folder} is not exactly a {title} model:", *(f"  - {p}" for p in problems)])


def test_solved_router_is_refused(pico: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    folder = pico.composed("stacked", experts=("bob/full",), context="token", scorer="lda")
    said = message(plan_export, folder, "mixtral")
    assert said == (
        f"{folder} is not exactly a Mixtral model:\n"
        "  - the scorer 'lda' has no stock form, stock gates multiply with one row per expert and layer; compose with "
        "`scorer: learned`\n"
        "  - layers 0-1 have no experts and need copies of the anchor; --densify does it"
    )


def test_family_without_a_stock_class_is_refused(pico: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    folder = pico.composed(
        "stacked", family="gpt_neox", experts=("bob/full",), context="token", scorer="learned"
    )
    assert message(plan_export, folder, "qwen3_moe").splitlines()[1] == (
        "  - the base is of the family 'gpt_neox', Qwen3-MoE is exact for qwen3; no stock class that is known here "
        "has its blocks"
    )


OLMOE = (
    "OLMoE is exact for qwen3 with one attention head (it norms what enters attention and FFN, and queries and keys "
    "over all heads together, as no other dense class does)"
)


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("olmo2", f"the base is of the family 'olmo2', {OLMOE}; use --to flex_olmo"),
        ("llama", f"the base is of the family 'llama', {OLMOE}; use --to mixtral"),
        (
            "qwen3",
            "the base norms queries and keys in each of its 4 heads, OLMoE over all heads together; use "
            "--to qwen3_moe",
        ),
    ],
)
def test_bases_that_are_no_olmoe(family: str, problem: str, stock: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    folder = stock.composed(family)
    said = message(plan_export, folder, "olmoe")
    assert said == f"{folder} is not exactly an OLMoE model:\n  - {problem}"


def test_one_head_is_not_enough_for_olmoe() -> None:
    from composer.export import TARGETS

    config = {"num_attention_heads": 1, "hidden_size": 32, "head_dim": 64, "use_sliding_window": True}
    assert TARGETS.load("olmoe")().setting_problems(config) == [
        "the base's head is 64 wide, OLMoE's as wide as the states (32)",
        "the base uses sliding windows in some layers; OLMoE has none",
    ]


def test_no_dense_class_has_the_blocks_of_olmoe() -> None:
    """The reason of the refusals, looked up: norms over all heads stand in classes with norms behind the blocks."""
    import re

    import transformers.models
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    root = Path(transformers.models.__file__).parent
    over_all_heads = re.compile(
        r"self\.q_norm = \w+\((self\.|config\.)(hidden_size|num_\w+ \* self\.head_dim)"
    )
    found = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = root / kind / f"modeling_{kind}.py"
        if code.is_file() and over_all_heads.search(code.read_text()):
            found.add(kind)
    behind = {kind for kind in found if "post_feedforward_layernorm" in _code(root, kind)}
    assert behind == {"flex_olmo", "olmo2", "olmo3", "olmo_hybrid"}
    mixtures = {kind for kind in found - behind if "num_experts_per_tok" in _code(root, kind)}
    assert mixtures == {"minimax_m2", "olmoe"}
    assert found - behind - mixtures == {"blt"}, "only the cross attention of a model of bytes"


def _code(root: Path, kind: str) -> str:
    return "".join(path.read_text() for path in (root / kind).glob("*.py"))


def test_unknown_target_and_owner(stock: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    folder = stock.composed("llama")
    assert message(plan_export, folder, "mixtrl") == (
        "Unknown export target 'mixtrl'. Did you mean 'mixtral'? Known: flex_olmo, mixtral, olmoe, qwen3_moe."
    )
    assert message(plan_export, folder, "mixtral", opt_out={"bop"}) == (
        "Unknown owner 'bop'. Did you mean 'bob'? Known: acme, bob, zoe."
    )
    assert message(plan_export, folder, "mixtral", opt_out={"acme", "bob", "zoe"}) == (
        f"Nobody is left in {folder} to export. Use the base 'llama' itself, in {folder / 'base'}."
    )


def test_biases_that_the_composition_ignores_do_not_matter(stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed("llama", ("acme/biased", "bob/full"), options={"bias": False})
    out = stock.export(folder, "mixtral")
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


def test_a_bias_that_were_dropped_would_show(stock: Any, pico: Any) -> None:
    """The control of the refusal: it is not refused for nothing."""
    ids = pico.prompts()
    kept = stock.logits(stock.composed("llama", ("acme/biased", "bob/full")), ids)
    dropped = stock.logits(stock.composed("llama", ("acme/biased", "bob/full"), options={"bias": False}), ids)
    assert (kept - dropped).abs().max() > 1e-3


def test_what_the_class_has_no_place_for() -> None:
    from composer.export import TARGETS

    mixtral, qwen = (TARGETS.load(name)() for name in ("mixtral", "qwen3_moe"))
    names = [
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.11.input_layernorm.weight",
    ]
    assert mixtral.misfits(names) == ["model.layers.0.self_attn.q_proj.bias"]
    assert qwen.misfits(names) == []
    assert qwen.setting_problems({"use_sliding_window": True}) == [
        "the base uses sliding windows in some layers; Qwen3-MoE has one window for all of them"
    ]


def test_file_that_changed_since_the_build_is_refused(
    stock: Any, pico: Any, message: Callable[..., str]
) -> None:
    import shutil

    from composer.export.exporting import plan_export

    folder = pico.scratch("changed")
    shutil.copytree(stock.composed("llama"), folder)
    other = pico.base("qwen3") / "model.safetensors"
    (folder / "base" / "model.safetensors").unlink()
    shutil.copy(other, folder / "base" / "model.safetensors")
    assert message(plan_export, folder, "mixtral") == (
        f"The files in {folder / 'base'} are not the anchor's. Build the folder again."
    )


def test_expert_that_was_made_from_a_left_out_one_is_refused(
    stock: Any, pico: Any, message: Callable[..., str]
) -> None:
    import shutil

    from composer.export.exporting import plan_export

    folder = pico.scratch("mixed")
    shutil.copytree(stock.composed("llama"), folder)
    lock = json.loads((folder / "composition.json").read_text())
    zoe = next(e["digest"] for e in lock["experts"] if e["owner"] == "zoe")
    lock["lineage"] = {p: ["bob", "zoe"] if zoe in p else who for p, who in lock["lineage"].items()}
    (folder / "composition.json").write_text(json.dumps(lock))
    assert message(plan_export, folder, "mixtral", opt_out={"bob"}) == (
        "zoe/full was made from experts of an owner who is left out, so the checkpoint would not be without them. "
        "Leave it out too, or compose anew from what it was made of."
    )
    assert plan_export(folder, "mixtral", opt_out={"bob", "zoe"}).left_out == ("bob", "zoe")
