"""Pico checkpoints of every family, adapters written by PEFT, and helpers that write hostile files."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experts.base import BaseDescription
from experts.card import BaseRef, ExpertCard
from experts.fingerprint import tokenizer_fingerprint
from experts.package import pack

os.environ.setdefault("OMP_NUM_THREADS", "1")

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "olmo2": {},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {},
    "phi3": {},
    "phi": {},
}
FAMILIES = tuple(_EXTRA)


def _model(family: str = "llama", *, seed: int = 0) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_SIZES, **_EXTRA[family])
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """A fresh pico model of a family."""
    return _model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint folder of a pico model, written once by transformers."""
    folders: dict[tuple[str, int], Path] = {}

    def get(family: str = "llama", *, seed: int = 0) -> Path:
        if (family, seed) not in folders:
            folder = tmp_path_factory.mktemp(f"{family}{seed}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _model(family, seed=seed).save_pretrained(folder)
            folders[family, seed] = folder
        return folders[family, seed]

    return get


@pytest.fixture(scope="session")
def base(base_folder: Callable[..., Path]) -> Callable[..., BaseDescription]:
    """The description of a pico base."""
    known: dict[tuple[str, int], BaseDescription] = {}

    def get(family: str = "llama", *, seed: int = 0) -> BaseDescription:
        if (family, seed) not in known:
            known[family, seed] = BaseDescription.from_folder(base_folder(family, seed=seed))
        return known[family, seed]

    return get


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An adapter folder as PEFT writes it, on a pico model; random B, so that it changes something."""

    def make(family: str = "llama", *, dtype: str = "float32", **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        folder = tmp_path_factory.mktemp("adapter")
        options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(_model(family), LoraConfig(**options))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
                    parameter.data = parameter.data.to(getattr(torch, dtype))
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def ref() -> Callable[[BaseDescription], BaseRef]:
    """How a card refers to a base."""

    def make(base: BaseDescription) -> BaseRef:
        empty = tokenizer_fingerprint(Path("no such folder"))
        return BaseRef(name="pico", fingerprint=base.fingerprint, tokenizer_fingerprint=empty)

    return make


@pytest.fixture
def packed(
    tmp_path: Path,
    adapter: Callable[..., Path],
    base: Callable[..., BaseDescription],
    ref: Callable[[BaseDescription], BaseRef],
) -> tuple[Path, ExpertCard, BaseDescription]:
    """A packed low-rank expert on the FFN linears of layers 1 and 2 of the pico Llama."""
    raw = adapter(target_modules=["up_proj", "down_proj"], layers_to_transform=[1, 2])
    folder = tmp_path / "expert"
    card = pack(
        raw,
        folder,
        name="acme/contracts",
        version=1,
        domain="law",
        license="Apache-2.0",
        base=base(),
        base_ref=ref(base()),
    )
    return folder, card, base()


@pytest.fixture(scope="session")
def write_raw() -> Callable[..., None]:
    """Write a safetensors file from its parts, however wrong they are."""

    def write(
        path: Path, header: bytes | dict[str, Any], body: bytes = b"", *, length: int | None = None
    ) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)

    return write


@pytest.fixture(scope="session")
def reseal() -> Callable[..., ExpertCard]:
    """Write a card that matches whatever now lies in a packed folder, as a dishonest owner would."""
    from hashlib import sha256

    def write(folder: Path, card: ExpertCard, **changes: Any) -> ExpertCard:
        files = [
            {"path": p.name, "size": p.stat().st_size, "sha256": sha256(p.read_bytes()).hexdigest()}
            for p in sorted(folder.iterdir())
            if p.name != "card.json"
        ]
        new = ExpertCard.create(**{**card.model_dump(mode="json"), "files": files, **changes})
        (folder / "card.json").write_bytes(new.to_bytes())
        return new

    return write
