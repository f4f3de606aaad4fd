"""Routers of upcycled models: rows that are drawn, made of prompts, or solved where the router reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from composer.loading import load
from composer.routing.scorers.ridge import solve_ridge
from composer.upcycling.measuring import inputs_artifacts, router_inputs
from experts.errors import PlanError
from experts.routing_artifacts import RoutingArtifacts

FROZEN = {"trunk": "frozen"}


def _rows(model: Any, layer: int = 1) -> torch.Tensor:
    return model.base.model.layers[layer].mlp.router.scorer.rows


def test_random_rows_are_their_experts_own(loaded: Any, pico: Any) -> None:
    whole = loaded("btx", upcycle=FROZEN)
    part = loaded("btx", upcycle=FROZEN, experts=("acme/dense", "zoe/dense"))
    assert torch.equal(_rows(whole)[[0, 1, 3]], _rows(part))
    bound = pico.width**-0.5
    assert 0.9 * bound < _rows(whole).abs().max() <= bound
    assert not torch.equal(_rows(whole, 0), _rows(whole, 1))
    other = loaded("btx", upcycle=FROZEN, options={"seed": 1})
    assert not torch.equal(_rows(other), _rows(whole))


def test_attention_has_rows_of_its_own(loaded: Any) -> None:
    model = loaded("bam", upcycle=FROZEN)
    assert not torch.equal(model.base.model.layers[1].self_attn.router.scorer.rows, _rows(model))


@pytest.fixture(scope="module")
def forced(pico: Any, state: Any) -> Any:
    """The base with acme's FFNs: what a frozen trunk computes while all tokens go to acme."""
    dense = pico.network()
    own, tensors = state("acme"), state("base")
    tensors |= {name: own[name] for name in own if ".mlp." in name}
    dense.load_state_dict(tensors, strict=False)
    return dense


def _ffn_inputs(dense: Any, ids: torch.Tensor, layer: int = 2) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = dense.model.layers[layer].mlp.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.inference_mode():
        dense(ids)
    handle.remove()
    return found[0]


def test_statistics_are_of_what_the_router_reads(loaded: Any, forced: Any, ids: torch.Tensor) -> None:
    model = loaded("btx", upcycle=FROZEN)
    found = router_inputs(model, [ids[:2], ids[2:]], expert=1)
    assert sorted(found) == [("ffn", layer) for layer in range(4)]
    states = _ffn_inputs(forced, ids).flatten(0, 1).double().numpy()
    summed = found["ffn", 2]
    assert summed.count == ids.numel()
    np.testing.assert_allclose(summed.sum, states.sum(0), atol=1e-4)
    np.testing.assert_allclose(summed.scatter, states.T @ states, atol=1e-3)
    # routing is as it was
    with torch.inference_mode():
        assert not torch.equal(model(ids).logits, forced(ids).logits)


def test_statistics_make_an_artefact(loaded: Any, ids: torch.Tensor, pico: Any) -> None:
    found = router_inputs(loaded("bam", upcycle=FROZEN), [ids], expert=0)
    artifacts = inputs_artifacts(found, documents=4)
    info = artifacts.info.inputs
    assert info is not None
    assert (info.layers, info.branches, info.tokens) == ((0, 1, 2, 3), ("ffn", "attention"), ids.numel())
    folder = pico.scratch("artefact")
    folder.mkdir()
    artifacts.save(folder)
    read = RoutingArtifacts.load(folder, artifacts.info, hidden_size=pico.width).inputs(3, "attention")
    assert read is not None
    np.testing.assert_array_equal(read.scatter, found["attention", 3].scatter)


def test_ridge_additivity(loaded: Any) -> None:
    """Leaving out solves from the others' sums: bit for bit never joined; subtracting is only close."""
    whole = loaded("btx", upcycle=FROZEN, scorer="dume")
    part = loaded("btx", upcycle=FROZEN, scorer="dume", experts=("acme/dense", "bob/dense"))
    scorers = [model.base.model.layers[2].mlp.router.scorer for model in (whole, part)]
    one, other = (scorer.discriminants((0, 1, 2), torch.device("cpu")) for scorer in scorers)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    classes = [scorers[0].statistics[e] for e in range(4)]
    total = sum(c.scatter for c in classes)
    kept = classes[:3]
    assert not np.array_equal(total - classes[3].scatter, sum(c.scatter for c in kept))
    # DUME's normal equations over pooled sums, the sums of who left subtracted, without a penalty on the intercept
    d = len(classes[0].sum)
    count = sum(c.count for c in classes) - classes[3].count
    moment = np.zeros((d + 1, d + 1))
    moment[:d, :d] = total - classes[3].scatter
    moment[:d, d] = moment[d, :d] = sum(c.sum for c in classes) - classes[3].sum
    moment[d, d] = count
    targets = np.stack([np.append(c.sum, c.count) for c in kept], axis=1)
    weights, biases = solve_ridge(kept, ridge=0.1, balanced=False)
    mean = moment[:d, d] / count
    strength = 0.1 * np.trace(moment[:d, :d] / count - np.outer(mean, mean)) / d * count
    penalty = np.diag([*[strength] * d, 0.0])
    solved = np.linalg.solve(moment + penalty, targets)
    np.testing.assert_allclose(weights, solved[:d].T, atol=1e-8)
    np.testing.assert_allclose(biases, solved[d], atol=1e-8)


def test_dume_finds_the_domains(folder: Any, pico: Any) -> None:
    """Sums of each domain's states on its own expert's path send text of the domain there."""
    from composer.trace import RoutingTrace

    model = load(folder("btx", upcycle=FROZEN, scorer="dume", top_k=1))
    layers = [layer.mlp.router.scorer for layer in model.base.model.layers]
    for expert in range(4):
        windows = [pico.domain_tokens(expert, rows=16, length=32)]
        for (_, layer), summed in router_inputs(model, windows, expert=expert).items():
            layers[layer].statistics[expert] = summed
    for seed, owner in enumerate(pico.owners, start=1):
        with RoutingTrace(model) as trace, torch.inference_mode():
            model(pico.domain_tokens(seed, rows=20, length=24)[16:])
        sent = trace.sent()  # 97 tokens in 32 dimensions cannot all be told apart
        assert max(sent, key=sent.__getitem__) == owner, sent
        assert sent[owner] > 0.5, sent


def test_rows_made_of_prompts(pico: Any, loaded: Any, forced: Any) -> None:
    model = loaded("btx", upcycle=FROZEN, scorer="prompts", options={"scale": 2.0})
    ids = torch.tensor([pico.tokens(pico.prompt(1))])
    mean = _ffn_inputs(forced, ids)[0].mean(0)
    torch.testing.assert_close(_rows(model, 2)[1], 2 * mean / mean.norm(), rtol=0, atol=1e-5)
    assert _rows(model, 2)[0].abs().max() == 0, "the anchor's row, which the others have to beat"


def test_negative_and_public_prompts_are_subtracted(pico: Any, forced: Any) -> None:
    manifest = pico.manifest("dense", recipe="btx", upcycle=FROZEN, scorer="prompts").to_dict()
    manifest["experts"][0]["negative_prompts"] = [pico.prompt(2)]
    manifest["router"]["public_prompts"] = [pico.prompt(0), pico.prompt(3)]
    from composer.manifest import Manifest

    model = load(pico.compose(Manifest.from_dict(manifest)))

    def mean(dense: Any, seed: int) -> torch.Tensor:
        return _ffn_inputs(dense, torch.tensor([pico.tokens(pico.prompt(seed))]))[0].mean(0)

    public = (mean(pico.dense(), 0) + mean(pico.dense(), 3)) / 2
    direction = mean(forced, 1) - mean(forced, 2) - public
    torch.testing.assert_close(_rows(model, 2)[1], direction / direction.norm(), rtol=0, atol=1e-5)


def test_refusals(pico: Any) -> None:
    from composer.manifest import Manifest
    from composer.planning import plan

    def problems(recipe: str, change: Any) -> list[str]:
        manifest = pico.manifest("dense", recipe=recipe, scorer="prompts").to_dict()
        with pytest.raises(PlanError) as caught:
            plan(Manifest.from_dict(change(manifest)), pico.dense_library())
        return list(caught.value.problems)

    def without_prompts(manifest: Any) -> Any:
        return {**manifest, "experts": ["acme/dense", *manifest["experts"][1:]]}

    assert problems("btx", without_prompts) == [
        "acme/dense: scorer 'prompts' needs positive_prompts, some texts of the expert's domain"
    ]

    def with_blank_prompts(manifest: Any) -> Any:
        first, second, third = manifest["experts"]
        blank = [{**first, "positive_prompts": ["text", ""]}, {**second, "negative_prompts": [" \n"]}, third]
        return {**manifest, "experts": blank, "router": {"scorer": "prompts", "public_prompts": ["\t"]}}

    needed = "some text is needed, since a row is made of its words"
    for recipe in ("btx", "bam"):
        assert problems(recipe, with_blank_prompts) == [
            rf"router.public_prompts[0] is '\t'; {needed}",
            f"acme/dense: positive_prompts[1] is ''; {needed}",
            rf"bob/dense: negative_prompts[0] is ' \n'; {needed}",
        ]

    def other_scorer(manifest: Any) -> Any:
        return {**manifest, "experts": manifest["experts"][:1], "router": {"scorer": "random"}}

    assert problems("bam", other_scorer) == [
        "acme/dense: prompts are given, but scorer 'random' is not made of them; write `scorer: prompts`"
    ]


def test_blank_prompts_of_somebody_who_joins(pico: Any, folder: Any) -> None:
    import shutil

    from composer.editing import plan_change

    path = shutil.copytree(
        folder("btx", scorer="prompts", experts=("acme/dense", "bob/dense")), pico.scratch("joined")
    )
    with pytest.raises(PlanError) as caught:
        plan_change(path, add=["zoe/dense"], registry=pico.dense_library(), prompts=["  "])
    assert list(caught.value.problems) == [
        "zoe/dense: positive_prompts[0] is '  '; some text is needed, since a row is made of its words"
    ]


def test_prompts_without_tokens(folder: Any, pico: Any) -> None:
    """Text that a tokenizer makes nothing of; only its own rules tell."""
    import json
    import shutil
    from pathlib import Path

    from experts.errors import BuildError

    path = Path(shutil.copytree(folder("btx", scorer="prompts"), pico.scratch("stripped")))
    rules = json.loads((path / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"[\s\S]+"}, "content": ""}
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(BuildError) as caught:
        load(path)
    assert str(caught.value) == (
        f"acme/dense: the prompt {pico.prompt(1)!r} has no tokens, so no row can be made of it. Write some text."
    )


def test_sums_that_nobody_published(pico: Any) -> None:
    """The message names the command that makes them."""
    from composer.planning import plan
    from composer.routing.scorers.dume import DumeScorer

    wish = pico.manifest("dense", recipe="btx", family="mistral", experts=["acme/dense"], scorer="dume")
    with pytest.raises(PlanError) as caught:
        plan(wish, pico.dense_library("mistral"))
    assert list(caught.value.problems) == [
        "acme/dense publishes no statistics of what the routers of layers [0, 1, 2, 3] read; make them with `coterie "
        "expert statistics acme/dense` (with --attention for bam)"
    ]
    assert DumeScorer.problems(public=None, experts={"acme/dense": (None, [2])}, layer=None)[0] == (
        "the base publishes no statistics of what the routers of layers [2] read; make them with `coterie base "
        "public-routing NAME --inputs`"
    )
