"""Pico anchors of five families, a byte-level tokenizer, and small text with something to learn in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Token id = byte value, 256 = end of text: ids can be computed in a test without the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable}
    character |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {character[byte]: byte for byte in range(256)} | {"<end>": 256}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


FAMILIES = ("llama", "qwen3", "olmo2", "gemma3", "gpt_neox")


def _config(family: str):
    import transformers

    common = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    sliding = {"sliding_window": 16}
    return {
        "llama": lambda: transformers.LlamaConfig(**common, num_key_value_heads=2),
        "qwen3": lambda: transformers.Qwen3Config(
            **common, **grouped, use_sliding_window=True, max_window_layers=2, **sliding
        ),
        "olmo2": lambda: transformers.Olmo2Config(**common),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **common, **grouped, **sliding, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common),
    }[family]()


@pytest.fixture(scope="session")
def anchor(tmp_path_factory, byte_tokenizer):
    """A function that gives the checkpoint folder of a family's pico anchor (random weights, float32)."""
    import torch
    import transformers

    folders: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(f"anchor-{family}")
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(_config(family))
            model.save_pretrained(folder)
            byte_tokenizer.save_pretrained(folder)
            folders[family] = folder
        return folders[family]

    return make


def _documents(words: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words.split(), k=rng.randint(20, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, Path]:
    """``law``, ``code`` and ``public``: files of documents with vocabularies of their own."""
    folder = tmp_path_factory.mktemp("texts")
    vocabularies = {
        "law": "licence licensee warranty shall hereby terms grant notice copyright liable",
        "code": "def return import self class yield lambda None True assert",
        "public": "the a of and river house morning walked evening garden",
    }
    paths = {}
    for seed, (name, words) in enumerate(vocabularies.items()):
        paths[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": text}) for text in _documents(words, 40, seed)]
        paths[name].write_text("\n".join(lines) + "\n")
    return paths


@pytest.fixture
def make_job(anchor, texts, tmp_path):
    """A function that gives a small job; keyword arguments override fields."""
    from pipelines.train.job import DomainJob

    def make(family: str = "llama", **fields):
        return DomainJob.from_dict(
            {
                "name": "acme/contracts",
                "domain": "law",
                "license": "Apache-2.0",
                "base": str(anchor(family)),
                "data": str(texts["law"]),
                "rank": 4,
                "steps": 8,
                "batch_size": 2,
                "sequence_length": 32,
                "checkpoint_every": 3,
                "workdir": str(tmp_path / "private"),
                **fields,
            }
        )

    return make
