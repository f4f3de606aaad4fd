"""What the checkpoints compute: in transformers' own classes, without a missing or unexpected tensor.

n copies of one model behind any normalised router are the model itself; that is the oracle here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

IDS = [[3, 5, 9, 17, 33, 65, 2, 4], [90, 80, 70, 60, 50, 40, 30, 20]]


def logits(folder: Path) -> Any:
    """Logits of a folder as transformers loads it; everything in it must be used."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()(torch.tensor(IDS)).logits


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama classic": {"options": {"layout": "classic"}},
    "llama rope3": {
        "model": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        }
    },
    "llama of wide heads, tied": {"model": {"head_dim": 16, "tie_word_embeddings": True}},
    "mistral with a window": {"family": "mistral", "model": {"sliding_window": 4}},
    "mistral with a window in qwen": {
        "family": "mistral",
        "architecture": "qwen moe",
        "model": {"sliding_window": 4},
    },
    "phi3": {"family": "phi3"},
    "phi3 classic": {"family": "phi3", "options": {"layout": "classic"}},
    "qwen2 without a shared expert": {"family": "qwen2"},
    "qwen2 with windows": {
        "family": "qwen2",
        "model": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    },
    "llama with biases of q, k and v in qwen": {
        "architecture": "qwen",
        "model": {"attention_bias": True},
        "zero": "o_proj.bias",
    },
    "qwen3": {"family": "qwen3"},
    "qwen3 classic": {"family": "qwen3", "options": {"layout": "classic"}},
    "olmo2": {"family": "olmo2"},
    "float16": {"dtype": "float16", "tolerance": 3e-2},
}


@pytest.mark.parametrize("case", CASES)
def test_copies_are_the_dense_model(
    case: str, make_model: Any, built: Any, tmp_path: Path, zeroed: Any
) -> None:
    wanted = {"family": "llama", "model": {}, "options": {}, "tolerance": 1e-5, "zero": None, **CASES[case]}
    base = make_model(wanted.pop("family"), seed=0, **wanted.pop("model"))
    if (name := wanted.pop("zero")) is not None:
        base = zeroed(base, name)
    options, tolerance = wanted.pop("options"), wanted.pop("tolerance")
    config = {
        "base_model": str(base),
        "gate_mode": "random",
        "experts_per_token": 3,
        "experts": [{"source_model": str(base)}] * 4,
        **wanted,
    }
    built(config, **options)
    ours, dense = logits(tmp_path / "out").float(), logits(base).float()
    assert (ours - dense).abs().max().item() < tolerance * max(1.0, dense.abs().max().item())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"head_dim": 16}),
        ("mistral", {}),
        ("phi3", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16, "attention_bias": True}),
        ("olmo2", {"attention_bias": True}),
    ],
)
def test_what_a_class_needs_is_what_transformers_gives_memory(
    family: str, settings: Any, tied: bool, make_model: Any, config_of: Any, built: Any, tmp_path: Path
) -> None:
    """Names and shapes, of a class and its settings as written; missing ones would be filled with random numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from composer.mergekit_moe.completeness import expected_trunk
    from composer.mergekit_moe.manifest import parse
    from composer.mergekit_moe.planning import plan_moe

    settings = {**settings, "tie_word_embeddings": tied}
    config = config_of(family, model=settings, gate_mode="random", prompts=False)
    built(config)
    plan = plan_moe(parse(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    held = {name: tuple(p.shape) for name, p in model.named_parameters() if ".mlp." not in name}
    held = {name: shape for name, shape in held.items() if name not in plan.missing_biases()}
    if family == "qwen2":  # it says nowhere that it has them; those of one layer ask for all others
        held = {name: shape for name, shape in held.items() if not name.endswith("_proj.bias")}
    base = plan.base.description
    assert expected_trunk(plan.family, base.config, layers=3, hidden=32) == held


@pytest.fixture
def zeroed(tmp_path: Path) -> Any:
    """A copy of a model's folder in which tensors whose names end so are zeros."""
    import shutil

    def make(folder: Path, *endings: str, name: str = "zeroed") -> Path:
        from safetensors.torch import load_file, save_file

        copy = Path(shutil.copytree(folder, tmp_path / name))
        tensors = load_file(copy / "model.safetensors")
        for key in tensors:
            if key.endswith(endings):
                tensors[key].zero_()
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize("what", ["ungated", "neither base nor routed", "of another width"])
def test_shared_expert_counts_in_full(
    what: str, make_model: Any, built: Any, tmp_path: Path, zeroed: Any
) -> None:
    """Routed experts of zeros leave the shared one alone; transformers' sigmoid gate halves what was doubled."""
    base = make_model(seed=0)
    mute = zeroed(base, "mlp.down_proj.weight")
    if what == "ungated":
        shared, expected = base, base
    elif what == "of another width":
        shared = make_model(seed=0, intermediate_size=80)
        expected = crossed(base, shared, tmp_path / "crossed")
    else:
        shared = make_model(seed=9)
        expected = crossed(base, shared, tmp_path / "crossed")
    config = {
        "base_model": str(base),
        "gate_mode": "uniform_random",
        "experts": [{"source_model": str(mute)}, {"source_model": str(mute)}],
        "shared_experts": [{"source_model": str(shared)}],
    }
    built(config)
    ours, dense = logits(tmp_path / "out"), logits(expected)
    assert (ours - dense).abs().max().item() < 1e-5 * max(1.0, dense.abs().max().item())


def crossed(base: Path, ffn: Path, out: Path) -> Path:
    """The base with another model's FFNs, as a dense model."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    tensors |= {n: t for n, t in load_file(ffn / "model.safetensors").items() if ".mlp." in n}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["intermediate_size"] = json.loads((ffn / "config.json").read_text())["intermediate_size"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("architecture", ["mixtral", "qwen"])
def test_narrow_experts_are_padded_exactly(
    architecture: str, make_model: Any, built: Any, tmp_path: Path
) -> None:
    """Both experts hold the narrow FFN, one of them widened with zeros by hand: so copies are the dense model again."""
    wide, narrow = make_model(seed=0, intermediate_size=80), make_model(seed=1)
    config = {
        "base_model": str(narrow),
        "gate_mode": "random",
        "architecture": architecture,
        "experts": [
            {"source_model": str(narrow)},
            {"source_model": str(narrow)},
            {"source_model": str(wide)},
        ],
        "experts_per_token": 1,
    }
    found = built(config)
    downs = [t for name, t in found.items() if name.endswith(("0.down_proj.weight", "experts.down_proj"))]
    assert downs
    assert {tensor.shape[-1] for tensor in downs} == {80}
    folder = tmp_path / "out"
    _steer(folder, found, towards=(0, 1), away=2)
    ours, dense = logits(folder), logits(narrow)
    assert (ours - dense).abs().max().item() < 1e-5 * max(1.0, dense.abs().max().item())


def _steer(folder: Path, tensors: dict[str, Any], *, towards: tuple[int, int], away: int) -> None:
    """Rewrite the routers so that one of two opposite rows always beats the third, which is zero."""
    from safetensors.torch import load_file, save_file

    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name][towards[1]] = -tensors[name][towards[0]]
            tensors[name][away] = 0
    for path in folder.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(path)}, path, metadata={"format": "pt"})


def merged(base: Path, adapter: Path) -> Any:
    """What PEFT makes of a model and its adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter
        ).merge_and_unload()


def test_adapter_is_added_as_peft_adds_it(make_model: Any, built: Any, tmp_path: Path, adapter: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, path = make_model(seed=0), adapter(seed=3)
    found = built(
        {
            "base_model": str(base),
            "gate_mode": "random",
            "experts_per_token": 1,
            "experts": [{"source_model": f"{base}+{path}"}, {"source_model": str(make_model(seed=1))}],
        }
    )
    weights = merged(base, path).state_dict()
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp"
        gate_up = torch.cat([weights[f"{stem}.{n}_proj.weight"] for n in ("gate", "up")])
        assert torch.allclose(found[f"{stem}.experts.gate_up_proj"][0], gate_up, atol=1e-6)
        assert torch.allclose(
            found[f"{stem}.experts.down_proj"][0], weights[f"{stem}.down_proj.weight"], atol=1e-6
        )
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[name], weights[name])  # the adapter changes attention too,
    assert torch.equal(found[name], plain[name])  # which is the base model's in a mixture


def test_adapter_of_the_base_model_reaches_trunk_and_gates(
    make_model: Any, built: Any, tmp_path: Path, adapter: Any, config_of: Any
) -> None:
    import torch

    base, path = make_model(seed=0), adapter(seed=3)
    merged(base, path).save_pretrained(tmp_path / "merged")
    for file in base.glob("*token*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    config = config_of()
    ours = built({**config, "base_model": f"{base}+{path}"})
    theirs = built({**config, "base_model": str(tmp_path / "merged")}, "other")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-2 if "gate.weight" in name else 1e-6), name
    assert not torch.equal(
        ours["model.layers.2.mlp.gate.weight"], built(config, "plain")["model.layers.2.mlp.gate.weight"]
    )


def test_rows_of_a_streamed_base_are_those_of_the_whole(make_model: Any, config_of: Any, built: Any) -> None:
    """Sliding windows, left padding and per-layer masks are the model's own business; here against the whole model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for family, changes in {
        "mistral": {"sliding_window": 3},
        "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        "olmo2": {},
        "phi3": {},
    }.items():
        config = config_of(family, model=changes)
        found = built(config, family)
        tokenizer = AutoTokenizer.from_pretrained(config["base_model"])
        model = AutoModelForCausalLM.from_pretrained(config["base_model"], dtype=torch.bfloat16)
        tokenizer.padding_side = "left"

        def states(prompts: list[str], tokenizer: Any = tokenizer, model: Any = model) -> Any:
            with torch.no_grad():
                batch = tokenizer(prompts, return_tensors="pt", padding=True)
                hidden = model(**batch, output_hidden_states=True).hidden_states
            return [state[:, -1].sum(0) / len(prompts) for state in hidden[:-1]]

        entry = config["experts"][1]
        pairs = zip(states(entry["positive_prompts"]), states(entry["negative_prompts"]), strict=True)
        for layer, (yes, no) in enumerate(pairs):
            expected = torch.nn.functional.normalize((yes - no).float(), dim=0)
            row = found[f"model.layers.{layer}.mlp.gate.weight"][1].float()
            assert torch.allclose(row, expected, atol=1e-2), (family, layer)
