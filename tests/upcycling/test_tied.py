"""Tied embeddings that a checkpoint stores twice are one parameter: merged and counted once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.loading import load
from composer.manifest import Manifest
from composer.planning import plan
from experts.errors import BuildError
from registry import Registry

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWNERS = ("acme", "bob")


@pytest.fixture(scope="module")
def folders(pico: Any) -> Callable[[bool], dict[str, Path]]:
    """Three models with tied embeddings, by owner, the base among them; with both names in the file, or one."""

    def make(both: bool) -> dict[str, Path]:
        from transformers import LlamaForCausalLM

        made = {}
        for seed, owner in enumerate(("base", *OWNERS)):
            folder = pico.scratch(owner)
            shutil.copytree(pico.base(), folder)  # with its tokenizer
            config = pico.network().config
            config.tie_word_embeddings = True
            torch.manual_seed(seed)
            LlamaForCausalLM(config).save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            assert HEAD not in tensors
            if both:
                _store(folder, {**tensors, HEAD: tensors[EMBEDDING].clone()})
            made[owner] = folder
        return made

    return lambda both: pico.once(lambda: make(both), "tied", both)


def _store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _register(pico: Any, registry: Registry, folder: Path, name: str) -> None:
    from experts.card import BaseRef
    from experts.package import pack

    record = registry.base("tied")
    ref = BaseRef(
        name=record.name,
        fingerprint=record.fingerprint,
        tokenizer_fingerprint=record.tokenizer_fingerprint,
    )
    package = pico.scratch("package")
    pack(
        folder,
        package,
        name=name,
        version=1,
        domain="text",
        license="MIT",
        base=record.description,
        base_ref=ref,
        kind="dense",
    )
    registry.register(package)


@pytest.fixture(scope="module")
def library(pico: Any, folders: Any) -> Callable[[bool], Registry]:
    """A registry with these models."""

    def fill(both: bool) -> Registry:
        registry = Registry(pico.scratch("registry"))
        registry.add_base(folders(both)["base"], name="tied")
        for owner in OWNERS:
            _register(pico, registry, folders(both)[owner], f"{owner}/dense")
        return registry

    return lambda both: pico.once(lambda: fill(both), "tied library", both)


def _manifest(recipe: str, experts: Any = ("acme/dense", "bob/dense"), **upcycle: Any) -> Manifest:
    return Manifest.from_dict(
        {
            "name": "tied",
            "recipe": recipe,
            "base": "tied",
            "experts": list(experts),
            **({"upcycle": upcycle} if upcycle else {}),
        }
    )


TASK = {"method": "task_arithmetic", "parameters": {"lambda": 1.0}}
DARE = {"method": "dare_linear", "parameters": {"density": 0.5}}
CASES = [
    ("btx", {"trunk": "average"}),
    ("bam", {"trunk": "average"}),
    ("soup", {}),
    ("soup", {"seed_expert": True}),
    ("merge", {"trunk": TASK}),
]


def _expected(recipe: str, upcycle: Any, models: dict[str, torch.Tensor]) -> torch.Tensor:
    base, one, other = (models[who] for who in ("base", *OWNERS))
    if recipe == "merge":
        return one + other - base
    if recipe == "soup" and not upcycle:
        return (one + other) / 2
    return (base + one + other) / 3


@pytest.mark.parametrize(("recipe", "upcycle"), CASES, ids=["btx", "bam", "soup", "with base", "arithmetic"])
def test_a_tied_pair_is_merged_once(recipe: str, upcycle: Any, pico: Any, library: Any, folders: Any) -> None:
    model = load(pico.compose(_manifest(recipe, **upcycle), registry=library(True)))
    models = {who: load_file(path / "model.safetensors")[EMBEDDING] for who, path in folders(True).items()}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embedding
    torch.testing.assert_close(
        embedding.detach(),
        _expected(recipe, upcycle, models),
        rtol=0,
        atol=1e-6 if recipe == "merge" else 1e-7,
    )


def test_a_soup_is_the_mean_of_the_models_that_transformers_loads(
    pico: Any, library: Any, folders: Any, ids: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    mean, *others = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders(True).values())
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(sum((o.get_parameter(name) for o in others), parameter) / 3)
        expected = mean(ids).logits
        model = load(pico.compose(_manifest("soup", seed_expert=True), registry=library(True)))
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "upcycle"),
    [("btx", {}), ("btx", {"trunk": DARE}), ("merge", {"trunk": DARE}), ("sparse_upcycle", {"copies": 2})],
    ids=["average", "random trunk", "random merge", "copies"],
)
def test_the_second_copy_changes_nothing(
    recipe: str, upcycle: Any, pico: Any, library: Any, ids: torch.Tensor
) -> None:
    """Not even what a method draws at random; nor does the plan count it, and the model has what the plan says."""
    experts = ("acme/dense",) if recipe == "sparse_upcycle" else ("acme/dense", "bob/dense")
    manifest = _manifest(recipe, experts, **upcycle)
    planned = [plan(manifest, library(both)) for both in (True, False)]
    models = [load(pico.compose(manifest, registry=library(both))) for both in (True, False)]
    with torch.inference_mode():
        one, other = (model(ids).logits for model in models)
    assert torch.equal(one, other)
    assert planned[0].parameters_total == sum(parameter.numel() for parameter in models[0].parameters())
    for key in ("parameters_total", "parameters_active", "flops_per_token"):
        assert getattr(planned[0], key) == getattr(planned[1], key), key


@pytest.mark.parametrize(
    ("recipe", "experts", "upcycle"),
    [
        ("btx", ("odd/dense", "bob/dense"), {}),
        ("soup", ("odd/dense", "bob/dense"), {}),
        ("sparse_upcycle", ("odd/dense",), {"copies": 2}),
    ],
    ids=["btx", "soup", "copies"],
)
def test_unlike_copies_are_refused(
    recipe: str, experts: Any, upcycle: Any, pico: Any, library: Any, folders: Any
) -> None:
    """One that was trained untied would lose its head; where nobody's trunk is taken it may stay as it is."""
    registry = Registry(shutil.copytree(library(True).path, pico.scratch("registry")))
    folder = Path(shutil.copytree(folders(True)["acme"], pico.scratch("odd")))
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] += 0.1
    _store(folder, tensors)
    _register(pico, registry, folder, "odd/dense")
    path = pico.compose(_manifest(recipe, experts, **upcycle), registry=registry)
    with pytest.raises(BuildError) as caught:
        load(path)
    assert str(caught.value) == (
        f"odd/dense: '{HEAD}' and '{EMBEDDING}' differ, but the base ties them: they are one tensor of it, and nothing "
        "holds two. Fine-tune the model with the embeddings tied, or publish it as a model of a base that does not tie "
        "them."
    )
    load(path, opt_out={"odd"})
    if recipe == "btx":
        load(pico.compose(_manifest(recipe, experts, trunk="frozen"), registry=registry))
