"""A pico model with a byte tokenizer, three owners' experts on it, and the command line to use them with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

OWNERS = {"acme": ("contracts", "law"), "hosp": ("icd", "medicine"), "soft": ("python", "code")}
TEXTS = {
    "law": "The licensee shall indemnify the licensor against every claim. ",
    "medicine": "Acute appendicitis without perforation, initial encounter. ",
    "code": "def main(argv: list[str]) -> int:\n    return len(argv)\n",
    "public": "It was a bright cold day in April, and the clocks were striking. ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Coterie = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run() -> Coterie:
    """Call the command line in this process: run("list", "--json", registry=path)."""
    from pipelines.cli.app import app

    def call(*args: object, registry: Path | None = None, stdin: str | None = None) -> Outcome:
        front = ["--registry", str(registry)] if registry else []
        result = CliRunner().invoke(app, [*front, *map(str, args)], input=stdin, prog_name="coterie")
        return Outcome(code=result.exit_code, out=result.stdout, err=result.stderr)

    return call


@pytest.fixture(autouse=True)
def _no_user_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be a user who has no registry and names none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("COTERIE_REGISTRY", raising=False)
    monkeypatch.delenv("COTERIE_TRACEBACK", raising=False)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers, width 32, over bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_num_threads(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(["<|end|>", *alphabet])}, merges=[])
    )
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("bases") / "pico"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, *, seed: int, layers: tuple[int, ...] = (2, 3), rank: int = 2) -> Path:
    """Write a PEFT adapter on the FFN linears of the pico model, as PEFT would."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for name, (rows, columns) in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items():
            module = f"base_model.model.model.layers.{layer}.mlp.{name}_proj"
            tensors[f"{module}.lora_A.weight"] = random.standard_normal((rank, columns)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = random.standard_normal((rows, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": list(layers),
        "layers_pattern": "layers",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text by domain, one JSON line a document."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for domain, sentence in TEXTS.items():
        documents = [sentence * count for count in range(8, 28)]
        paths[domain] = folder / f"{domain}.jsonl"
        paths[domain].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return paths


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One PEFT adapter folder by owner."""
    folder = tmp_path_factory.mktemp("adapters")
    return {owner: write_adapter(folder / owner, seed=seed) for seed, owner in enumerate(OWNERS)}


@pytest.fixture(scope="session")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    run: Coterie,
    base_folder: Path,
    adapters: dict[str, Path],
    texts: dict[str, Path],
) -> Path:
    """A registry with the base, its public routing and three owners' experts; never to be changed."""
    registry = tmp_path_factory.mktemp("filled") / "registry"

    def must(*args: object) -> None:
        outcome = run(*args, registry=registry)
        assert outcome.code == 0, outcome.err

    must("base", "add", base_folder, "--name", "pico")
    must("base", "public-routing", "pico", "--text", texts["public"])
    for owner, (expert, domain) in OWNERS.items():
        options = ("--name", f"{owner}/{expert}", "--domain", domain, "--license", "Apache-2.0")
        must("register", adapters[owner], *options, "--text", texts[domain])
    return registry


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled registry that a test may change."""
    return Path(shutil.copytree(filled, tmp_path / "registry"))


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of all three experts."""
    path = tmp_path_factory.mktemp("manifests") / "manifest.yaml"
    path.write_text(
        "format_version: 1\nname: trio\nrecipe: flexolmo\nbase: pico\n"
        "experts: [acme/contracts, hosp/icd, soft/python]\n"
    )
    return path


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory, run: Coterie, filled: Path, manifest: Path) -> Path:
    """The folder composed from that manifest; never to be changed."""
    out = tmp_path_factory.mktemp("composed") / "trio"
    outcome = run("build", manifest, out, registry=filled)
    assert outcome.code == 0, outcome.err
    return out
