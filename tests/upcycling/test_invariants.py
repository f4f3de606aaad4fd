"""Properties of mixtures of whole models that a change must not lose: here, and where they are tested elsewhere.

===  ======================================================================  =======================================
U1   n copies of one model, behind any normalised gate, are that model;      here; test_attention;
     a gate that is not renormalised scales the answer by its probability    mergekit_moe/test_function
U2   parameters and FLOPs are those published for BAM and BTX                test_parameters; experiments/
                                                                             test_upcycling (arithmetic)
U3   leaving is never having joined, also where k exceeds who is left;       here; test_trunk; test_merge;
     where the trunk is merged, the model built without them counts          tune/test_upcycled
U4   saved and loaded, or loaded by stock classes: equal logits, no tensor   here (shards of the classic layout);
     missing or unexpected, the index's size is that of the tensors          test_attention; mergekit_moe/
                                                                             test_function, test_oracle
U5   every tensor of every model is used, or dropped for a stated reason     test_trunk (every tensor of an expert);
                                                                             mergekit_moe/test_refusals
U6   width, depth, heads, rotary embedding, vocabulary, tied head, epsilon,  here (depth, heads, the base it was
     tokenizer, the base and dtypes are compared before anything is written  tuned from); experts/test_dense_kind;
                                                                             cli/test_whole_models
U7   statistics are additive: solved from the others' sums, bit for bit      test_routers (ridge additivity)
     never joined; with somebody's sums subtracted, only close
U8   statistics are of what a router reads while all tokens go to one        here (rows, temperature); test_routers
     expert, in float64; rows made of prompts have length 1
U9   comparisons show top-1, top-2, soft and active-matched BTX with the     here; experiments/test_upcycling
     seed in it, soup, BTM and training together
U10  tuning's defaults are the published ones: experts frozen, load          here; tune/test_objective (the
     balancing 0.01, z-loss 0.001, rate 1e-4, text in equal shares           formulas); tune/test_upcycled
U11  a cache per attention expert and layer; cached == uncached              test_attention
U12  a failed build leaves no folder                                         here (a model that is gone); composer/
                                                                             test_build; mergekit_moe/test_refusals
===  ======================================================================  =======================================

An expert's cache in layer ``l`` is place ``j L + l`` of ``N L``, expert by expert, so that the first stands where the
base's own attention would and any cache of transformers serves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.loading import load
from composer.lock import Lock
from composer.manifest import Manifest
from composer.planning import plan
from experts.errors import AdmissionError, CoterieError, PlanError

TOLERANCE = 1e-5
TWINS = ["acme/twin", "bob/twin"]
NORMAL = {"options": {"seed": 5, "distribution": "normal"}}
"""Router rows that are far from alike."""


def _logits(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **settings).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("btx", {"top_k": 1, "normalize": True, "upcycle": {"seed_expert": False}, **NORMAL}),
        ("btx", {"top_k": 2, "normalize": True, "upcycle": {"seed_expert": False}, **NORMAL}),
        ("btx", {"top_k": 2, "normalize": False, "upcycle": {"seed_expert": False}, **NORMAL}),
        ("soup", {}),
        ("merge", {"upcycle": {"trunk": {"method": "ties"}}}),
        ("merge", {"upcycle": {"trunk": {"method": "karcher"}}}),
    ],
    ids=["btx 1 of 2", "btx 2 of 2", "btx soft", "soup", "ties", "karcher"],
)
def test_u1_equal_models_are_the_model(
    recipe: str, settings: dict[str, Any], pico: Any, twins: Any, ids: torch.Tensor
) -> None:
    """Both of two experts' probabilities sum to 1 with and without being renormalised."""
    registry, dense = twins("llama")
    manifest = pico.manifest("dense", recipe=recipe, experts=TWINS, **settings)
    model = load(pico.compose(manifest, registry=registry))
    torch.testing.assert_close(_logits(model, ids), _logits(dense, ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("recipe", ["btx", "bam"])
def test_u3_more_experts_a_token_than_are_left(recipe: str, folder: Any, ids: torch.Tensor) -> None:
    path = folder(recipe, upcycle={"trunk": "frozen"}, top_k=4, normalize=True)
    never = load(folder(recipe, upcycle={"trunk": "frozen"}, experts=("zoe/dense",), top_k=4, normalize=True))
    expected = _logits(never, ids)
    assert torch.equal(_logits(load(path, opt_out={"acme", "bob"}), ids), expected)
    found = _logits(load(path), ids, opt_out=[{"acme", "bob"}] * len(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_u3_a_merged_trunk_needs_the_others_files(pico: Any, folder: Any) -> None:
    """It is merged anew at load from the files of those who stay; without these it is refused, with the reason."""
    path = Path(shutil.copytree(folder("btx"), pico.scratch("lost")))
    bob = next(expert for expert in Lock.read(path).experts if expert.owner == "bob")
    lost = path / bob.folder / "model.safetensors"
    size = lost.stat().st_size
    lost.unlink()
    with pytest.raises(CoterieError) as caught:
        load(path, opt_out={"acme"})
    assert str(caught.value) == (
        f"{lost} is missing or has been changed (expected {size} bytes). Build the folder again."
    )
    assert caught.value.exit_code == 2
    load(path, opt_out={"bob"})


def test_u4_shards_of_the_classic_layout(pico: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    """Copies of one model in per-expert tensors, over several files, as transformers' own class loads them."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from composer.mergekit_moe.manifest import parse
    from composer.mergekit_moe.planning import plan_moe
    from composer.mergekit_moe.writing import build_moe

    base = str(pico.base("llama"))
    wish = {"base_model": base, "gate_mode": "random", "experts": [{"source_model": base} for _ in range(3)]}
    build_moe(plan_moe(parse(wish), layout="classic"), tmp_path / "out", shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 2
    assert {name: shard for shard, held in shards.items() for name in held} == index["weight_map"]
    sizes = [tensor.nbytes for held in shards.values() for tensor in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(_logits(model, ids), _logits(pico.dense(), ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers: the expert has 3, the base 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: the expert has nothing, the base 2"),
        ({"head_dim": 16}, "head_dim: the expert has 16, the base nothing"),
    ],
    ids=["depth", "groups of queries", "width of heads"],
)
def test_u6_shapes_of_attention(setting: Any, line: str, pico: Any) -> None:
    """As many heads as there are, and heads as wide as the state divided by them, are what saying nothing means."""
    raw = pico.write_dense(pico.scratch("raw"), seed=5)
    config = json.loads((raw / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(AdmissionError) as caught:
        pico.pack(raw, name="acme/odd")
    advice = "fine-tune the base itself; if it is the same, save both with the same version of transformers"
    assert str(caught.value) == (
        f"config.json in '{raw}' is not that of the base 'llama':\n  - {line}; {advice}"
    )


def test_u6_models_tuned_from_another_base(pico: Any) -> None:
    registry = pico.fresh_dense_library()
    registry.add_base(pico.base(seed=1), name="twin")
    manifest = Manifest.from_dict({**pico.manifest("dense", recipe="btx").to_dict(), "base": "twin"})
    with pytest.raises(PlanError) as caught:
        plan(manifest, registry)
    mine, other = pico.description().fingerprint, pico.description(seed=1).fingerprint
    assert caught.value.problems[0] == (
        f"acme/dense was trained on another anchor: 'llama' with fingerprint {mine}; this composition's is 'twin' with "
        f"{other}"
    )


def test_u8_scales_are_in_the_manifest(pico: Any, loaded: Any) -> None:
    """Directions have length 1 times the scale; the ridge's shares are divided by the temperature."""
    rows = loaded("btx", upcycle={"trunk": "frozen"}, scorer="prompts").base.model.layers[2].mlp.router
    assert rows.scorer.rows[1:].norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    warm, cold = (
        loaded("btx", upcycle={"trunk": "frozen"}, scorer="dume", options={"temperature": temperature})
        .base.model.layers[2]
        .mlp.router.scorer
        for temperature in (0.5, 0.25)
    )
    states = torch.randn(6, pico.width)
    one, other = (scorer(states, None, (0, 1, 2, 3)) for scorer in (warm, cold))
    torch.testing.assert_close(2 * one, other, rtol=1e-5, atol=1e-6)
    shares = torch.ones(6)  # of the domains; the regression's intercept makes them sum to 1
    torch.testing.assert_close(0.5 * one.sum(-1), shares, rtol=0, atol=1e-5)


def test_u9_every_baseline_has_the_seed_in_it() -> None:
    from pipelines.experiments.upcycling.arms import ARMS

    shown = {"seed", "expert", "soup", "btm", "btx_top1", "btx_top2", "btx_soft", "btx_active_matched"}
    assert shown | {"bam_own_kv", "bam_shared_kv", "unrestricted"} <= set(ARMS)
    from composer.recipes.bam import BAM
    from composer.recipes.btx import BTX

    assert (BTX.defaults["seed_expert"], BAM.defaults["seed_expert"]) == (True, True)


@pytest.mark.parametrize("arm", ["btx_top1", "btx_top2", "btx_soft", "bam_own_kv", "bam_shared_kv"])
def test_u9_what_an_arm_composes_has_the_seed_in_it(arm: str) -> None:
    """The manifest that the arm asks for, its recipe's defaults written out."""
    from types import SimpleNamespace

    from composer.recipes import RECIPES
    from pipelines.experiments.upcycling.arms import ARMS

    asked: list[Manifest] = []

    class ComposedError(Exception):
        pass

    def mixture(name: str, *, recipe: str, upcycle: Any, router: Any, **_: Any) -> None:
        wish = {
            "name": name,
            "recipe": recipe,
            "base": "x",
            "experts": ["a/b"],
            "upcycle": upcycle,
            "router": router,
        }
        asked.append(RECIPES.load(recipe)().expand(Manifest.from_dict(wish)))
        raise ComposedError

    domains = ["code", "law"]
    world = SimpleNamespace(
        mixture=mixture, expert_name="{}/dense".format, settings=SimpleNamespace(domains=domains)
    )
    with pytest.raises(ComposedError):
        ARMS.load(arm)(world)
    assert [wish.upcycle.seed_expert for wish in asked if wish.upcycle] == [True]


def test_u10_tuning_as_published(pico: Any, tmp_path: Path) -> None:
    from composer.tuned import parameter_groups, trained_names
    from pipelines.tune.job import TuneJob

    (tmp_path / "a.txt").write_text("a text")
    sources = [{"text": "a.txt", "owner": "acme"}, {"text": "a.txt", "public": True}]
    job = TuneJob.from_dict({"data": sources}, root=tmp_path)
    assert (job.train, job.learning_rate, job.weight_decay, job.schedule) == ("routers", 1e-4, 0.1, "cosine")
    assert (job.load_balancing.weight, job.load_balancing.over) == (0.01, "global_batch")
    assert (job.router_z_loss, job.grad_clip) == (1e-3, 1.0)
    shares = [value for key, value in job.settings().items() if key.startswith("share of")]
    assert shares == [0.5, 0.5]
    model = load(pico.composed("dense", recipe="btx"))
    groups = parameter_groups(model)
    for parts in ("routers", "trunk"):
        assert not [name for name in trained_names(groups, parts) if groups[name] == "experts"]


def test_u10_losses_are_of_ffn_routers_alone(loaded: Any, ids: torch.Tensor) -> None:
    """Attention uses every expert, so there is no load to balance."""
    from pipelines.tune.objective import routing_decisions

    model = loaded("bam", upcycle={"trunk": "frozen"})
    with routing_decisions() as decisions:
        model(ids, use_cache=False)
    assert [layer for layer, _ in decisions] == [0, 1, 2, 3]
    assert {decision.indices.shape for _, decision in decisions} == {(ids.numel(), 1)}


def test_u12_a_model_that_is_gone_leaves_no_folder(pico: Any, tmp_path: Path) -> None:
    from composer.building import build

    registry = pico.fresh_dense_library()
    planned = plan(pico.manifest("dense", recipe="bam"), registry)
    registry.files(registry.expert("zoe/dense"))["model.safetensors"].unlink()
    with pytest.raises(CoterieError) as caught:
        build(planned, tmp_path / "out", registry=registry)
    assert str(caught.value).startswith("The blob sha256:")
    assert " is missing from the registry " in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
