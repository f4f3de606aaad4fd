"""Pico models of the families that mergekit-moe takes and refuses, and mergekit itself as the oracle."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
PROMPTS = (("def f(a):", "x"), ("the tenant", "under clause 7 ("), ("fever", "a b c d e"))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, pico: Any) -> Callable[..., Path]:
    """The folder of a pico model, made once: make_model("llama", seed=1, dtype="bfloat16", **config)."""
    made: dict[Any, Path] = {}

    def make(
        family: str = "llama", seed: int = 0, dtype: str = "float32", tokens: bool = True, **changes: Any
    ) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = (family, seed, dtype, tokens, json.dumps(changes, sort_keys=True))
        if key in made:
            return made[key]
        torch.manual_seed(100 + seed)
        config = AutoConfig.for_model(family, **{**_SIZES, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.1)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
        made[key] = tmp_path_factory.mktemp(f"{family}{seed}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(made[key])
            if tokens:
                for path in pico.base("llama").glob("*token*"):
                    shutil.copyfile(path, made[key] / path.name)
        return made[key]

    return make


@pytest.fixture(scope="session")
def config_of(make_model: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A manifest over pico models of a family: a base and experts of other seeds, with prompts."""

    def make(
        family: str = "llama",
        *,
        experts: int = 2,
        prompts: bool = True,
        model: dict[str, Any] | None = None,
        **keys: Any,
    ) -> dict[str, Any]:
        entries = []
        for number in range(experts):
            entry: dict[str, Any] = {
                "source_model": str(make_model(family, seed=number + 1, **(model or {})))
            }
            if prompts:
                entry |= {"positive_prompts": list(PROMPTS[number]), "negative_prompts": ["zz"]}
            entries.append(entry)
        base = str(make_model(family, **(model or {})))
        return {"base_model": base, "experts": entries, **keys}

    return make


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What mergekit writes for a manifest, by name."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mergekit imports what numpy has renamed
        from mergekit.merge import MergeOptions
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.scripts.moe import build

    def run(config: dict[str, Any], *, seed: int = 0, folder: Path | None = None) -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file

        out = folder or tmp_path_factory.mktemp("mergekit")
        torch.manual_seed(seed)
        with warnings.catch_warnings(), contextlib.suppress(OSError):
            warnings.simplefilter("ignore")
            build(
                MoEMergeConfig.model_validate(config),
                str(out),
                MergeOptions(copy_tokenizer=False),
                device="cpu",
                allow_all_same=True,
            )
        found: dict[str, Any] = {}
        for path in sorted(out.glob("*.safetensors")):
            found |= load_file(path)
        return found

    return run


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What coterie writes for a manifest, by name; the folder is ``tmp_path / "out"`` unless named."""

    def run(config: dict[str, Any], name: str = "out", **options: Any) -> dict[str, Any]:
        from safetensors.torch import load_file

        from composer.mergekit_moe.manifest import parse
        from composer.mergekit_moe.planning import plan_moe
        from composer.mergekit_moe.writing import build_moe

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_moe(plan_moe(parse(config), **options), tmp_path / name)
        found: dict[str, Any] = {}
        for path in sorted((tmp_path / name).glob("*.safetensors")):
            found |= load_file(path)
        return found

    return run


@pytest.fixture(scope="session")
def adapter(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A PEFT adapter of the pico Llama's attention and FFNs, random on both sides."""

    def make(*, seed: int, base_seed: int = 0, **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp("adapter")
        settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **options}
        settings.setdefault("target_modules", ["q_proj", "gate_proj", "up_proj", "down_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(make_model(seed=base_seed)), LoraConfig(**settings)
            )
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
        return folder

    return make
