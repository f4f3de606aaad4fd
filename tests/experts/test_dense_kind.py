"""Whole models as experts: every way a folder may come, what is refused before anything is written, what is kept."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from experts.admission import check_expert
from experts.errors import AdmissionError, ExpertWarning
from experts.fingerprint import fingerprint_tensors
from experts.package import pack, read_package
from experts.same_architecture import architecture_problems

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tuned(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A fresh copy of a pico model's folder, in one file or in shards."""
    made: dict[Any, Path] = {}

    def make(family: str = "llama", *, seed: int = 7, **options: Any) -> Path:
        key = (family, seed, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tuned")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_model(family, seed=seed).save_pretrained(made[key], **options)
        return Path(shutil.copytree(made[key], tmp_path_factory.mktemp("copy") / "raw"))

    return make


@pytest.fixture
def packed_as(base: Any, ref: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(raw: Path, family: str = "llama", **changes: Any) -> Any:
        about = {"name": "acme/whole", "version": 1, "domain": "law", "license": "MIT"}
        return pack(raw, tmp_path / "out", **about, base=base(family), base_ref=ref(base(family)), **changes)

    return make


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "gemma3_text"])
def test_packed_folder_is_the_model(
    family: str, tuned: Make, packed_as: Any, base: Any, tmp_path: Path
) -> None:
    raw = tuned(family)
    card = packed_as(raw, family)
    summary = check_expert(tmp_path / "out", card, base(family))
    assert (card.kind, card.layers, card.rank) == ("dense", (0, 1, 2), None)
    assert [entry.path for entry in card.files] == ["config.json", "model.safetensors"]
    assert (summary.ffn_only, summary.dtype) == (False, "F32")
    assert fingerprint_tensors(tmp_path / "out") == fingerprint_tensors(raw)
    assert read_package(tmp_path / "out") == card


def test_packed_folder_loads_in_transformers(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    raw = tuned()
    packed_as(raw)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        own, packed = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (raw, tmp_path / "out"))
    assert torch.equal(own, packed)


def test_shards_become_one_file(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    shards = tuned(max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    from_shards = packed_as(shards)
    shutil.rmtree(tmp_path / "out")
    assert packed_as(tuned()) == from_shards  # byte for byte: the card lists digests


def test_what_trainers_leave_is_left_behind(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    for name in ("training_args.bin", "trainer_state.json", "generation_config.json", "README.md"):
        (raw / name).write_bytes(b"secret")
    config = json.loads((raw / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/ann/secret"}))
    packed_as(raw)
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]


def test_a_download_is_a_folder_of_links(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw, linked = tuned(max_shard_size="20KB"), tmp_path / "linked"
    linked.mkdir()
    for path in raw.iterdir():
        (linked / path.name).symlink_to(path)
    packed_as(linked)
    packed = list((tmp_path / "out").iterdir())
    assert len(packed) == 3
    assert not any(path.is_symlink() for path in packed)


@pytest.mark.parametrize("how", ["tied copy", "rotary buffer"])
def test_tensors_that_say_nothing_are_left_out(
    how: str, tuned: Make, packed_as: Any, tmp_path: Path, base: Any
) -> None:
    raw = tuned()
    tensors = load_file(raw / "model.safetensors")
    if how == "tied copy":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    else:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"]
    save_file(tensors, raw / "model.safetensors")
    packed_as(raw)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(base().tensors)


def test_head_that_is_not_the_tied_embedding(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    tensors = load_file(raw / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, raw / "model.safetensors")
    Refused(packed_as, raw, tmp_path).exactly(
        f"The checkpoint in '{raw}' does not hold exactly the base's tensors, all of one dtype out of F32, BF16, F16:\n"
        "  - tensor 'lm_head.weight': F32 (64, 32) found, not allowed here"
    )


class Refused:
    """Packing is refused and leaves nothing."""

    def __init__(self, packed_as: Any, raw: Path, tmp_path: Path, **changes: Any) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(AdmissionError) as caught:
            packed_as(raw, **changes)
        assert sorted(tmp_path.iterdir()) == before
        self.text = str(caught.value)

    def exactly(self, text: str) -> None:
        assert self.text == text


def test_missing_shard(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned(max_shard_size="20KB")
    index = json.loads((raw / "model.safetensors.index.json").read_text())["weight_map"]
    gone = sorted(set(index.values()))[1]
    (raw / gone).unlink()
    Refused(packed_as, raw, tmp_path).exactly(
        f"model.safetensors.index.json lists {len(set(index.values()))} shards, and 1 of them are not in '{raw}'; "
        f"download or copy them there:\n  - {gone}: {list(index.values()).count(gone)} tensors"
    )


def test_pickled_checkpoint(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    (raw / "model.safetensors").rename(raw / "pytorch_model.bin")
    text = Refused(packed_as, raw, tmp_path).text
    assert text.startswith(
        f"'{raw}' is not an expert folder: pytorch_model.bin is a pickle, which is never read; convert it where you "
        'trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{raw}', dtype='auto').save_pretrained('NEW_FOLDER')\". Looked for:\n"
    )


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (
            {"vocab_size": 65},
            [
                "vocab_size: the expert has 65, the base 64; the vocabularies must be one: take added tokens away "
                "again (resize_token_embeddings), or give the model the base's tokenizer with mergekit-tokensurgeon"
            ],
        ),
        (
            {"rms_norm_eps": 1e-5, "hidden_act": "gelu"},
            [
                "hidden_act: the expert has 'gelu', the base 'silu'; fine-tune the base itself; if it is the same, "
                "save both with the same version of transformers",
                "rms_norm_eps: the expert has 1e-05, the base 1e-06; fine-tune the base itself; if it is the same, "
                "save both with the same version of transformers",
            ],
        ),
        (
            {"tie_word_embeddings": False},
            [
                "tie_word_embeddings: the expert has False, the base True; save the model with the base's setting",
            ],
        ),
        (
            {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
            [
                "rope: the expert has {'rope_theta': 500000.0, 'rope_type': 'default'}, the base {'rope_theta': "
                "10000.0, 'rope_type': 'default'}; the rotary embedding must be the base's; a model that was stretched "
                "to a longer context is another one"
            ],
        ),
    ],
)
def test_settings_that_decide_the_function(
    change: dict[str, Any], problems: list[str], tuned: Make, packed_as: Any, tmp_path: Path
) -> None:
    raw = tuned()
    config = json.loads((raw / "config.json").read_text())
    (raw / "config.json").write_text(json.dumps({**config, **change}))
    lines = "\n".join(f"  - {problem}" for problem in problems)
    Refused(packed_as, raw, tmp_path).exactly(
        f"config.json in '{raw}' is not that of the base 'pico':\n{lines}"
    )


def test_another_architecture(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned("qwen3")
    Refused(packed_as, raw, tmp_path).exactly(
        f"config.json in '{raw}' is not that of the base 'pico':\n"
        "  - model_type: the expert has 'qwen3', the base 'llama'; another architecture; fine-tune the base itself"
    )


def test_other_widths(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    tensors = load_file(raw / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:40].copy()
    save_file(tensors, raw / "model.safetensors")
    assert (
        f"  - tensor '{name}': F32 (40, 32) found, F32 (48, 32) expected"
        in Refused(packed_as, raw, tmp_path).text
    )


def test_dtypes_are_not_mixed(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    tensors = load_file(raw / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("float16")
    save_file(tensors, raw / "model.safetensors")
    assert (
        "  - tensor 'model.norm.weight': F16 (32) found, F32 (32) expected"
        in Refused(packed_as, raw, tmp_path).text
    )


def test_another_tokenizer(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    (raw / "tokenizer.json").write_text("{}")
    text = Refused(packed_as, raw, tmp_path).text
    assert text.startswith(f"The tokenizer in '{raw}' (tokenizer.json, sha256:")
    assert "is not that of the base 'pico'" in text
    assert text.endswith("give the model the base's tokenizer with mergekit-tokensurgeon and train it again.")


def test_the_base_itself_is_remarked_on(tuned: Make, packed_as: Any) -> None:
    raw = tuned(seed=0, max_shard_size="20KB")
    with pytest.warns(ExpertWarning) as caught:
        packed_as(raw)
    assert [str(warning.message) for warning in caught] == [
        f"acme/whole: every tensor in '{raw}' is byte for byte the base's: this expert changes nothing. Is it the "
        "folder that training wrote?"
    ]


def test_packing_holds_no_tensor(tuned: Make, packed_as: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.kinds.checkpoint.CHUNK", 512)
    raw, sizes = tuned(), []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: sizes.append(size) or real(fd, size, start))
    packed_as(raw)
    largest = max(tensor.nbytes for tensor in load_file(raw / "model.safetensors").values())
    assert largest > 4096
    assert sorted(set(sizes[: len(sizes) // 2]))[-1] <= 512


def test_settings_spelled_by_other_versions() -> None:
    new = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
        "attention_bias": False,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
        "dtype": "bfloat16",
    }
    old = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_theta": 500000,
        "rope_scaling": {"type": "llama3", "factor": 8},
        "torch_dtype": "float32",
        "_name_or_path": "x",
    }
    assert architecture_problems(new, old) == []
    assert architecture_problems(new, {**old, "attention_bias": True})
    assert architecture_problems(new, {**old, "rope_scaling": None})
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert architecture_problems({"text_config": gemma}, {"text_config": {"rope_parameters": nested}}) == []


def test_hostile_folders(tuned: Make, packed_as: Any, tmp_path: Path) -> None:
    raw = tuned()
    (raw / "model.safetensors").unlink()
    os.mkfifo(raw / "model.safetensors")
    assert "a regular file is needed" in Refused(packed_as, raw, tmp_path).text
