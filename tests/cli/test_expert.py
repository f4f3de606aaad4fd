"""expert compress: from a registered full expert to a registered low-rank one, and what it says on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

LAYERS = (2, 3)


@pytest.fixture(scope="module")
def stocked(
    tmp_path_factory: pytest.TempPathFactory, run: Any, filled: Path, base_folder: Path, texts: Any
) -> Path:
    """A registry with a full expert, ``acme/full``, near the anchor; never to be changed."""

    import numpy as np
    from safetensors.numpy import load_file, save_file

    registry = Path(shutil.copytree(filled, tmp_path_factory.mktemp("stocked") / "registry"))
    raw = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(7)
    tensors = {
        name: (tensor + random.normal(scale=0.02, size=tensor.shape)).astype(np.float32)
        for name, tensor in load_file(base_folder / "model.safetensors").items()
        if ".mlp." in name and int(name.split(".")[2]) in LAYERS
    }
    save_file(tensors, raw / "ffn.safetensors")
    (raw / "config.json").write_text(json.dumps({"format_version": 1, "layers": LAYERS}))
    options = ("--name", "acme/full", "--domain", "law", "--license", "MIT", "--text", texts["law"])
    outcome = run("register", raw, *options, registry=registry)
    assert outcome.code == 0, outcome.err
    return registry


@pytest.fixture
def registry(stocked: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""

    return Path(shutil.copytree(stocked, tmp_path / "registry"))


def test_compress_register_and_add(
    run: Any, registry: Path, texts: dict[str, Path], tmp_path: Path, manifest: Path
) -> None:
    args = (
        "--rank",
        "4",
        "--out",
        tmp_path / "small",
        "--data",
        f"law={texts['law']}",
        "--sequence-length",
        "32",
    )
    outcome = run("expert", "compress", "acme/full", *args, "--max-tokens", "128", registry=registry)
    assert (outcome.code, outcome.err) == (0, "")
    matrices, domains, summary = outcome.out.split("\n\n")
    rows = [line.split() for line in matrices.splitlines()]
    assert rows[0] == ["MATRIX", "RANK", "OF", "ERROR", "BEFORE", "AFTER"]
    assert [row[:3] for row in rows[1:]] == [
        [f"model.layers.{layer}.mlp.{role}_proj", "4", "32"]
        for layer in LAYERS
        for role in ("gate", "up", "down")
    ]
    header, law = (line.split() for line in domains.splitlines())
    assert header == ["DOMAIN", "ANCHOR", "FULL", "LOW-RANK", "COST", "TOKENS"]
    assert (law[0], law[5]) == ("law", "124")
    lines = summary.splitlines()
    assert lines[0] == "from:    acme/full@1"
    assert lines[1].endswith("of the difference to the anchor (Frobenius norm)")
    # 6 matrices of 48 x 32, ranks of 4: 4 bytes a number
    assert lines[2] == "size:    36.9 kB -> 7.7 kB, 20.8%"
    assert lines[3] == f"written: {tmp_path}/small: acme/full@2, to be registered"
    assert run("register", tmp_path / "small", registry=registry).code == 0
    shown = run("show", "acme/full", "--json", registry=registry).json
    assert (shown["version"], shown["kind"], shown["license"]) == (2, "lora", "MIT")
    assert run("build", manifest, tmp_path / "out", registry=registry).code == 0
    assert run("add", tmp_path / "out", "acme/full", "acme/full@1", registry=registry).code == 2
    assert run("add", tmp_path / "out", "acme/full@1", registry=registry).code == 0
    replaced = run("add", tmp_path / "out", "acme/full", "--json", registry=registry).json["replaced"]
    assert replaced == {"acme/full@1": "acme/full@2"}


def test_a_rank_that_saves_nothing(run: Any, stocked: Path) -> None:
    outcome = run("expert", "compress", "acme/full", "--rank", "32", "--dry-run", "--json", registry=stocked)
    share = outcome.json["bytes_after"] / outcome.json["bytes_before"]
    assert (outcome.code, outcome.err) == (
        0,
        f"Note: at this rank the expert takes {share:.0%} of the full one's bytes; lower it.\n",
    )
    assert share > 1.5


def test_auto_says_when_its_bytes_and_not_the_energy_decided(run: Any, stocked: Path) -> None:
    args = ("expert", "compress", "acme/full", "--dry-run")
    report = run(*args, "--rank", "auto", "--json", registry=stocked).json
    asked = run(*args, "--rank", "energy=0.9", "--json", registry=stocked).json
    smaller = [a["rank"] < b["rank"] for a, b in zip(report["linears"], asked["linears"], strict=True)]
    assert [linear["capped"] for linear in report["linears"]] == smaller
    assert report["capped"] == len(smaller) == 6
    assert report["energy"] < 0.9
    outcome = run(*args, "--rank", "auto", registry=stocked)
    said = [" ".join(line.split()) for line in outcome.out.splitlines() if line.startswith("cap")]
    assert said == [
        "cap: a third of the bytes, not 0.9 of the energy, set the rank of 6 of 6 matrices; "
        f"{report['energy']:.1%} of the energy is kept"
    ]
    assert asked["capped"] == 0
    assert "\ncap:" not in run(*args, "--rank", "energy=0.9", registry=stocked).out


def test_json_dry_run(run: Any, stocked: Path, tmp_path: Path) -> None:
    outcome = run(
        "expert", "compress", "acme/full", "--rank", "auto", "--dry-run", "--json", registry=stocked
    )
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.json
    assert list(result) == [
        "source",
        "name",
        "version",
        "digest",
        "out",
        "rank",
        "relative_error",
        "energy",
        "capped",
        "bytes_before",
        "bytes_after",
        "linears",
        "domains",
    ]
    assert (result["name"], result["version"], result["digest"], result["out"]) == (
        "acme/full",
        2,
        None,
        None,
    )
    assert result["energy"] == pytest.approx(1 - result["relative_error"] ** 2)
    assert result["bytes_after"] <= result["bytes_before"] / 3
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "rank": (
        ("acme/full", "--rank", "half", "--dry-run"),
        "--rank 'half' is not a rank: write a whole number from 1 to 4096, 'auto', or 'energy=SHARE' with a share "
        "above 0 and at most 1, for instance 'energy=0.9'.",
    ),
    "neither": (
        ("acme/full", "--rank", "4"),
        "Give --out DIR to write the low-rank expert, or --dry-run only to see what it would cost.",
    ),
    "both": (
        ("acme/full", "--rank", "4", "--out", "small", "--dry-run"),
        "Give --out DIR to write the low-rank expert, or --dry-run only to see what it would cost.",
    ),
    "low-rank": (
        ("acme/contracts", "--rank", "4", "--dry-run"),
        "acme/contracts is of kind 'lora', low-rank already (rank 2). Only full experts (kind 'ffn') can "
        "be compressed.",
    ),
    "unknown": (
        ("acme/ful", "--rank", "4", "--dry-run"),
        "Unknown expert 'acme/ful'. Did you mean 'acme/full'? Known: acme/contracts, acme/full, hosp/icd, soft/python. "
        "The registry is 'REGISTRY'.",
    ),
    "data": (
        ("acme/full", "--rank", "4", "--dry-run", "--data", "law"),
        "--data 'law' is not of the form DOMAIN=FILE, for instance law=law.jsonl.",
    ),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(args: tuple[str, ...], message: str, run: Any, stocked: Path, tmp_path: Path) -> None:
    outcome = run("expert", "compress", *args, registry=stocked)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"Error: {message}\n".replace("REGISTRY", str(stocked))
    assert list(tmp_path.iterdir()) == []


def test_extract_reports_what_has_no_place(
    run: Any, bare_base: Path, whole_model: Path, tmp_path: Path
) -> None:
    args = ("expert", "extract", "acme/whole", "--to", "ffn")
    outcome = run(*args, "--dry-run", registry=bare_base)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == "LEFT OUT TENSORS OF THE DIFFERENCE"
    assert lines[1].startswith("attention 16 ")
    assert lines[-4:-2] == [
        "from: acme/whole@1",
        "error of what is taken: 0.00% of its difference to the anchor (Frobenius norm)",
    ]
    assert lines[-1] == "written: nothing"
    outcome = run(*args, "--out", tmp_path / "out", "--json", registry=bare_base)
    assert (outcome.json["name"], outcome.json["version"], outcome.json["kind"]) == (
        "acme/whole-ffn",
        1,
        "ffn",
    )
    assert run("register", tmp_path / "out", registry=bare_base).code == 0


def test_extract_needs_a_place_or_a_dry_run(run: Any, bare_base: Path, whole_model: Path) -> None:
    outcome = run("expert", "extract", "acme/whole", "--to", "ffn", registry=bare_base)
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Give --out DIR to write the expert, or --dry-run only to see what would be lost.\n",
    )
    outcome = run("expert", "extract", "acme/whole", "--to", "lora", "--dry-run", registry=bare_base)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: A low-rank expert needs --rank, a whole number from 1;")


def test_statistics_make_a_router_that_needs_no_training(
    run: Any, bare_base: Path, whole_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("the licensee shall hereby grant notice " * 40)
    args = ("expert", "statistics", "acme/whole", "--text", text, "--sequence-length", "16")
    outcome = run(*args, "--out", tmp_path / "out", registry=bare_base)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split(":")[1].strip() == "inputs of the ffn routers of 4 layers"
    assert lines[-1].endswith("out: acme/whole@2, to be registered")
    assert run("register", tmp_path / "out", registry=bare_base).code == 0
    assert run("base", "public-routing", "pico", "--text", text, "--inputs", registry=bare_base).code == 0
    manifest = tmp_path / "mixture.yaml"
    manifest.write_text(
        "name: mixture\nrecipe: btx\nbase: pico\nexperts: [acme/whole]\nrouter: {scorer: dume, top_k: 2}\n"
    )
    done = run("build", manifest, tmp_path / "composed", registry=bare_base)
    assert done.code == 0, done.err
    outcome = run(*args, "--attention", "own", "--out", tmp_path / "bam", "--json", registry=bare_base)
    assert outcome.json["version"] == 3
    assert outcome.json["routing"]["inputs"]["branches"] == ["ffn", "attention"]
    refused = run(*args, "--embedder", tmp_path, "--out", tmp_path / "no", registry=bare_base)
    assert (refused.code, refused.err) == (
        2,
        f"Error: --embedder '{tmp_path}' is not the folder of a SentenceTransformer (no modules.json in it).\n",
    )


@pytest.fixture
def bare_base(run: Any, base_folder: Path, tmp_path: Path) -> Path:
    registry = tmp_path / "registry"
    assert run("base", "add", base_folder, "--name", "pico", registry=registry).code == 0
    return registry


@pytest.fixture
def whole_model(run: Any, bare_base: Path, base_folder: Path, tmp_path: Path) -> Path:
    """A whole model, registered: the base with every tensor a little larger."""
    from safetensors.torch import load_file, save_file

    raw = Path(shutil.copytree(base_folder, tmp_path / "raw"))
    tensors = {name: tensor * 1.01 for name, tensor in load_file(raw / "model.safetensors").items()}
    save_file(tensors, raw / "model.safetensors", metadata={"format": "pt"})
    done = run(
        "register", raw, "--name", "acme/whole", "--domain", "law", "--license", "MIT", registry=bare_base
    )
    assert done.code == 0, done.err
    return raw
