"""Adding an expert to what is there: with its prompts, and beside tuned weights with a new row of three kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.editing import add_experts, plan_change, remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.tuned import write_tuned
from composer.upcycling.growth import projected_row, recomputed_rows
from composer.verify import verify_optout
from experts.errors import BuildError, PlanError
from experts.routing_artifacts import EmbeddingInfo, RoutingArtifacts, RoutingInfo

FROZEN = {"trunk": "frozen"}
EMBEDDINGS = {"acme": (1.0, 2.0, 0.0), "bob": (0.0, 1.0, 0.0), "zoe": (3.0, 0.0, 1.0)}


@pytest.fixture(scope="module")
def registry(pico: Any) -> Any:
    """Three owners' models with domain embeddings and the sums of router inputs."""
    registry = pico.fresh_dense_library()
    for seed, (owner, embedding) in enumerate(EMBEDDINGS.items(), start=1):
        summed = pico.artifacts(seed=seed, layers=range(4), gate_layer=0, inputs=True)
        info = RoutingInfo(
            inputs=summed.info.inputs, embedding=EmbeddingInfo(model="x", digest="e" * 64, dim=3)
        )
        tensors = {name: tensor for name, tensor in summed.tensors.items() if name.startswith("inputs.")}
        tensors["embedding"] = np.array(embedding, dtype="f4")
        raw = pico.write_dense(pico.scratch("raw"), seed=seed)
        artifacts = RoutingArtifacts(info=info, tensors=tensors)
        registry.register(pico.pack(raw, name=f"{owner}/known", artifacts=artifacts))
        if owner == "acme":
            registry.register(pico.pack(raw, name="acme/again", artifacts=artifacts))
            strange = EmbeddingInfo(model="x", digest="f" * 64, dim=3)
            artifacts = RoutingArtifacts(info=info.model_copy(update={"embedding": strange}), tensors=tensors)
            registry.register(pico.pack(raw, name="acme/strange", artifacts=artifacts))
    return registry


@pytest.fixture(scope="module")
def tuned(pico: Any, registry: Any) -> Callable[..., Path]:
    """A fresh copy of a composition of bob and zoe whose routers, and trunk if asked, were changed."""

    def make(
        trained: Any = "routers", recipe: str = "btx", kv: str | None = None, seed: bool = False
    ) -> Path:
        upcycle = {**FROZEN, "seed_expert": seed, **({"attention": {"kv": kv}} if kv else {})}
        manifest = pico.manifest("dense", recipe=recipe, experts=("bob/known", "zoe/known"), upcycle=upcycle)
        model = load(pico.compose(manifest, registry=registry))
        with torch.no_grad():
            for layer in model.base.model.layers:
                layer.mlp.router.scorer.rows.mul_(3.0)
                if recipe == "bam":
                    layer.self_attn.router.scorer.rows.mul_(2.0)
            model.base.model.norm.weight.mul_(1.5 if trained != "routers" else 1.0)
        settings = {"trained": trained, "text_owners": [], "settings": {"steps": 3}, "dtype": torch.float32}
        return write_tuned(model, pico.scratch("tuned"), **settings)

    return lambda *args: Path(
        shutil.copytree(pico.once(lambda: make(*args), "tuned", *args), pico.scratch("t"))
    )


def _rows(model: Any, layer: int = 2, module: str = "mlp") -> dict[str, torch.Tensor]:
    scorer = getattr(model.base.model.layers[layer], module).router.scorer
    return {name: scorer.rows[scorer.position[i]] for i, name in enumerate(model.expert_names, start=1)}


def _grown(folder: Path, registry: Any, new_rows: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    before = _rows(load(folder))
    add_experts(folder, ["acme/known"], registry=registry, new_rows=new_rows)
    model = load(folder)
    return before, _rows(model), model


def test_tuned_rows_stay_with_their_experts(tuned: Any, registry: Any, pico: Any) -> None:
    """acme comes before both by name, so every row moves."""
    folder = tuned()
    before, after, model = _grown(folder, registry, "untuned")
    assert list(after) == ["acme/known", "bob/known", "zoe/known"]
    assert torch.equal(after["bob/known"], before["bob/known"])
    assert torch.equal(after["zoe/known"], before["zoe/known"])
    upcycle = {**FROZEN, "seed_expert": False}
    fresh = pico.manifest("dense", recipe="btx", experts=tuple(after), upcycle=upcycle)
    plain = load(pico.compose(fresh, registry=registry))
    assert torch.equal(after["acme/known"], _rows(plain)["acme/known"])
    lock = Lock.read(folder)
    assert lock.tuned is not None
    assert (lock.optout_class, lock.tuned.owners) == ("retrain", ("bob", "zoe"))
    assert lock.lineage["tuned/rows-acme--known.safetensors"] == ("acme",)
    assert (lock.tuned.trained, lock.tuned.settings) == ("routers", {"steps": 3})
    # leaving anybody out gives the composition from before the tuning
    ids = pico.prompts()
    with torch.inference_mode():
        expected = load(pico.compose(fresh, registry=registry), opt_out={"zoe"})(ids).logits
        assert torch.equal(load(folder, opt_out={"zoe"})(ids).logits, expected)
        assert model(ids).logits.isfinite().all()


def test_embeddings_of_different_embedders_give_no_row(tuned: Any, registry: Any) -> None:
    """Their folders may have one name."""
    with pytest.raises(BuildError) as caught:
        add_experts(tuned(), ["acme/strange"], registry=registry, new_rows="embedding")
    assert str(caught.value) == (
        "The domain embeddings were made by different embedders (bob/known: 'x' (eeeeeeeeeeee), zoe/known: 'x' "
        "(eeeeeeeeeeee), acme/strange: 'x' (ffffffffffff)), so no row can be projected from them; use another start of "
        "new rows (untuned, embedding, statistics)."
    )


def test_a_tuned_trunk_stays(tuned: Any, registry: Any) -> None:
    folder = tuned("trunk")
    expected = load(folder).base.model.norm.weight
    *_, model = _grown(folder, registry, "untuned")
    assert torch.equal(model.base.model.norm.weight, expected)


@pytest.mark.parametrize(
    ("new_rows", "kv", "seed"),
    [("untuned", "own", False), ("embedding", "shared", True), ("statistics", "own", False)],
)
def test_both_routers_of_bam_get_their_row(
    tuned: Any, registry: Any, pico: Any, new_rows: Any, kv: str, seed: bool
) -> None:
    folder = tuned("trunk", "bam", kv, seed)
    before = load(folder)
    add_experts(folder, ["acme/known"], registry=registry, new_rows=new_rows)
    model = load(folder)
    acme = pico.artifacts(seed=1, layers=range(4), gate_layer=0, inputs=True)
    others = [pico.artifacts(seed=n, layers=range(4), gate_layer=0, inputs=True) for n in (2, 3)]
    for branch, module in (("ffn", "mlp"), ("attention", "self_attn")):
        old, new = (_rows(m, module=module) for m in (before, model))
        assert torch.equal(old["bob/known"], new["bob/known"])
        assert torch.equal(old["zoe/known"], new["zoe/known"])
        row = new["acme/known"].double().numpy()
        if new_rows == "untuned":
            fresh = pico.manifest(
                "dense", recipe="bam", experts=tuple(new), upcycle={**FROZEN, "attention": {"kv": kv}}
            )
            plain = load(pico.compose(fresh, registry=registry))
            assert torch.equal(new["acme/known"], _rows(plain, module=module)["acme/known"])
        elif new_rows == "embedding":
            shares = _shares()
            expected = sum(share * old[name].double().numpy() for name, share in shares.items())
            np.testing.assert_allclose(row, expected, atol=1e-5)
        else:
            ours = row @ acme.inputs(2, branch).mean
            assert ours > max(row @ other.inputs(2, branch).mean for other in others)
    with torch.inference_mode():
        assert model(pico.prompts()).logits.isfinite().all()


def _shares() -> dict[str, float]:
    """What the two known rows have in the projected one, by the primal form of the least squares."""
    known = np.array([EMBEDDINGS["bob"], EMBEDDINGS["zoe"]])
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    new = np.array(EMBEDDINGS["acme"]) / np.linalg.norm(EMBEDDINGS["acme"])
    bob, zoe = new @ np.linalg.solve(known.T @ known + 0.1 * np.eye(3), known.T)
    return {"bob/known": bob, "zoe/known": zoe}


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("recipe", "kv", "seed"), [("btx", None, False), ("bam", "own", False), ("bam", "shared", True)]
)
def test_whoever_joined_afterwards_leaves_the_state_before(
    tuned: Any, registry: Any, pico: Any, recipe: str, kv: Any, seed: bool
) -> None:
    """By removal byte for byte, at load bit for bit, in a request as that request's expert set has it."""
    folder = tuned("trunk", recipe, kv, seed)
    before, ids = _content(folder), pico.prompts()
    with torch.inference_mode():
        expected = load(folder)(ids).logits
        add_experts(folder, ["acme/known"], registry=registry, new_rows="embedding")
        grown = load(folder, verify=True)
        assert not torch.allclose(grown(ids).logits, expected, atol=1e-3)
        assert torch.equal(load(folder, opt_out={"acme"})(ids).logits, expected)
        torch.testing.assert_close(grown(ids, opt_out={"acme"}).logits, expected, atol=1e-5, rtol=0)
        # of those who were there when it was tuned, the tuned weights hold something
        with_acme = load(folder, opt_out={"bob"})(ids).logits
        torch.testing.assert_close(grown(ids, opt_out={"bob"}).logits, with_acme, atol=1e-5, rtol=0)
        twice = load(folder, opt_out={"acme"})
        never = load(folder, opt_out={"acme", "bob"})(ids).logits
        torch.testing.assert_close(twice(ids, opt_out={"bob"}).logits, never, atol=1e-5, rtol=0)
    if recipe == "btx":
        assert [row.passed for row in verify_optout(folder, owner="acme")] == [True] * 3
    change = remove_experts(folder, ["acme"])
    assert change.warnings == ()
    assert _content(folder) == before


def test_rows_that_were_made_of_others_do_not_outlive_them(tuned: Any, registry: Any) -> None:
    """A row projected from acme's holds something of acme, so acme's leaving ends what was tuned."""
    folder = tuned()
    add_experts(folder, ["acme/known"], registry=registry, new_rows="embedding")
    first = _rows(load(folder))
    add_experts(folder, ["acme/again"], registry=registry, new_rows="embedding")
    assert torch.equal(_rows(load(folder))["acme/known"], first["acme/known"])
    change = plan_change(folder, remove=["acme/known"])
    assert change.warnings == (
        "The folder was tuned; the changed one has the weights from before. Tune it again.",
    )
    assert plan_change(folder, remove=["acme/again"]).warnings == ()
    assert plan_change(folder, remove=["acme"]).warnings == ()  # both at once
    remove_experts(folder, ["acme/again"])
    assert torch.equal(_rows(load(folder))["acme/known"], first["acme/known"])


def test_a_grown_mixture_is_exported(tuned: Any, registry: Any, pico: Any) -> None:
    from transformers import AutoModelForCausalLM

    from composer.export.exporting import export, plan_export

    folder = tuned()
    add_experts(folder, ["acme/known"], registry=registry, new_rows="embedding")
    out = export(plan_export(folder, "mixtral"), pico.scratch("stock"))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(pico.prompts()).logits
        torch.testing.assert_close(found, load(folder)(pico.prompts()).logits, atol=1e-5, rtol=0)


def test_a_row_from_the_embedding(tuned: Any, registry: Any) -> None:
    before, after, _ = _grown(tuned(), registry, "embedding")
    known = np.array([EMBEDDINGS["bob"], EMBEDDINGS["zoe"]])
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    new = np.array(EMBEDDINGS["acme"]) / np.linalg.norm(EMBEDDINGS["acme"])
    rows = np.stack([before["bob/known"].numpy(), before["zoe/known"].numpy()])
    # the primal form of the same least squares
    projection = np.linalg.solve(known.T @ known + 0.1 * np.eye(3), known.T @ rows)
    np.testing.assert_allclose(after["acme/known"].numpy(), new @ projection, atol=1e-5)


def test_the_projection_of_a_known_embedding_is_its_row() -> None:
    random = np.random.default_rng(0)
    embeddings, rows = random.normal(size=(4, 9)), random.normal(size=(4, 5))
    np.testing.assert_allclose(projected_row(embeddings, rows, embeddings[2], ridge=1e-9), rows[2], atol=1e-6)


def test_a_row_from_statistics(tuned: Any, registry: Any, pico: Any) -> None:
    """It points where acme's states are and the others' are not, and is as long as the tuned ones."""
    before, after, _ = _grown(tuned(), registry, "statistics")
    row = after["acme/known"].double().numpy()
    lengths = [float(old.norm()) for old in before.values()]
    np.testing.assert_allclose(np.linalg.norm(row), np.mean(lengths), rtol=1e-5)
    means = {
        seed: pico.artifacts(seed=seed, layers=range(4), gate_layer=0, inputs=True).inputs(2, "ffn").mean
        for seed in (1, 2, 3)
    }
    assert row @ means[1] > max(row @ means[2], row @ means[3])


@pytest.mark.parametrize(
    ("trained", "references", "new_rows", "problem"),
    [
        (
            "routers",
            ["acme/known"],
            "embeding",
            "Unknown start of new rows 'embeding'. Did you mean 'embedding'? Known: embedding, statistics, untuned.",
        ),
        (
            "all",
            ["acme/known"],
            "untuned",
            "everything was tuned, the experts too, and a new expert has no tuned weights; add without `--new-rows` "
            "and tune again",
        ),
    ],
)
def test_refusals(
    tuned: Any, registry: Any, trained: str, references: Any, new_rows: Any, problem: str
) -> None:
    folder = tuned(trained)
    with pytest.raises(PlanError) as caught:
        add_experts(folder, references, registry=registry, new_rows=new_rows)
    assert str(caught.value) == f"{folder} cannot be changed:\n  - {problem}"


def test_what_is_not_published_is_refused_and_nothing_changes(tuned: Any, registry: Any) -> None:
    folder = tuned()
    before = Lock.read(folder)
    with pytest.raises(BuildError) as caught:
        add_experts(folder, ["acme/dense"], registry=registry, new_rows="embedding")
    assert str(caught.value) == (
        "acme/dense publishes no domain embedding, so no row can be projected from it; use another start of new rows "
        "(untuned, embedding, statistics)."
    )
    assert Lock.read(folder) == before


def test_untuned_folders_keep_nothing(pico: Any, folder: Any) -> None:
    path = Path(shutil.copytree(folder("btx", experts=("bob/dense", "zoe/dense")), pico.scratch("plain")))
    with pytest.raises(PlanError) as caught:
        add_experts(path, ["acme/dense"], registry=pico.dense_library(), new_rows="untuned")
    assert str(caught.value) == (
        f"{path} cannot be changed:\n"
        "  - the folder was not tuned, so there is nothing to keep; add without `--new-rows`"
    )


def test_a_new_expert_brings_its_prompts(pico: Any, folder: Any) -> None:
    settings = {"upcycle": FROZEN, "scorer": "prompts"}
    path = Path(
        shutil.copytree(
            folder("btx", experts=("bob/dense", "zoe/dense"), **settings), pico.scratch("prompted")
        )
    )
    with pytest.raises(PlanError) as caught:
        add_experts(path, ["acme/dense"], registry=pico.dense_library())
    assert list(caught.value.problems) == [
        "acme/dense: scorer 'prompts' needs positive_prompts, some texts of the expert's domain"
    ]
    add_experts(path, ["acme/dense"], registry=pico.dense_library(), prompts=[pico.prompt(1)])
    whole = folder("btx", **settings)
    assert Lock.read(path).experts == Lock.read(whole).experts
    assert torch.equal(_rows(load(path))["acme/dense"], _rows(load(whole))["acme/dense"])


@pytest.fixture(scope="module")
def prompted(pico: Any, folder: Any) -> Callable[[str], Path]:
    """A tuned composition of bob alone whose rows come from prompts; acme joined afterwards, then zoe."""

    def make(trunk: str) -> Path:
        upcycle = {"trunk": trunk, "seed_expert": True}
        model = load(folder("btx", experts=("bob/dense",), upcycle=upcycle, scorer="prompts"))
        with torch.no_grad():
            for layer in model.base.model.layers:
                layer.mlp.router.scorer.rows.mul_(3.0)
        settings = {"trained": "routers", "text_owners": [], "settings": {}, "dtype": torch.float32}
        path = write_tuned(model, pico.scratch("tuned"), **settings)
        for seed, name in ((1, "acme/dense"), (3, "zoe/dense")):
            prompts = [pico.prompt(seed)]
            add_experts(path, [name], registry=pico.dense_library(), prompts=prompts, new_rows="untuned")
        return path

    return lambda trunk: pico.once(lambda: make(trunk), "prompted", trunk)


@pytest.mark.parametrize(
    ("trunk", "acmes", "zoes"),
    [("frozen", ("acme",), ("zoe",)), ("average", ("acme", "bob"), ("acme", "bob", "zoe"))],
)
def test_rows_name_everybody_whose_weights_they_were_measured_on(
    prompted: Any, folder: Any, pico: Any, trunk: str, acmes: Any, zoes: Any
) -> None:
    """A merged trunk holds all owners, so what prompts are measured in does; a frozen one holds nobody."""
    path, ids = prompted(trunk), pico.prompts()
    lock = Lock.read(path)
    assert lock.lineage["tuned/rows-acme--dense.safetensors"] == acmes
    assert lock.lineage["tuned/rows-zoe--dense.safetensors"] == zoes
    without = load(path, opt_out={"acme"})
    removed = Path(shutil.copytree(path, pico.scratch("removed")))
    remove_experts(removed, ["acme"])
    kept = trunk == "frozen"
    assert (Lock.read(removed).tuned is not None) == kept
    # zoe's row is the one that a model without acme gives her
    upcycle = {"trunk": trunk, "seed_expert": True}
    never = load(folder("btx", experts=("bob/dense", "zoe/dense"), upcycle=upcycle, scorer="prompts"))
    for model in (without, load(removed)):
        assert torch.equal(_rows(model)["zoe/dense"], _rows(never)["zoe/dense"])
        if not kept:
            with torch.inference_mode():
                assert torch.equal(model(ids).logits, never(ids).logits)


def test_a_proof_computes_rows_of_late_experts_again(prompted: Any, pico: Any) -> None:
    """A lock that hides whose weights a row was measured on does not pass: zoe's row then stays as acme made it."""
    path = Path(shutil.copytree(prompted("average"), pico.scratch("hidden")))
    assert all(row.passed for row in verify_optout(path, owner="acme"))
    lock = Lock.read(path)
    assert lock.tuned is not None
    grown = tuple(rows.model_copy(update={"beside": ()}) for rows in lock.tuned.grown)
    tuning = lock.tuned.model_copy(update={"grown": grown})
    own = {f"tuned/{rows.file.path}": (rows.expert.partition("/")[0],) for rows in grown}
    changed = lock.model_copy(update={"tuned": tuning, "lineage": {**lock.lineage, **own}})
    (path / "composition.json").write_bytes(changed.to_bytes())
    assert [(row.door, row.passed) for row in verify_optout(path, owner="acme")] == [
        ("build", True),
        ("load", False),
    ]


@pytest.mark.parametrize("new_rows", ["embedding", "statistics"])
def test_rows_computed_again_are_the_same(tuned: Any, registry: Any, pico: Any, new_rows: Any) -> None:
    """With everybody they came from there, in one step or in two."""
    folder = tuned()
    add_experts(folder, ["acme/known"], registry=registry, new_rows=new_rows)
    add_experts(folder, ["acme/again"], registry=registry, new_rows=new_rows)
    lock = Lock.read(folder)
    assert lock.tuned is not None
    found = recomputed_rows(folder, folder, lock.tuned.grown, scratch=pico.scratch("rows"))
    model = load(folder)
    for expert, rows in found.items():
        for name, row in rows.items():
            scorer = model.get_submodule(name.removesuffix(".rows"))
            place = scorer.position[model.expert_names.index(expert) + 1]
            assert torch.equal(scorer.rows[place], row)


@pytest.fixture
def tuned_on_text(pico: Any, folder: Any) -> Path:
    """Bob's and zoe's experts, tuned on text of acme and of yan; acme's own expert joined afterwards."""
    model = load(folder("btx", experts=("bob/dense", "zoe/dense"), upcycle=FROZEN, scorer="random"))
    with torch.no_grad():
        for layer in model.base.model.layers:
            layer.mlp.router.scorer.rows.mul_(3.0)
    settings = {"text_owners": ["acme", "yan"], "settings": {}, "dtype": torch.float32}
    path = write_tuned(model, pico.scratch("tuned"), trained="routers", **settings)
    add_experts(path, ["acme/dense"], registry=pico.dense_library(), new_rows="untuned")
    return path


@pytest.mark.parametrize(
    ("names", "text", "left"),
    [
        (["acme"], "acme", ("bob/dense", "zoe/dense")),
        (["acme/dense"], "acme", ("bob/dense", "zoe/dense")),
        (["yan"], "yan", ("acme/dense", "bob/dense", "zoe/dense")),
    ],
)
def test_tuned_weights_leave_with_whose_text_they_were_tuned_on(
    tuned_on_text: Path, pico: Any, folder: Any, names: Any, text: str, left: Any
) -> None:
    """Also where the owner's only expert joined afterwards, and where there never was one."""
    change = remove_experts(tuned_on_text, names)
    assert change.warnings == (
        f"The folder was tuned on text of {text} too; the changed one has the weights from before. Tune it again.",
    )
    lock = Lock.read(tuned_on_text)
    assert (lock.tuned, tuple(expert.name for expert in lock.experts)) == (None, left)
    assert text not in lock.involved
    never = load(folder("btx", experts=left, upcycle=FROZEN, scorer="random"))
    with torch.inference_mode():
        assert torch.equal(load(tuned_on_text)(pico.prompts()).logits, never(pico.prompts()).logits)
