"""The trunk: the base's own bit for bit, or the merge of whoever is in the model, at load and after a removal."""

from __future__ import annotations

import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.verify import verify_optout
from experts.errors import BuildError, OptOutError, PlanError


def _logits(model: Any, ids: Any, **settings: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **settings).logits


def _trunk(model: Any, *, attention: str) -> dict[str, torch.Tensor]:
    """The tensors that no expert has of its own, by their names in a checkpoint."""
    found = {}
    for name, tensor in model.base.state_dict().items():
        shared = [f".self_attn.experts.0.{child}.inner" for child in ("k_proj", "v_proj")]
        if attention == "shared" and any(part in name for part in shared):
            found[name.replace("experts.0.", "").replace("inner.", "")] = tensor
        elif ".mlp." not in name and (attention == "none" or ".self_attn." not in name):
            found[name] = tensor
    return found


CASES = [("btx", {}, "none"), ("bam", {"attention": {"kv": "own"}}, "own"), ("bam", {}, "shared")]


@pytest.mark.parametrize(("recipe", "upcycle", "attention"), CASES, ids=["btx", "own", "shared"])
def test_average_is_the_mean_with_the_seed(
    loaded: Any, state: Any, recipe: str, upcycle: Any, attention: str
) -> None:
    trunk = _trunk(loaded(recipe, upcycle=upcycle), attention=attention)
    models = [state(owner) for owner in ("base", "acme", "bob", "zoe")]
    per_layer = {"none": 2 + 4, "own": 2, "shared": 2 + 2}[attention]
    assert len(trunk) == 3 + 4 * per_layer
    for name, tensor in trunk.items():
        assert torch.equal(tensor, reduce(torch.add, [model[name] for model in models]) / 4), name


def test_without_the_seed_it_is_the_mean_of_the_experts(loaded: Any, state: Any) -> None:
    trunk = _trunk(loaded("btx", upcycle={"seed_expert": False}), attention="none")
    models = [state(owner) for owner in ("acme", "bob", "zoe")]
    for name, tensor in trunk.items():
        assert torch.equal(tensor, reduce(torch.add, [model[name] for model in models]) / 3), name


def test_weights(loaded: Any, state: Any) -> None:
    weights = {"base": 0.0, "acme/dense": 2.0, "bob/dense": 0.0, "zoe/dense": 0.0}
    trunk = _trunk(
        loaded("btx", upcycle={"trunk": {"method": "average", "weights": weights}}), attention="none"
    )
    own = state("acme")
    for name, tensor in trunk.items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=1e-6)


def test_other_methods_get_the_models_and_settings(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from composer.upcycling import trunk

    asked: list[Any] = []
    real = trunk.merge_tensors

    def watched(tensors: Any, *, method: str, **settings: Any) -> Any:
        asked.append(
            (list(tensors), method, settings["base"] is not None, settings["weights"], settings["name"])
        )
        return real(tensors, **{**settings, "method": "average", "parameters": {}})

    spec = {"method": "ties", "weights": {"acme/dense": 0.5}, "parameters": {"density": 0.5}}
    path = folder("btx", upcycle={"trunk": spec})
    monkeypatch.setattr(trunk, "merge_tensors", watched)
    load(path)
    names = ["acme/dense", "bob/dense", "zoe/dense"]
    assert all(entry[:4] == (names, "ties", True, {"acme/dense": 0.5}) for entry in asked)
    assert "model.embed_tokens.weight" in [entry[4] for entry in asked]


@pytest.mark.parametrize(("recipe", "upcycle", "attention"), CASES, ids=["btx", "own", "shared"])
def test_frozen_is_the_base_bit_for_bit(
    loaded: Any, state: Any, recipe: str, upcycle: Any, attention: str
) -> None:
    trunk = _trunk(loaded(recipe, upcycle={**upcycle, "trunk": "frozen"}), attention=attention)
    base = state("base")
    for name, tensor in trunk.items():
        assert torch.equal(tensor, base[name]), name


def test_every_tensor_of_an_expert_is_used(loaded: Any, state: Any) -> None:
    """Frozen, with keys and values of their own: the experts' FFNs and attention, bit for bit."""
    model = loaded("bam", upcycle={"attention": {"kv": "own"}, "trunk": "frozen"})
    tensors = model.base.state_dict()
    for expert, owner in enumerate(("base", "acme", "bob", "zoe")):
        own = state(owner)
        for name in (n for n in own if ".self_attn." in n):
            place = name.replace(".self_attn.", f".self_attn.experts.{expert}.").replace(
                ".weight", ".inner.weight"
            )
            assert torch.equal(tensors[place], own[name]), (owner, name)
        for layer in range(4):
            prefix = f"model.layers.{layer}.mlp"
            both = torch.cat([own[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up")])
            assert torch.equal(tensors[f"{prefix}.experts.gate_up_proj"][expert], both)
            down = own[f"{prefix}.down_proj.weight"]
            assert torch.equal(tensors[f"{prefix}.experts.down_proj"][expert], down)


def test_proof_where_the_trunk_is_merged(folder: Any) -> None:
    path = folder("bam")
    assert Lock.read(path).optout_class == "recompose"
    rows = verify_optout(path, owner="bob")
    assert [(row.door, row.bit_identical, row.passed) for row in rows] == [
        ("build", True, True),
        ("load", True, True),
    ]
    assert Lock.read(folder("bam", upcycle={"trunk": "frozen"})).optout_class == "exact"


def test_one_owner_of_copies_leaves_the_base(pico: Any, folder: Any, ids: Any) -> None:
    path = folder("sparse_upcycle", experts=("acme/dense",))
    left = load(path, opt_out={"acme"})
    with torch.inference_mode():
        assert torch.equal(left(ids).logits, pico.dense()(ids).logits)


def test_files_of_who_is_left_out_are_not_opened(pico: Any, folder: Any, ids: Any) -> None:
    path = Path(shutil.copytree(folder("bam"), pico.scratch("copy")))
    expected = _logits(load(path, opt_out={"zoe"}), ids)
    theirs = [expert for expert in Lock.read(path).experts if expert.owner == "zoe"]
    for expert in theirs:
        shutil.rmtree(path / expert.folder)
    assert torch.equal(_logits(load(path, opt_out={"zoe"}), ids), expected)


def test_removing_and_adding_merge_anew(pico: Any, folder: Any, ids: Any) -> None:
    whole = folder("bam")
    path = Path(shutil.copytree(whole, pico.scratch("edited")))
    remove_experts(path, ["zoe"])
    never = folder("bam", experts=("acme/dense", "bob/dense"))
    assert torch.equal(_logits(load(path), ids), _logits(load(never), ids))
    add_experts(path, ["zoe/dense"], registry=pico.dense_library())
    assert Lock.read(path).to_bytes() == Lock.read(whole).to_bytes()
    assert torch.equal(_logits(load(path), ids), _logits(load(whole), ids))


def test_requests_are_refused_with_the_reason(loaded: Any, ids: Any) -> None:
    model = loaded("bam")
    with pytest.raises(OptOutError) as caught:
        model(ids, opt_out=[{"acme"}, set(), set(), set()])
    assert str(caught.value) == (
        "The trunk of this composition is merged from every owner's model, so a request cannot leave anybody out. "
        "Load the composition with opt_out={...}, which merges the trunk of the others anew; take the owner out with "
        "`coterie remove`; or build with `trunk: frozen`."
    )
    assert caught.value.exit_code == 2
    model(ids, opt_out=[set()] * 4)
    with pytest.raises(OptOutError) as alone:
        loaded("sparse_upcycle", experts=("acme/dense",))(ids, opt_out={"acme"})
    assert str(alone.value) == (
        "Every tensor of this composition is of one owner's model, so a request cannot leave that owner out. Use the "
        "base itself, or load the composition with opt_out={...}."
    )


def test_somebody_must_answer(loaded: Any, ids: Any) -> None:
    model = loaded("btx", upcycle={"trunk": "frozen", "seed_expert": False})
    with pytest.raises(OptOutError) as caught:
        model(ids, opt_out=[{"acme", "bob", "zoe"}, set(), set(), set()])
    assert str(caught.value) == (
        "A row leaves every owner out, and the anchor is no expert here (`seed_expert: false`), so nobody is left to "
        "answer. Leave somebody in, or use the base itself."
    )


@pytest.mark.parametrize(
    ("recipe", "settings", "problems"),
    [
        (
            "btx",
            {"upcycle": {"trunk": {"method": "tie"}}},
            ["upcycle.trunk: Unknown merge method 'tie'. Did you mean 'ties'?"],
        ),
        (
            "btx",
            {"upcycle": {"trunk": {"method": "average", "weights": {"bob/dens": 1.0}}}},
            [
                "upcycle.trunk: weights: Unknown model 'bob/dens'. Did you mean 'bob/dense'? Known: acme/dense, "
                "base, bob/dense, zoe/dense."
            ],
        ),
        (
            "btx",
            {"upcycle": {"copies": 2}},
            ["upcycle.copies: btx has no such setting; it has trunk, seed_expert"],
        ),
        (
            "sparse_upcycle",
            {"upcycle": {"trunk": "frozen"}, "scorer": "lda"},
            [
                "upcycle.trunk: sparse_upcycle has no such setting; it has copies",
            ],
        ),
        (
            "sparse_upcycle",
            {"scorer": "lda"},
            [
                "sparse_upcycle copies one dense model, and 3 are named; name one, or use recipe `btx`",
                "router.scorer: 'lda' cannot tell copies apart; use 'random'",
            ],
        ),
        (
            "bam",
            {"scorer": "learned"},
            [
                "router.scorer: 'learned' has rows for FFNs only, and bam routes attention too; use 'random', "
                "'prompts', 'lda', 'ridge' or 'dume'"
            ],
        ),
        (
            "bam",
            {"family": "phi3"},
            [
                "upcycle.attention.kv: the base's attention has no k_proj and v_proj of their own (it has o_proj, "
                "qkv_proj), so they cannot be shared; write `kv: own`"
            ],
        ),
        (
            "flexolmo",
            {"upcycle": {"trunk": "frozen"}},
            ["upcycle: recipe 'flexolmo' has none; btx, bam, sparse_upcycle, merge and soup do"],
        ),
    ],
)
def test_refusals(pico: Any, recipe: str, settings: Any, problems: list[str]) -> None:
    from composer.planning import plan

    manifest = pico.manifest("dense", recipe=recipe, **settings)
    library = pico.dense_library(settings.get("family", "llama"))
    with pytest.raises(PlanError) as caught:
        plan(manifest, library)
    told = [problem.partition(" Known: arcee")[0] for problem in caught.value.problems]
    assert told == problems


@pytest.mark.parametrize(
    ("recipe", "settings", "warned"),
    [
        ("btx", {"top_k": 4}, []),
        ("btx", {"top_k": 5}, ["router.top_k is 5, but a layer has 4 experts, the base counted"]),
        (
            "btx",
            {"top_k": 4, "upcycle": {"seed_expert": False}},
            ["router.top_k is 4, but a layer has 3 experts"],
        ),
        (
            "bam",
            {"upcycle": {"attention": {"top_k": 9}}},
            ["upcycle.attention.top_k is 9, but a layer has 4 experts, the base counted"],
        ),
        ("sparse_upcycle", {"top_k": 4, "experts": ["acme/dense"]}, []),
        (
            "sparse_upcycle",
            {"top_k": 3, "experts": ["acme/dense"], "upcycle": {"copies": 2}},
            ["router.top_k is 3, but a layer has 2 experts"],
        ),
    ],
)
def test_more_experts_a_token_than_a_layer_has(
    recipe: str, settings: Any, warned: list[str], pico: Any
) -> None:
    """Not refused, since owners may leave."""
    from composer.planning import plan

    found = plan(pico.manifest("dense", recipe=recipe, **settings), pico.dense_library()).warnings
    assert list(found) == [f"{text}; every token uses all of them." for text in warned]


def test_kinds_that_other_recipes_compose(pico: Any) -> None:
    from composer.planning import plan

    with pytest.raises(PlanError) as caught:
        plan(pico.manifest("low_rank", recipe="btx", experts=["acme/low", "bob/full"]), pico.library())
    assert list(caught.value.problems) == [
        "acme/low is of kind 'lora'; btx composes dense (recipes for lora: flexolmo, merge, soup)",
        "bob/full is of kind 'ffn'; btx composes dense (recipes for ffn: flexolmo, merge, soup)",
    ]


def test_settings_that_no_load_could_use_are_refused_by_the_plan(pico: Any) -> None:
    from composer.planning import plan

    spec = {"method": "della", "parameters": {"density": 0.5, "epsilon": 0.9}}
    for recipe in ("btx", "merge"):
        with pytest.raises(PlanError) as caught:
            plan(pico.manifest("dense", recipe=recipe, upcycle={"trunk": spec}), pico.dense_library())
        assert list(caught.value.problems) == [
            "upcycle.trunk: parameters: method 'della' has density 0.5 and epsilon 0.9; density - epsilon must be "
            "above 0 and density + epsilon below 1, unless density is 1"
        ]


def test_what_is_left_of_a_whole_merge_must_be_mergeable(folder: Any) -> None:
    path = folder("merge", upcycle={"trunk": {"method": "model_stock"}}, experts=("acme/dense", "bob/dense"))
    with pytest.raises(BuildError) as caught:
        load(path, opt_out={"acme"})
    assert str(caught.value) == (
        "The trunk of bob/dense cannot be merged:\n"
        "  - method 'model_stock' merges at least 2 models beside the base; 1 given"
    )


def test_what_is_left_must_be_mergeable(folder: Any) -> None:
    weights = {"base": 0.0, "acme/dense": 1.0, "bob/dense": 0.0, "zoe/dense": 0.0}
    path = folder("btx", upcycle={"trunk": {"method": "average", "weights": weights}})
    with pytest.raises(BuildError) as caught:
        load(path, opt_out={"acme"})
    assert str(caught.value) == (
        "The trunk of bob/dense, zoe/dense cannot be merged:\n"
        "  - weights: they sum to 0; their mean is not defined"
    )
