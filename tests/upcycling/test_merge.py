"""Whole models merged into one: mergekit's own merge of the folders is the oracle; leaving merges the others anew."""

from __future__ import annotations

import shutil
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.editing import remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.verify import verify_optout
from experts.errors import OptOutError, PlanError

TIES = {"trunk": {"method": "ties", "weights": {"bob/dense": 0.5}, "parameters": {"density": 0.6}}}


def _logits(model: Any, ids: Any, **settings: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **settings).logits


@pytest.mark.parametrize(
    ("method", "weights", "parameters"),
    [
        ("ties", [1.0, 0.5, 1.0], {"density": 0.6}),
        ("model_stock", None, {}),
        ("sce", None, {"select_topk": 0.5}),
        ("task_arithmetic", [0.2, 0.3, 0.4], {"lambda": 0.8}),
        ("karcher", None, {}),
    ],
)
def test_tensors_are_those_of_mergekits_own_merge(
    method: str, weights: Any, parameters: Any, loaded: Any, pico: Any, tmp_path: Path
) -> None:
    from composer.merge_methods import METHODS

    names = ("acme/dense", "bob/dense", "zoe/dense")
    spec = {"method": method, "parameters": parameters}
    if weights:
        spec["weights"] = dict(zip(names, weights, strict=True))
    ours = loaded("merge", upcycle={"trunk": spec}).base.state_dict()
    library = pico.dense_library()
    entries = []
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, blob in library.files(library.expert(name)).items():
            shutil.copyfile(blob, folder / file)
        own = {"weight": weights[number]} if weights else {}
        entries.append({"model": str(folder), **({"parameters": own} if own else {})})
    config: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "float32"}
    if METHODS[method].base == "needed":
        config |= {"base_model": str(pico.base())}
    config |= {"parameters": parameters} if parameters else {}
    theirs = _run_merge(config, tmp_path / "merged")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)


def _run_merge(config: dict[str, Any], out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False))
    found: dict[str, Any] = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    assert found
    return found


def test_soup_is_the_mean(loaded: Any, state: Any) -> None:
    merged = loaded("soup").base.state_dict()
    models = [state(owner) for owner in ("acme", "bob", "zoe")]
    for name in models[0]:
        assert torch.equal(merged[name], reduce(torch.add, [model[name] for model in models]) / 3), name
    with_base = loaded("soup", upcycle={"seed_expert": True}).base.state_dict()
    models.insert(0, state("base"))
    for name in models[0]:
        assert torch.equal(with_base[name], reduce(torch.add, [model[name] for model in models]) / 4), name


def test_experts_of_other_kinds_take_part_as_whole_models(pico: Any, tmp_path: Path, ids: Any) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    library = pico.library()
    manifest = pico.manifest(recipe="soup", experts=["acme/low", "bob/full"])
    merged = load(pico.compose(manifest, registry=library)).base.state_dict()
    for file, blob in library.files(library.expert("acme/low")).items():
        shutil.copyfile(blob, tmp_path / file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(pico.base())
        low = PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    full = dict(pico.dense().state_dict())
    full |= load_file(library.files(library.expert("bob/full"))["ffn.safetensors"])
    for name, tensor in pico.dense().state_dict().items():
        expected = (low[name] + full[name]) / 2
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5, msg=name)
        if ".mlp." not in name:
            assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize(("recipe", "upcycle"), [("soup", None), ("merge", TIES)], ids=["soup", "ties"])
def test_proof(recipe: str, upcycle: Any, folder: Any) -> None:
    path = folder(recipe, upcycle=upcycle)
    assert Lock.read(path).optout_class == "recompose"
    rows = verify_optout(path, owner="bob")
    assert [(row.door, row.bit_identical, row.passed) for row in rows] == [
        ("build", True, True),
        ("load", True, True),
    ]


def test_leaving_through_every_door(pico: Any, folder: Any, ids: Any) -> None:
    whole = folder("merge", upcycle=TIES)
    left = _logits(load(whole, opt_out={"bob"}), ids)
    without = {"trunk": {**TIES["trunk"], "weights": {}}}
    never = folder("merge", upcycle=without, experts=("acme/dense", "zoe/dense"))
    assert torch.equal(_logits(load(never), ids), left)
    path = Path(shutil.copytree(whole, pico.scratch("edited")))
    remove_experts(path, ["bob"])
    assert torch.equal(_logits(load(path), ids), left)
    assert Lock.read(path).upcycle.trunk.weights == {}
    built = folder("merge", upcycle=TIES, opt_out=("bob",))
    assert torch.equal(_logits(load(built), ids), left)
    everybody = load(whole, opt_out={"acme", "bob", "zoe"})
    assert torch.equal(_logits(everybody, ids), _logits(pico.dense(), ids))


def test_weights_of_who_leaves_leave_too(pico: Any, folder: Any, ids: Any) -> None:
    """In every recipe that merges: a weight that names nobody is refused, so none may be left behind."""
    upcycle = {"trunk": {"method": "average", "weights": {"acme/dense": 2.0, "zoe/dense": 3.0}}}
    whole = folder("btx", upcycle=upcycle)
    left = _logits(load(whole, opt_out={"zoe"}), ids)
    path = Path(shutil.copytree(whole, pico.scratch("edited")))
    remove_experts(path, ["zoe"])
    assert torch.equal(_logits(load(path), ids), left)
    assert torch.equal(_logits(load(folder("btx", upcycle=upcycle, opt_out=("zoe",))), ids), left)
    assert [row.passed for row in verify_optout(whole, owner="zoe")] == [True, True]


def test_a_request_cannot_unmerge(loaded: Any, ids: Any) -> None:
    with pytest.raises(OptOutError) as caught:
        _logits(loaded("soup"), ids, opt_out={"acme"})
    assert str(caught.value) == (
        "This composition is one dense model merged from every owner's, so a request cannot leave anybody out. Load it "
        "with opt_out={...}, which merges the others anew, or take the owner out with `coterie remove`."
    )


def test_files_of_who_is_left_out_are_not_opened(pico: Any, folder: Any, ids: Any) -> None:
    path = Path(shutil.copytree(folder("soup"), pico.scratch("copy")))
    expected = _logits(load(path, opt_out={"zoe"}), ids)
    for expert in Lock.read(path).experts:
        if expert.owner == "zoe":
            shutil.rmtree(path / expert.folder)
    assert torch.equal(_logits(load(path, opt_out={"zoe"}), ids), expected)


def test_plan_counts_one_model(pico: Any) -> None:
    from composer.planning import plan

    planned = plan(pico.manifest("dense", recipe="soup"), pico.dense_library())
    assert planned.parameters_total == planned.parameters_active
    assert planned.parameters_total == sum(p.numel() for p in pico.dense().parameters())


@pytest.mark.parametrize(
    ("recipe", "settings", "problems"),
    [
        (
            "merge",
            {},
            [
                "upcycle.trunk: merge needs a merge method, for instance `trunk: {method: ties, parameters: {density: "
                "0.5}}`"
            ],
        ),
        (
            "merge",
            {"upcycle": {"trunk": {"method": "ties", "parameters": {"densty": 0.5}}}},
            ["upcycle.trunk: parameters: method 'ties' has no 'densty'; did you mean 'density'?"],
        ),
        (
            "merge",
            {"upcycle": {"trunk": {"method": "slerp", "parameters": {"t": 0.5}}}},
            ["upcycle.trunk: method 'slerp' merges exactly 1 models beside the base; 3 given"],
        ),
        (
            "soup",
            {"upcycle": {"trunk": {"method": "ties"}, "copies": 2}},
            [
                "upcycle.copies: soup has no such setting; it has trunk, seed_expert",
                "upcycle.trunk: soup knows average, linear; for others use recipe 'merge'",
            ],
        ),
        (
            "soup",
            {"upcycle": {"trunk": {"method": "average", "weights": {"zeo/dense": 1.0}}}},
            [
                "upcycle.trunk: weights: Unknown model 'zeo/dense'. Did you mean 'zoe/dense'? Known: acme/dense, base, "
            ],
        ),
        ("soup", {"top_k": 3}, ["router: soup makes one dense model, which routes nothing; leave it out"]),
        (
            "soup",
            {"upcycle": {"trunk": "frozen"}},
            ["upcycle.trunk: soup needs a merge method, for instance "],
        ),
    ],
)
def test_refusals(recipe: str, settings: Any, problems: list[str], pico: Any) -> None:
    from composer.planning import plan

    with pytest.raises(PlanError) as caught:
        plan(pico.manifest("dense", recipe=recipe, **settings), pico.dense_library())
    found = caught.value.problems
    assert [text[: len(start)] for text, start in zip(found, problems, strict=True)] == problems
