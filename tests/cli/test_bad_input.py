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
    pico: Any,
    *,
    owner: str = "acme",
    base_seed: int = 0,
    digest: str | None = None,
    embedder: str | None = None,
    init: str = "x",
) -> Path:
    """An owner's adapter with statistics, rows beside the public rows of a digest, and a domain embedding."""
    import numpy as np

    from experts.routing_artifacts import EmbeddingInfo

    seed, rank, layers = {"acme": (1, 2, (1, 2, 3)), "bob": (2, 3, (2, 3))}[owner]
    raw = pico.write_lora(pico.scratch("raw"), seed=seed, r=rank, layers_to_transform=list(layers))
    artifacts = pico.artifacts(seed=seed, layers=layers, public_digest=digest)
    written = artifacts.info.rows.model_copy(update={"init": init})
    artifacts = dataclasses.replace(artifacts, info=artifacts.info.model_copy(update={"rows": written}))
    if embedder is not None:
        info = artifacts.info.model_copy(
            update={"embedding": EmbeddingInfo(model=embedder, digest=embedder[0] * 64, dim=8)}
        )
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
    beside = ", ".join(sorted([pico.public_digest()[:12], "1" * 12]))
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        f"  - the experts' rows were trained beside different public rows ({beside})\n",
    )
    assert not (tmp_path / "out").exists()


def test_an_embedding_from_another_embedder(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    _with_public_rows(pico, bare)
    for owner, model in {"acme": "aged", "bob": "bulky"}.items():
        outcome = run("register", _package(pico, owner=owner, embedder=model), registry=bare)
        assert outcome.code == 0, outcome.err
    outcome = _plan(run, bare, tmp_path, **LEARNED)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - the domain embeddings were made by different embedders (acme/low: 'aged' (8, aaaaaaaaaaaa), bob/low: "
        "'bulky' (8, bbbbbbbbbbbb)); one embedder must make them all: train with the same row_init\n",
    )


def _published(folder: Path, artifacts: Any, **info: Any) -> Path:
    """Public artefacts as somebody hands them in; ``info`` replaces keys of routing.json."""
    folder.mkdir()
    artifacts.save(folder)
    (folder / "routing.json").write_text(json.dumps(artifacts.info.model_dump(mode="json") | info))
    return folder


def test_public_artefacts_of_another_anchor(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    """Shapes and tokenizer may agree: the states are another anchor's."""
    public = pico.artifacts(seed=0)
    theirs, ours = pico.anchor_info(seed=1), pico.anchor_info()
    advice = "Make them on this base: coterie base public-routing llama --text FILE"
    cases = {
        "base": (
            theirs.model_dump(),
            f"Error: The routing artefacts were made on another anchor than the base 'llama'. {advice}\n"
            f"  - tensors: sha256:{theirs.fingerprint} found, sha256:{ours.fingerprint} expected\n",
        ),
        "tokenizer": (
            {"fingerprint": ours.fingerprint, "tokenizer_fingerprint": "0" * 64},
            f"Error: The routing artefacts were made on another anchor than the base 'llama'. {advice}\n"
            f"  - tokenizer: sha256:{'0' * 64} found, sha256:{ours.tokenizer_fingerprint} expected\n",
        ),
        "nothing": (
            None,
            "Error: The routing artefacts do not say which anchor they were made on ('anchor' in routing.json); the "
            f"base 'llama' takes only its own. {advice}\n",
        ),
    }
    for name, (anchor, message) in cases.items():
        folder = _published(tmp_path / name, public, anchor=anchor)
        outcome = run("base", "public-routing", "llama", "--from", folder, registry=bare)
        assert (outcome.code, outcome.err) == (2, message)
    (row,) = run("base", "list", "--json", registry=bare).json
    assert row["routing"] is None


def test_public_rows_that_are_not_those_declared(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    """Owners' rows are matched to public rows by a digest, so it must be that of the rows beside it."""
    from experts.routing_origin import rows_digest

    public = pico.artifacts(seed=0)
    moved = {name: tensor + 1 if "weight" in name else tensor for name, tensor in public.tensors.items()}
    found = rows_digest({layer: moved[f"row.{layer}.weight"] for layer in public.info.rows.layers})
    folder = _published(tmp_path / "moved", dataclasses.replace(public, tensors=moved))
    outcome = run("base", "public-routing", "llama", "--from", folder, registry=bare)
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: The public rows in 'routing.safetensors' have the digest {found}, but rows.public_digest is "
        f"{public.info.rows.public_digest}. Owners' rows are matched to public rows by it: take the file that "
        "routing.json was written for, or make both anew with 'coterie base public-routing NAME --text FILE "
        "--rows'.\n",
    )
    rows = public.info.rows.model_dump(mode="json")
    folder = _published(tmp_path / "null", public, rows=rows | {"public_digest": None})
    outcome = run("base", "public-routing", "llama", "--from", folder, registry=bare)
    assert (outcome.code, outcome.err) == (
        2,
        f"Error: {folder / 'routing.json'} has 1 problem:\n  - rows.public_digest: rows need the digest of the "
        "public rows beside them; make them anew\n",
    )


def test_public_rows_changed_in_a_built_folder(pico: Any, tmp_path: Path) -> None:
    """Loading recomputes the digest too: a folder that was built is not trusted for it."""
    from safetensors.numpy import load_file, save_file

    import composer
    from experts.errors import AdmissionError

    folder = Path(shutil.copytree(pico.composed("low_rank", **LEARNED), tmp_path / "built"))
    path = folder / "public/routing.safetensors"
    tensors = load_file(path)
    path.unlink()  # it may be a link to what other tests share
    save_file(tensors | {"row.2.weight": tensors["row.2.weight"] + 1}, path)
    with pytest.raises(AdmissionError, match=r"^The public rows in 'routing.safetensors' have the digest "):
        composer.load(folder)


def test_rows_that_start_at_different_things(pico: Any, run: Any, bare: Path, tmp_path: Path) -> None:
    _with_public_rows(pico, bare)
    for owner, init in {"acme": "x", "bob": "sentence-transformer"}.items():
        assert run("register", _package(pico, owner=owner, init=init), registry=bare).code == 0
    outcome = _plan(run, bare, tmp_path, **LEARNED)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - the router rows start at different things (the base: 'x', acme/low: 'x', bob/low: "
        "'sentence-transformer'); all must start alike, the base's public rows too: train them with one row_init, and "
        "attach public rows made with it (with --embedder, or without)\n",
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


def test_imported_experts_beside_the_public_row_of_another_checkpoint(
    pico: Any, run: Any, tmp_path: Path
) -> None:
    """Router tuning moves all rows, the public one too; its experts belong beside the one that moved with them."""
    from safetensors.numpy import load_file, save_file

    first = pico.once(lambda: _flex(pico), "three experts")
    tuned = Path(shutil.copytree(first, tmp_path / "tuned"))
    tensors = load_file(tuned / "model.safetensors")
    moved = {name: t + 1 if name.endswith("mlp.gate.weight") else t for name, t in tensors.items()}
    save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
    digests = []
    for number, (folder, owners) in enumerate({first: ("acme", "bob"), tuned: ("dan", "eve")}.items()):
        out = tmp_path / str(number)
        experts = [{"name": f"{owner}/ffn", "domain": "law", "license": "MIT"} for owner in owners]
        (tmp_path / "owners.yaml").write_text(yaml.safe_dump({"base": "anchor", "experts": experts}))
        assert run("import", folder, tmp_path / "owners.yaml", "--out", out).code == 0
        info = json.loads((out / "public-routing" / "routing.json").read_text())
        digests.append(info["rows"]["public_digest"][:12])
    registry, bases = tmp_path / "registry", tmp_path / "0"
    assert run("base", "add", bases / "base", "--name", "anchor", registry=registry).code == 0
    given = ("public-routing", "anchor", "--from", bases / "public-routing")
    assert run("base", *given, registry=registry).code == 0
    for owner in ("dan", "eve"):
        assert run("register", tmp_path / "1" / "experts" / owner / "ffn", registry=registry).code == 0
    outcome = run("build", tmp_path / "1" / "manifest.yaml", tmp_path / "out", registry=registry)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Manifest 'imported' cannot be composed:\n"
        f"  - the experts' rows were trained beside other public rows ({digests[1]}) than the base publishes "
        f"({digests[0]})\n",
    )
    assert not (tmp_path / "out").exists()


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
