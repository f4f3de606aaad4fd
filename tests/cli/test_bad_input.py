"""Mistakes in what owners and builders hand in: one message with all that is wrong, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Change = Callable[[dict[str, Any]], None]


def _package(
    pico: Any, *, owner: str = "acme", base_seed: int = 0, digest: str = "0" * 64, embedder: str | None = None
) -> Path:
    """An owner's adapter with statistics, rows beside the public rows of a digest, and a domain embedding."""
    import numpy as np

    from experts.routing_artifacts import EmbeddingInfo

    seed, rank, layers = {"acme": (1, 2, (1, 2, 3)), "bob": (2, 3, (2, 3))}[owner]
    raw = pico.write_lora(pico.scratch("raw"), seed=seed, r=rank, layers_to_transform=list(layers))
    artifacts = pico.artifacts(seed=seed, layers=layers, public_digest=digest)
    if embedder is not None:
        info = artifacts.info.model_copy(update={"embedding": EmbeddingInfo(model=embedder, dim=8)})
        tensors = {**artifacts.tensors, "embedding": np.ones(8, dtype="f4")}
        artifacts = dataclasses.replace(artifacts, info=info, tensors=tensors)
    return pico.pack(raw, name=f"{owner}/low", base_seed=base_seed, artifacts=artifacts)  # type: ignore[no-any-return]


def _retouched(package: Path, change: Change) -> Path:
    """Change a package's routing artefacts behind the library's back; the card's digests are those of the new bytes."""
    from safetensors.numpy import load_file, save_file

    from experts.card import ExpertCard

    path = package / "routing.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    card = json.loads((package / "card.json").read_text())
    entry = next(file for file in card["files"] if file["path"] == path.name)
    entry |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (package / "card.json").write_bytes(ExpertCard.model_validate_json(json.dumps(card)).to_bytes())
    return package


@pytest.fixture
def bare(pico: Any, tmp_path: Path) -> Path:
    """A registry with the pico base alone, which a test may change."""
    return Path(shutil.copytree(pico.once(pico._empty_registry, "empty"), tmp_path / "registry"))


def _narrow(tensors: dict[str, Any]) -> None:
    tensors["statistics.sum"] = tensors["statistics.sum"][:16].copy()
    tensors["statistics.scatter"] = tensors["statistics.scatter"][:16, :16].copy()


def _indefinite(tensors: dict[str, Any]) -> None:
    tensors["statistics.scatter"][0, 1] = tensors["statistics.scatter"][1, 0] = 500.0
    tensors["statistics.scatter"][0, 0] = tensors["statistics.scatter"][1, 1] = 1.0


def _welcoming(tensors: dict[str, Any]) -> None:
    tensors["row.2.bias"][:] = 0.5


ARTEFACTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "statistics of another width": (
        _narrow,
        (
            "'routing.safetensors' does not hold what it declares:",
            "tensor 'statistics.sum': F64 (16) found, F64 (32) expected",
            "tensor 'statistics.scatter': F64 (16, 16) found, F64 (32, 32) expected",
        ),
    ),
    "statistics that are no sums": (
        _indefinite,
        (
            "'routing.safetensors' holds values that are not allowed:",
            "tensor 'statistics.scatter': not positive semi-definite; it must be the sum of x xᵀ",
        ),
    ),
    "a bias above 0": (
        _welcoming,
        (
            "'routing.safetensors' holds values that are not allowed:",
            "tensor 'row.2.bias': 0.5; an owner's router bias must lie in [-10000, 0]",
        ),
    ),
}


@pytest.mark.parametrize(("change", "problems"), ARTEFACTS.values(), ids=ARTEFACTS)
def test_routing_artefacts(
    change: Change, problems: tuple[str, ...], pico: Any, run: Any, bare: Path
) -> None:
    outcome = run("register", _retouched(_package(pico), change), registry=bare)
    lines = [f"Error: {problems[0]}", *(f"  - {problem}" for problem in problems[1:])]
    assert (outcome.code, outcome.err) == (2, "\n".join(lines) + "\n")
    assert run("list", "--json", registry=bare).json == []


def test_statistics_from_another_anchor(pico: Any, run: Any, bare: Path) -> None:
    """Statistics belong to their card's anchor; an anchor of the same shapes is another one."""
    from experts.fingerprint import tokenizer_fingerprint

    outcome = run("register", _package(pico, base_seed=1), registry=bare)
    theirs, ours = (pico.description(seed=seed).fingerprint for seed in (1, 0))
    tokenizer = tokenizer_fingerprint(pico.base("llama"))
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: 'acme/low' was made for the base 'llama' (tensors sha256:{theirs}, tokenizer "
        f"sha256:{tokenizer}), which the "
        f"registry '{bare}' does not have. Add that base with 'coterie base add', or train the expert on one that is "
        "there:\n"
        f"  - base 'llama': tensors sha256:{ours}, tokenizer sha256:{tokenizer}\n",
    )


def _plan(run: Any, registry: Path, tmp_path: Path, **router: Any) -> Any:
    manifest = {"name": "duo", "base": "llama", "experts": ["acme/low", "bob/low"], "router": router}
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return run("build", path, tmp_path / "out", registry=registry)


LEARNED = {"scorer": "learned", "context": "token"}


def _with_public_rows(pico: Any, registry: Path) -> None:
    from registry import Registry

    folder = pico.scratch("public")
    folder.mkdir()
    public = pico.artifacts(seed=0)
    public.save(folder)
    Registry(registry).set_base_routing("llama", folder, public.info)


def test_frozen_halves_that_differ(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    """Rows that were trained beside different frozen public rows cannot be compared."""
    _with_public_rows(pico, bare)
    for package in (_package(pico), _package(pico, owner="bob", digest="1" * 64)):
        assert run("register", package, registry=bare).code == 0
    outcome = _plan(run, bare, tmp_path, **LEARNED)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - the experts' rows were trained beside different public rows (000000000000, 111111111111)\n",
    )
    assert not (tmp_path / "out").exists()


def test_an_embedding_from_another_embedder(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    _with_public_rows(pico, bare)
    for owner, model in {"acme": "small", "bob": "wide"}.items():
        outcome = run("register", _package(pico, owner=owner, embedder=model), registry=bare)
        assert outcome.code == 0, outcome.err
    outcome = _plan(run, bare, tmp_path, **LEARNED)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - the domain embeddings were made by different embedders (acme/low: 'small' (8), bob/low: 'wide' (8))\n",
    )


def test_more_experts_a_token_than_there_are(pico: Any, run: Any, tmp_path: Path) -> None:
    outcome = _plan(run, pico.library().path, tmp_path, top_k=4)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - router.top_k: 4 found, but 2 experts and the anchor are all that a token can be sent to; write at most "
        "3\n",
    )


def _gap(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    for name in list(tensors):
        if ".experts.1." in name:
            del tensors[name]
        elif name.endswith("gate.weight"):
            tensors[name] = tensors[name][[0, 2]].copy()
    config["num_experts"] = 2


def _bias(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.gate.bias"] = tensors["model.norm.weight"][:3].copy()


IMPORTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "a gap in the numbering": (
        _gap,
        "layers 0, 1: expert 1 is missing between 0 and 2, and transformers would load the ones after it under wrong "
        "numbers; renumber them, or take the whole checkpoint",
    ),
    "a bias": (
        _bias,
        "model.layers.0.mlp.gate.bias: transformers ignores a gate's bias, and the model was trained with it; import "
        "the rows by hand, with the bias in the owners' routing artefacts",
    ),
}


@pytest.mark.parametrize(("change", "problem"), IMPORTS.values(), ids=IMPORTS)
def test_import(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    problem: str,
    pico: Any,
    run: Any,
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(pico.once(lambda: _flex(pico), "three experts"), tmp_path / "flex"))
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    experts = [{"name": f"{owner}/ffn", "domain": "law", "license": "MIT"} for owner in ("acme", "bob")]
    (tmp_path / "owners.yaml").write_text(yaml.safe_dump({"base": "anchor", "experts": experts}))
    outcome = run("import", folder, tmp_path / "owners.yaml", "--out", tmp_path / "in")
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: '{folder}' is not a whole FlexOlmo checkpoint:\n  - {problem}\n",
    )
    assert not (tmp_path / "in").exists()


def _flex(pico: Any) -> Path:
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    config = FlexOlmoConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        num_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=0,
    )
    folder: Path = pico.scratch("flex")
    FlexOlmoForCausalLM(config).save_pretrained(folder)
    return folder
