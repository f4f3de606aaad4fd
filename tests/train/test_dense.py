"""A job that trains a whole model: against a loop of a test's own, resumed to the same bytes, tied heads, recipes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.admission import check_expert, check_files
from experts.base import BaseDescription
from experts.errors import ManifestError, TrainingError
from experts.package import read_package
from experts.routing_artifacts import RoutingArtifacts
from pipelines.train.corpus import read_corpus
from pipelines.train.worker import train_job


@pytest.fixture
def dense(make_job: Any) -> Any:
    """A function that gives a small job of a whole model."""

    def make(family: str = "llama", **fields: Any) -> Any:
        job = {"kind": "dense", "learning_rate": 3e-3, "warmup": 2, "steps": 6, **fields}
        return make_job(family, **{"rank": 16, **job})

    return make


@pytest.fixture
def tied(anchor: Any, tmp_path: Path) -> Any:
    """A function that gives an anchor with tied embeddings, whose checkpoint may hold both names."""

    def make(*, both: bool) -> Path:
        model = AutoModelForCausalLM.from_pretrained(anchor())
        model.config.tie_word_embeddings = True
        model.tie_weights()
        folder = tmp_path / f"tied{both}"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(anchor()).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert "lm_head.weight" not in tensors
        if both:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="module")
def registered(anchor: Any, texts: Any, tmp_path_factory: Any) -> Any:
    """A registry with the anchor and a trained whole model, and the model's folder."""
    from pipelines.train.job import DomainJob
    from registry import Registry

    root = tmp_path_factory.mktemp("registered")
    registry = Registry(root / "registry")
    registry.add_base(anchor(), name="llama")
    job = {"name": "acme/contracts", "domain": "law", "license": "MIT", "base": "llama", "kind": "dense"}
    job |= {"data": str(texts["law"]), "steps": 2, "sequence_length": 32, "workdir": str(root / "private")}
    out = train_job(DomainJob.from_dict(job), out=root / "out", registry=registry, threads=1)
    registry.register(out)
    return registry, out


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _by_hand(job: Any, folder: Path) -> Any:
    """Train with a loop written out here: AdamW, a warm-up, a cosine, clipped gradients, no decay of vectors."""
    from pipelines.train.loop import plan_batches

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = torch.from_numpy(read_corpus(job, AutoTokenizer.from_pretrained(folder)).own.ids).long()
    plan = plan_batches(
        steps=job.steps,
        batch_size=job.batch_size,
        own=len(own),
        public=0,
        public_fraction=0.0,
        seed=job.seed,
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": job.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, windows in enumerate(plan):
        done = (step - job.warmup) / (job.steps - job.warmup)
        cosine = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * done)).item()
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate * ((step + 1) / job.warmup if step < job.warmup else cosine)
        ids = own[torch.from_numpy(windows)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *vectors], job.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_result_is_an_ordinary_fine_tuned_model(
    dense: Any, anchor: Any, tmp_path: Path, family: str
) -> None:
    job = dense(family, weight_decay=0.1)
    out = train_job(job, out=tmp_path / "out", threads=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
        "routing.safetensors",
    ]
    _by_hand(job, anchor(family)).save_pretrained(
        tmp_path / "expected"
    )  # which has names of its own for some
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(out / "model.safetensors")
    before = load_file(anchor(family) / "model.safetensors")
    assert set(found) == set(BaseDescription.from_folder(anchor(family)).tensors)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)
        assert not torch.equal(tensor, before[name]), name  # everything is trained


@pytest.mark.parametrize("both", [False, True])
def test_a_tied_head_stays_tied(dense: Any, tied: Any, tmp_path: Path, both: bool) -> None:
    folder = tied(both=both)
    job = dense(base=str(folder))
    out = train_job(job, out=tmp_path / "out", threads=1)
    tensors = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in tensors) == both
    if both:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = _by_hand(job, folder).model.embed_tokens.weight
    torch.testing.assert_close(model.model.embed_tokens.weight, expected, atol=2e-5, rtol=1e-4)


def test_an_interrupted_job_ends_with_the_same_bytes(dense: Any, tmp_path: Path) -> None:
    def interrupt(report: Any) -> None:
        if report.stage == "training" and report.scalars.get("step", 0) >= 2:
            raise KeyboardInterrupt

    whole = train_job(dense(), out=tmp_path / "whole", threads=1)
    with pytest.raises(KeyboardInterrupt):
        train_job(dense(), out=tmp_path / "out", progress=interrupt, threads=1)
    assert not (tmp_path / "out").exists()
    reports: list[Any] = []
    again = train_job(dense(), out=tmp_path / "out", progress=reports.append, threads=1)
    assert reports[-1].scalars["resumed_from"] >= 1
    assert _digests(again) == _digests(whole)


def test_what_the_card_says(dense: Any, anchor: Any, texts: Any, tmp_path: Path) -> None:
    """Also that the statistics are of the untrained anchor, in the middle, where adapters have theirs."""
    job = dense(held_out=0.2, public=str(texts["public"]), public_fraction=0.3)
    out = train_job(job, out=tmp_path / "out", threads=1)
    card = read_package(out)
    assert (card.kind, card.layers, card.rank) == ("dense", (0, 1, 2, 3), None)
    assert card.training.method == "dense"
    assert not {"rank", "alpha"} & set(card.training.settings)
    assert card.metrics["held_out_nll"] != card.metrics["anchor_held_out_nll"]
    check_files(out, card)
    check_expert(out, card, BaseDescription.from_folder(anchor()))
    text = (out / "card.json").read_text() + (out / "config.json").read_text()
    assert str(tmp_path) not in text
    assert card.routing is not None
    assert card.routing.statistics is not None
    assert card.routing.statistics.layer == 2
    statistics = RoutingArtifacts.load(out, card.routing).statistics
    ids = torch.from_numpy(read_corpus(job, AutoTokenizer.from_pretrained(anchor())).own.ids).long()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(anchor())
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert statistics is not None
    torch.testing.assert_close(
        torch.from_numpy(statistics.sum.copy()), states.double().sum(0), atol=1e-4, rtol=1e-4
    )


def test_products_in_bfloat16_train_float32_weights(dense: Any, tmp_path: Path) -> None:
    exact = load_file(train_job(dense(), out=tmp_path / "a", threads=1) / "model.safetensors")
    out = train_job(dense(dtype="bfloat16", learning_rate=3e-3), out=tmp_path / "b", threads=1)
    rounded = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in rounded.values()} == {torch.float32}
    weight = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(rounded[weight], rounded[weight].bfloat16().float())  # never held in bfloat16
    torch.testing.assert_close(rounded[weight], exact[weight], atol=2e-2, rtol=0)


@pytest.mark.parametrize("recipe", ["bam", "btx", "soup"])
def test_it_registers_and_composes(recipe: str, registered: Any, anchor: Any, tmp_path: Path) -> None:
    """With ``top_k`` of one and no seed expert, the mixture is the trained model."""
    from composer import Manifest, build, load, plan

    registry, trained = registered
    manifest: dict[str, Any] = {
        "name": "one",
        "recipe": recipe,
        "base": "llama",
        "experts": ["acme/contracts"],
    }
    if recipe != "soup":
        manifest["upcycle"] = {"seed_expert": False}
        manifest["router"] = {"top_k": 1, "normalize": True}
    folder = build(plan(Manifest.from_dict(manifest), registry), tmp_path / "composed", registry=registry)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load(folder)(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(trained)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rank": 4, "coordination": True}, "rank, coordination: not for whole models; leave them out"),
        ({"layers": "upper-half"}, "layers: of a whole model all are trained; leave them out"),
    ],
)
def test_fields_that_say_nothing(dense: Any, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        dense(**change)
    assert str(caught.value) == f"job has 1 problem:\n  - {problem}"
    assert dense().layers == "all"


def test_a_checkpoint_with_other_names(dense: Any, anchor: Any, tmp_path: Path) -> None:
    """Such weights would stay as they were, without a word."""
    from pipelines.train.trainers.dense import DenseTrainer

    folder = tmp_path / "renamed"
    folder.mkdir()
    tensors = load_file(anchor() / "model.safetensors")
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    model = AutoModelForCausalLM.from_pretrained(anchor())
    with pytest.raises(TrainingError) as caught:
        DenseTrainer(rank=1, alpha=1.0).write(tmp_path, model, anchor=folder, dtype=torch.float32)
    assert str(caught.value) == (
        "The base's checkpoint holds these tensors of LlamaForCausalLM under other names, so a whole model cannot be "
        "written in its form. Train an expert of kind 'ffn' or 'lora':\n  - model.norm.weight"
    )
