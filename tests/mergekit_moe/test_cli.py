"""plan and build on mergekit-moe's own files: no registry, nothing half-written, exit code 2 for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner


@pytest.fixture
def run() -> Any:
    from pipelines.cli.app import app

    def call(*args: object) -> Any:
        return CliRunner().invoke(app, [*map(str, args)], prog_name="coterie")

    return call


@pytest.fixture
def manifest(config_of: Any, tmp_path: Path) -> Any:
    def write(**keys: Any) -> Path:
        path = tmp_path / "moe.yml"
        path.write_text(yaml.safe_dump(config_of(**keys)))
        return path

    return write


def test_plan(run: Any, manifest: Any, make_model: Any) -> None:
    outcome = run("plan", manifest())
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    base, one, two = (make_model(seed=seed) for seed in range(3))
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[:8] == [
        "format: mergekit-moe: a stock checkpoint without owners",
        "class: MixtralForCausalLM",
        f"base: {base}",
        "router: hidden, 2 of 2 experts a token",
        "shared: -",
        "tensors: mergekit names, F32",
        "parameters: 43.5 k in all, 43.5 k active for a token",
        "size: 174.0 kB",
    ]
    assert f"{one} 48" in lines
    assert f"{base} 9 FFNs of the base, in whose place experts stand" in lines
    assert f"{two} 21 not an FFN: attention, norms and embeddings are the base model's" in lines


def test_build(run: Any, manifest: Any, tmp_path: Path, config_of: Any, oracle: Any) -> None:
    import torch
    from safetensors.torch import load_file

    path = manifest(gate_mode="random")
    outcome = run("build", path, tmp_path / "out", "--seed", "3", "--json")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    theirs = oracle(config_of(gate_mode="random"), seed=3)
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    row = json.loads(outcome.stdout)
    assert row["parameters_total"] == sum(tensor.numel() for tensor in found.values())
    assert row["bytes"] == sum(tensor.nbytes for tensor in found.values())
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "mergekit_moe_config.yml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / "mergekit_moe_config.yml").read_text() == path.read_text()


def test_build_says_what_it_built(run: Any, manifest: Any, tmp_path: Path, make_model: Any) -> None:
    outcome = run("build", manifest(gate_mode="cheap_embed"), tmp_path / "out", "--layout", "classic")
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(
        f"Built {tmp_path / 'out'}: MixtralForCausalLM of 2 experts on {make_model()}, 174.0 kB in "
    )


def test_parameters_are_counted_exactly(run: Any, manifest: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for number, keys in enumerate(
        (
            {"family": "qwen2"},
            {"family": "phi3", "experts": 3},
            {"architecture": "qwen", "experts": 3},
            {"architecture": "deepseek"},
        )
    ):
        path, out = manifest(gate_mode="random", prompts=False, **keys), tmp_path / str(number)
        counted = json.loads(run("build", path, out, "--json").stdout)["parameters_total"]
        assert counted == sum(t.numel() for t in load_file(out / "model.safetensors").values()), keys


def test_dry_run_writes_nothing(run: Any, manifest: Any, tmp_path: Path) -> None:
    outcome = run("build", manifest(), tmp_path / "out", "--dry-run")
    assert (outcome.exit_code, (tmp_path / "out").exists()) == (0, False)
    assert outcome.stdout == run("plan", manifest()).stdout


@pytest.mark.parametrize("command", ["plan", "build"])
def test_bad_input(command: str, run: Any, manifest: Any, tmp_path: Path, make_model: Any) -> None:
    out = [tmp_path / "out"] if command == "build" else []
    path = manifest(model={"attention_bias": True}, gate_mode="random")
    before = sorted(tmp_path.iterdir())
    outcome = run(command, path, *out)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    base = make_model(attention_bias=True)
    assert outcome.stderr.startswith(
        f"Error: This mixture of {base} cannot be written:\n  - {base}: model.layers.0.self_attn.k_proj.bias has no "
    )
    assert sorted(tmp_path.iterdir()) == before
    path.write_text("base_model: x\nexperts: [{source_model: y}]\nexpert_per_token: 1\n")
    assert run(command, path, *out).stderr == (
        "Error: mergekit-moe manifest moe.yml has 1 problem:\n"
        "  - expert_per_token: unknown key; did you mean 'experts_per_token'? Allowed: architecture, base_model, "
        "dtype, experts, experts_per_token, gate_mode, shared_experts\n"
    )


def test_options_of_the_other_kind_of_manifest(run: Any, manifest: Any, tmp_path: Path) -> None:
    path = manifest(gate_mode="random")
    outcome = run("build", path, tmp_path / "out", "--copy")
    assert (outcome.exit_code, outcome.stderr) == (
        2,
        f"Error: {path} is a mergekit-moe manifest, whose build always copies: leave --copy out.\n",
    )
    (tmp_path / "own.yaml").write_text("name: x\nbase: y\nexperts: [acme/z]\n")
    outcome = run("plan", tmp_path / "own.yaml", "--layout", "classic", "--no-padding")
    assert (outcome.exit_code, outcome.stderr) == (
        2,
        "Error: Only mergekit-moe's manifests (base_model, experts with source_model) have --layout, --no-padding; "
        "leave them out.\n",
    )


def test_composed(run: Any, manifest: Any, tmp_path: Path, make_model: Any) -> None:
    path = manifest(family="gemma3_text", model={"head_dim": 8}, gate_mode="random")
    outcome = run("build", path, tmp_path / "out")
    assert outcome.exit_code == 2
    assert "`coterie build --composed` writes a coterie model instead" in outcome.stderr
    outcome = run("build", path, tmp_path / "out", "--composed")
    base, one, two = (make_model("gemma3_text", seed=seed, head_dim=8) for seed in range(3))
    names = ", ".join(f"{folder.name.lower()}/model" for folder in (one, two))
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert outcome.stdout == (
        f"Built {tmp_path / 'out'}: a coterie model of {names} around {base} (recipe btx).\n"
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moe.yml", "out"]
