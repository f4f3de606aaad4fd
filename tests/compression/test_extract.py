"""Whole models made into experts of FFNs or adapters: PEFT and the model's own tensors are the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experts.errors import ConsentError
from experts.package import read_package
from pipelines.compression import CompressionError
from pipelines.compression.extract import extract_expert


@pytest.fixture
def whole(pico: Any) -> Any:
    """Tensors of acme's whole model, and of the base."""
    library = pico.dense_library()
    files = library.files(library.expert("acme/dense"))
    return load_file(files["model.safetensors"]), load_file(pico.base() / "model.safetensors")


def _share(own: Any, base: Any, chosen: Any) -> float:
    squares = {name: float((own[name].double() - base[name].double()).square().sum()) for name in own}
    return sum(v for name, v in squares.items() if chosen(name)) / sum(squares.values())


def test_ffns_are_taken_as_they_are(pico: Any, whole: Any, tmp_path: Path) -> None:
    own, base = whole
    done = extract_expert("acme/dense", kind="ffn", registry=pico.dense_library(), out=tmp_path / "out")
    card = read_package(tmp_path / "out")
    assert (card.kind, card.name, card.version, card.layers) == ("ffn", "acme/dense-ffn", 1, (0, 1, 2, 3))
    assert card.derived_from == (done.source.digest,)
    assert card.routing == done.source.routing
    tensors = load_file(tmp_path / "out" / "ffn.safetensors")
    assert set(tensors) == {name for name in own if ".mlp." in name}
    assert all(torch.equal(tensor, own[name]) for name, tensor in tensors.items())
    assert done.kept_error == 0
    lost = {row.what: row for row in done.left_out}
    assert {what: row.tensors for what, row in lost.items()} == {
        "attention": 16,
        "embeddings and head": 2,
        "final norm": 1,
        "norms": 8,
    }
    assert lost["attention"].share == pytest.approx(_share(own, base, lambda name: "self_attn" in name))
    rest = 1 - _share(own, base, lambda name: ".mlp." in name)
    assert done.relative_error == pytest.approx(rest**0.5)


def test_adapter_is_the_best_of_its_rank(pico: Any, whole: Any, tmp_path: Path) -> None:
    """PEFT's merged weights lack exactly the singular values beyond the rank."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    own, base = whole
    done = extract_expert(
        "acme/dense", kind="lora", rank=5, registry=pico.dense_library(), out=tmp_path / "out"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(pico.base())
        merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    error = kept = 0.0
    for name, tensor in own.items():
        if not name.endswith("_proj.weight"):
            continue
        change = tensor.double() - base[name].double()
        beyond = torch.linalg.svdvals(change)[5:].square().sum()
        torch.testing.assert_close(
            (merged[name].double() - tensor.double()).square().sum(), beyond, rtol=1e-3, atol=1e-6
        )
        error, kept = error + float(beyond), kept + float(change.square().sum())
    assert done.kept_error == pytest.approx((error / kept) ** 0.5, rel=1e-3)
    assert [row.what for row in done.left_out] == ["embeddings and head", "final norm", "norms"]
    assert (done.card.kind, done.card.rank, done.card.name) == ("lora", 5, "acme/dense-lora")


def test_an_adapter_of_full_rank_lacks_only_what_has_no_place(pico: Any) -> None:
    done = extract_expert("bob/dense", kind="lora", rank=32, registry=pico.dense_library())
    assert done.card is None
    assert done.kept_error < 1e-5
    assert done.relative_error == pytest.approx(sum(row.share for row in done.left_out) ** 0.5, rel=1e-6)


def test_two_models_at_one_place_are_not_confused(pico: Any) -> None:
    """mergekit's cache of open checkpoints outlives a model."""
    from mergekit.io.tasks import LoaderCache

    registry = pico.dense_library()
    before = len(LoaderCache().loaders)
    one = extract_expert("acme/dense", kind="lora", rank=2, registry=registry)
    two = extract_expert("zoe/dense", kind="lora", rank=2, registry=registry)
    assert one.kept_error != two.kept_error
    assert len(LoaderCache().loaders) == before


def test_result_can_be_composed(pico: Any, tmp_path: Path) -> None:
    from composer.loading import load

    registry = pico.fresh_dense_library()
    extract_expert("acme/dense", kind="ffn", registry=registry, out=tmp_path / "out")
    registry.register(tmp_path / "out")
    folder = pico.compose(pico.manifest(experts=["acme/dense-ffn"], scorer="ridge"), registry=registry)
    assert load(folder).membership.experts == ("acme/dense-ffn",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "lora"},
            "A low-rank expert needs --rank, a whole number from 1; an FFN expert has none, as its matrices are taken "
            "whole. Given: lora, rank None.",
        ),
        (
            {"kind": "ffn", "rank": 3},
            "A low-rank expert needs --rank, a whole number from 1; an FFN expert has none, as its matrices are taken "
            "whole. Given: ffn, rank 3.",
        ),
        (
            {"kind": "ffn", "name": "bob/x"},
            "The name 'bob/x' belongs to 'bob', and acme/dense is acme's: what is made from it is too. Choose a name "
            "that starts with 'acme/'.",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str, pico: Any) -> None:
    with pytest.raises(CompressionError) as caught:
        extract_expert("acme/dense", registry=pico.dense_library(), **options)
    assert str(caught.value) == message


def test_only_whole_models(pico: Any) -> None:
    with pytest.raises(CompressionError) as caught:
        extract_expert("acme/full", kind="ffn", registry=pico.library())
    assert str(caught.value) == (
        "acme/full is of kind 'ffn'. Only whole models (kind 'dense') can be extracted from; `coterie expert compress` "
        "makes full FFNs low-rank."
    )


def test_an_owner_who_has_opted_out(pico: Any, tmp_path: Path) -> None:
    registry = pico.fresh_dense_library()
    registry.opt_out("acme", reason="left", by="acme")
    with pytest.raises(ConsentError):
        extract_expert("acme/dense", kind="ffn", registry=registry, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
