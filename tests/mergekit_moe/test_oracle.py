"""Where mergekit is right, every tensor equals its output, under the same name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

CASES: dict[str, dict[str, Any]] = {
    "mixtral hidden": {},
    "mixtral hidden_last": {"gate_mode": "hidden_last"},
    "mixtral hidden_avg": {"gate_mode": "hidden_avg", "experts": 3, "experts_per_token": 3},
    "mixtral cheap_embed": {"gate_mode": "cheap_embed", "dtype": "bfloat16"},
    "mixtral random": {"gate_mode": "random", "dtype": "float16", "prompts": False},
    "mixtral uniform_random": {"gate_mode": "uniform_random"},
    "mixtral of tied models": {"model": {"tie_word_embeddings": True}},
    "mixtral of bfloat16": {"model": {"dtype": "bfloat16"}, "dtype": "float32"},
    "mixtral of mistral": {"family": "mistral", "architecture": "MIXTRAL"},
    "deepseek": {"architecture": "deepseek", "gate_mode": "cheap_embed"},
    "qwen3": {"family": "qwen3", "model": {"head_dim": 16}},
}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    import torch

    assert theirs
    assert set(ours) == set(theirs)
    differing = [
        name
        for name, tensor in theirs.items()
        if tensor.dtype != ours[name].dtype or not torch.equal(tensor, ours[name])
    ]
    assert differing == []


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_mergekits(case: str, config_of: Any, oracle: Any, built: Any) -> None:
    wanted = dict(CASES[case])
    config = config_of(wanted.pop("family", "llama"), **wanted)
    assert_same(built(config, seed=5), oracle(config, seed=5))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_shared_expert_behind_a_gate(
    family: str, config_of: Any, make_model: Any, oracle: Any, built: Any
) -> None:
    config = config_of(family, experts=2, architecture="qwen moe")
    # mergekit opens no model for the shared expert alone
    config["shared_experts"] = [
        {"source_model": config["base_model"], "positive_prompts": ["any"], "residual_scale": 0.5}
    ]
    assert_same(built(config), oracle(config))


SHARED: dict[str, tuple[str, str, str | None, list[str] | None]] = {
    # mergekit takes Qwen's class, and so draws a gate: it is asked for, or the base is a Qwen2
    "qwen2 random without prompts": ("qwen2", "random", None, None),
    "qwen2 random without prompts, named": ("qwen2", "random", "qwen", None),
    "llama random without prompts, named": ("llama", "random", "qwen", None),
    "qwen2 random": ("qwen2", "random", None, ["any"]),
    "qwen2 uniform_random": ("qwen2", "uniform_random", None, ["any"]),
    "qwen2 hidden": ("qwen2", "hidden", None, ["any"]),
    "qwen2 hidden_avg": ("qwen2", "hidden_avg", None, ["any", "x y z"]),
    "qwen2 hidden_last, named": ("qwen2", "hidden_last", "qwen moe", ["any"]),
    "qwen2 cheap_embed": ("qwen2", "cheap_embed", None, ["any"]),
    "llama random": ("llama", "random", None, ["any"]),
    # DeepSeek's shared expert is not gated, yet mergekit draws a row for it between those of two layers
    "deepseek random": ("mistral", "random", "deepseek", None),
    "deepseek uniform_random": ("llama", "uniform_random", "deepseek", None),
    "deepseek hidden": ("llama", "hidden", "deepseek moe", None),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_expert(case: str, config_of: Any, oracle: Any, built: Any) -> None:
    family, mode, architecture, prompts = SHARED[case]
    config = config_of(family, gate_mode=mode, architecture=architecture)
    config["shared_experts"] = [{"source_model": config["base_model"], "positive_prompts": prompts}]
    assert_same(built(config, seed=5), oracle(config, seed=5))


def test_configuration_of_deepseek(
    config_of: Any, make_model: Any, oracle: Any, built: Any, tmp_path: Path
) -> None:
    """Settings that the base's own file leaves out are written too: the class that reads them has other defaults."""
    base = Path(shutil.copytree(make_model("mistral"), tmp_path / "base"))
    written = json.loads((base / "config.json").read_text())
    for key in ("rms_norm_eps", "initializer_range"):
        del written[key]
    (base / "config.json").write_text(json.dumps(written))
    config = {**config_of("mistral", architecture="deepseek", gate_mode="random"), "base_model": str(base)}
    built(config)
    oracle(config, folder=tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    differing = {key for key in theirs if key not in ours or ours[key] != theirs[key]}
    assert differing <= {"_name_or_path", "transformers_version"}
    assert "rms_norm_eps" in theirs


def test_shared_expert_with_negative_prompts_alone(config_of: Any, oracle: Any, built: Any) -> None:
    """Drawn gates read no prompts, but prompts keep mergekit from DeepSeek's class, which has no gate."""
    config = config_of(gate_mode="random")
    config["shared_experts"] = [{"source_model": config["base_model"], "negative_prompts": ["any"]}]
    assert_same(built(config), oracle(config))


@pytest.mark.parametrize("mode", ["random", "uniform_random", "hidden"])
def test_shared_expert_without_a_gate_is_deepseeks(
    mode: str, config_of: Any, oracle: Any, built: Any
) -> None:
    """mergekit takes DeepSeek's class, which none of transformers loads; Qwen2-MoE holds the same tensors.

    The sigmoid of a gate of zeros is 1/2, so the down projection of the shared expert stands there twice.
    """
    config = config_of(gate_mode=mode)
    config["shared_experts"] = [{"source_model": config["base_model"]}]
    ours, theirs = built(config, seed=5), oracle(config, seed=5)
    renamed = {}
    for name, tensor in theirs.items():
        twice = 2 if name.endswith("shared_experts.down_proj.weight") else 1
        renamed[name.replace("shared_experts", "shared_expert")] = tensor * twice
    zeros = {name: ours.pop(name) for name in set(ours) - set(renamed)}
    assert_same(ours, renamed)
    assert not any(tensor.any() for tensor in zeros.values())
    assert {name.rpartition(".layers.")[2][2:] for name in zeros} == {
        "mlp.shared_expert_gate.weight",
        *(f"self_attn.{role}_proj.bias" for role in "qkv"),
    }


def test_noise_has_the_scale_that_is_asked_for(config_of: Any, oracle: Any, built: Any) -> None:
    import torch

    config = config_of(gate_mode="random", experts_per_token=1)
    plain = built(config, "plain")
    config["experts"][1] |= {"noise_scale": 0.25, "residual_scale": 2.0}
    ours, theirs = built(config), oracle(config)
    assert set(ours) == set(theirs)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(ours[key][0], theirs[key][0])
        factor = 2.0 if name == "down_proj" else 1.0
        noise = ours[key][1] / factor - plain[key][1]
        assert noise.std().item() == pytest.approx(0.25, rel=0.1)
        assert abs(noise.mean().item()) < 0.02
    again = built(config, "again")
    other = built(config, "other", seed=1)
    key = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(ours[key], again[key])
    assert not torch.equal(ours[key][1], other[key][1])


def test_noise_of_two_copies_differs(config_of: Any, built: Any) -> None:
    import torch

    config = config_of(gate_mode="random", experts_per_token=1)
    config["experts"][1] = dict(config["experts"][0])
    for entry in config["experts"]:
        entry["noise_scale"] = 0.1
    found = built(config)["model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(found[0], found[1])


def test_shards(config_of: Any, make_model: Any, tmp_path: Path, oracle: Any) -> None:
    """Sharded sources, sharded output."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from composer.mergekit_moe.manifest import parse
    from composer.mergekit_moe.planning import plan_moe
    from composer.mergekit_moe.writing import build_moe

    config = config_of(gate_mode="cheap_embed")
    source = Path(config["experts"][0]["source_model"])
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    theirs = oracle(config)
    config["experts"][0]["source_model"] = str(tmp_path / "shards")
    build_moe(plan_moe(parse(config)), tmp_path / "out", shard_bytes=50_000)
    found: dict[str, Any] = {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        found |= load_file(path)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_same(found, theirs)
