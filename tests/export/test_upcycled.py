"""Mixtures of whole models, and compositions that were tuned, as stock checkpoints: the stock class's own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DENSE = ("acme/dense", "bob/dense", "zoe/dense")
MERGED = {"trunk": {"method": "average", "weights": {"acme/dense": 2.0}}}


@pytest.fixture
def folder(pico: Any) -> Callable[..., Path]:
    """A composed folder of whole models, shared."""

    def make(recipe: str = "btx", *, family: str = "llama", experts: Any = DENSE, **settings: Any) -> Path:
        return pico.composed("dense", recipe=recipe, family=family, experts=experts, **settings)

    return make


@pytest.fixture
def tuned(pico: Any) -> Callable[..., Path]:
    """The folder after a made-up tuning of ``routers``, ``trunk`` or ``all``; shared."""
    import torch

    from composer.loading import load
    from composer.tuned import parameter_groups, trained_names, write_tuned

    def make(folder: Path, trained: Any) -> Path:
        model = load(folder)
        named = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name in trained_names(parameter_groups(model), trained):
                parameter = named[name]
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        out = pico.scratch("tuned")
        job = {"trained": trained, "text_owners": ["carl"], "settings": {}, "dtype": torch.float32}
        return write_tuned(model, out, **job)

    return lambda folder, trained: pico.once(lambda: make(folder, trained), "export-tuned", folder, trained)


def _same(stock: Any, pico: Any, folder: Path, target: str, **options: Any) -> Path:
    import torch

    out: Path = stock.export(folder, target, **options)
    ids = pico.prompts()
    expected = stock.logits(folder, ids, **({"opt_out": options["opt_out"]} if options else {}))
    torch.testing.assert_close(stock.stock_logits(out, ids), expected, atol=1e-5, rtol=0)
    return out


UPCYCLED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "merged": ("llama", "mixtral", {"upcycle": MERGED}),
    "frozen": ("olmo2", "flex_olmo", {"upcycle": {"trunk": "frozen"}}),
    "ties": ("llama", "mixtral", {"upcycle": {"trunk": {"method": "ties", "parameters": {"density": 0.5}}}}),
    "copies": (
        "llama",
        "mixtral",
        {"recipe": "sparse_upcycle", "experts": ("bob/dense",), "upcycle": {"copies": 3}},
    ),
    "one expert a token": ("qwen3", "qwen3_moe", {"top_k": 1, "normalize": False}),
    "prompts": ("llama", "mixtral", {"upcycle": {"trunk": "frozen"}, "scorer": "prompts"}),
}


@pytest.mark.parametrize(("family", "target", "settings"), UPCYCLED.values(), ids=UPCYCLED)
def test_whole_models(
    family: str, target: str, settings: dict[str, Any], folder: Any, stock: Any, pico: Any
) -> None:
    _same(stock, pico, folder(family=family, **settings), target)


TUNED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "routers": ("llama", "mixtral", "routers", {"upcycle": MERGED}),
    "trunk": ("qwen3", "qwen3_moe", "trunk", {"upcycle": {"seed_expert": False}}),
    "all": ("olmo2", "flex_olmo", "all", {"upcycle": {"trunk": "frozen"}}),
    "all copies": (
        "llama",
        "mixtral",
        "all",
        {"recipe": "sparse_upcycle", "experts": ("bob/dense",), "upcycle": {"copies": 3}},
    ),
}


@pytest.mark.parametrize(("family", "target", "trained", "settings"), TUNED.values(), ids=TUNED)
def test_tuned_mixtures(
    family: str,
    target: str,
    trained: str,
    settings: dict[str, Any],
    folder: Any,
    tuned: Any,
    stock: Any,
    pico: Any,
) -> None:
    _same(stock, pico, tuned(folder(family=family, **settings), trained), target)


@pytest.mark.parametrize(("family", "trained"), [("llama", "all"), ("mistral", "trunk")])
def test_tuned_experts_of_a_frozen_anchor(
    family: str, trained: str, tuned: Any, stock: Any, pico: Any
) -> None:
    """The Mistral's embeddings are tied."""
    _same(stock, pico, tuned(stock.composed(family, options={"bias": False}), trained), "mixtral")


def test_who_is_left_out_is_in_nothing(folder: Any, tuned: Any, stock: Any, pico: Any) -> None:
    """The trunk is merged from the others, and what was tuned on everybody's text is not written."""
    import torch

    from composer.export.exporting import plan_export

    path = tuned(folder(upcycle=MERGED), "trunk")
    out = _same(stock, pico, path, "mixtral", opt_out={"acme"})
    never = _same(
        stock,
        pico,
        folder(experts=("bob/dense", "zoe/dense"), upcycle={"trunk": {"method": "average"}}),
        "mixtral",
    )
    ids = pico.prompts()
    assert torch.equal(stock.stock_logits(out, ids), stock.stock_logits(never, ids))
    planned = plan_export(path, "mixtral", opt_out={"acme"})
    assert planned.mixed == ("the trunk is merged (average) from llama and bob/dense, zoe/dense",)


def test_what_is_said_of_it(folder: Any, tuned: Any, stock: Any) -> None:
    """Index 0 and the trunk are no public base, so there is no file that would import them as one."""
    from composer.export.exporting import plan_export

    path = tuned(folder(family="qwen3", upcycle={"seed_expert": False}), "trunk")
    said = plan_export(path, "qwen3_moe").to_dict()
    assert [(row["index"], row["name"]) for row in said["experts"]] == list(enumerate(DENSE))
    assert said["mixed"] == [
        "the trunk is merged (average) from acme/dense, bob/dense, zoe/dense",
        "tuned after composing (trunk): those tensors hold all of acme, bob, carl, zoe",
    ]
    out = stock.export(path, "qwen3_moe")
    assert not (out / "owners.yaml").exists()
    card = (out / "README.md").read_text()
    assert all(f"- {line}\n" in card for line in said["mixed"])
    assert "| 0 | acme/dense | 1 | acme |" in card
    frozen = stock.export(folder(family="olmo2", upcycle={"trunk": "frozen"}), "flex_olmo")
    assert (frozen / "owners.yaml").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bam": (
        {"recipe": "bam"},
        "recipe 'bam': it has attention experts, and no stock class does; compose with recipe `btx`",
    ),
    "soup": (
        {"recipe": "soup"},
        "recipe 'soup': its result is one dense model of the base's own class, no mixture; "
        "`composer.load(FOLDER).base.save_pretrained(OUT)` writes it",
    ),
    "dume": (
        {"scorer": "dume"},
        "the scorer 'dume' has no stock form, stock gates multiply with one row per expert and layer; compose with "
        "`scorer: learned`",
    ),
}


@pytest.mark.parametrize(("settings", "problem"), REFUSED.values(), ids=REFUSED)
def test_refusals(settings: dict[str, Any], problem: str, folder: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    assert f"\n  - {problem}" in message(plan_export, folder(**settings), "mixtral")


def test_a_merged_model_has_no_router_to_complain_of(folder: Any, message: Callable[..., str]) -> None:
    from composer.export.exporting import plan_export

    assert message(plan_export, folder(recipe="soup"), "mixtral").count("\n  - ") == 1


def test_the_advice_for_merged_models_works(folder: Any, stock: Any, pico: Any) -> None:
    import torch

    from composer.loading import load

    path, out, ids = folder("soup"), pico.scratch("dense"), pico.prompts()
    load(path).base.save_pretrained(out)
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(path, ids))


def test_tuned_factors_and_biases_have_no_place(tuned: Any, stock: Any, message: Callable[..., str]) -> None:
    """Nothing that was tuned is lost without a word."""
    from composer.export.exporting import plan_export

    low = tuned(stock.composed("llama", ("acme/low",), options={"bias": False}), "all")
    said = message(plan_export, low, "mixtral", densify=True).splitlines()
    assert said[0] == f"{low} is not exactly a Mixtral model:"
    assert all(line.endswith(" was tuned, and Mixtral has no place for it") for line in said[1:])
    biased = tuned(stock.composed("llama", ("acme/biased",)), "routers")
    (line,) = message(plan_export, biased, "mixtral").splitlines()[1:]
    assert line.startswith("  - the tuned routers of layers 0-3 have negative biases (down to -1")
    assert line.endswith(
        "and stock gates have none and would ignore it; --calibrate drops it and measures what that costs"
    )
