from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experts.base import BaseDescription, TensorSpec
from experts.errors import AdmissionError, IntegrityError
from experts.ffn_layout import find_layout
from experts.fingerprint import fingerprint_tensors, tokenizer_fingerprint

Folder = Callable[..., Path]
Base = Callable[..., BaseDescription]

LAYOUT_OF = {
    "llama": ("gated", "model.layers", ("gate", "up", "down"), False),
    "qwen3": ("gated", "model.layers", ("gate", "up", "down"), False),
    "olmo2": ("gated", "model.layers", ("gate", "up", "down"), False),
    "gemma3_text": ("gated", "model.layers", ("gate", "up", "down"), False),
    "gpt_neox": ("dense", "gpt_neox.layers", ("up", "down"), True),
    "phi3": ("fused", "model.layers", ("gate_up", "down"), False),
    "phi": ("dense", "model.layers", ("up", "down"), True),
}


@pytest.mark.parametrize("family", LAYOUT_OF)
def test_families(family: str, base: Base, make_model: Callable[..., Any]) -> None:
    description = base(family)
    style, prefix, roles, bias = LAYOUT_OF[family]
    assert (description.layout.style, description.layers_prefix) == (style, prefix)
    sizes = (
        description.num_layers,
        description.hidden_size,
        description.intermediate_size,
        description.dtype,
    )
    assert sizes == (3, 32, 48, "F32")
    assert description.config["model_type"] == family
    # transformers' own modules are the oracle
    modules = dict(make_model(family).named_modules())
    for layer in range(3):
        linears = description.ffn_linears(layer)
        assert tuple(linears) == roles
        for role, linear in linears.items():
            module = modules[linear.name]
            assert linear.role == role
            assert (linear.in_features, linear.out_features) == (module.in_features, module.out_features)
            assert linear.bias == (module.bias is not None) == bias


@pytest.mark.parametrize("family", LAYOUT_OF)
def test_layer_linears_are_the_linears(family: str, base: Base, make_model: Callable[..., Any]) -> None:
    import torch

    expected = {
        name: (module.out_features, module.in_features)
        for name, module in make_model(family).named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    assert base(family).layer_linears() == expected


@pytest.mark.parametrize("family", LAYOUT_OF)
def test_json_round_trip(family: str, base: Base) -> None:
    description = base(family)
    text = description.to_json()
    assert BaseDescription.from_json(text) == description
    assert BaseDescription.from_json(text.encode()).to_json() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprnt": "x"},
            "description of the base has 1 problem:\n  - fingerprnt: unknown key; did you mean "
            "'fingerprint'? Allowed: config, embedding, fingerprint, format_version, tensors, tokens",
        ),
        (
            {"tensors": {"a": ["F32", ["x"]]}},
            "description of the base has 1 problem:\n  - tensors.a.1.0: input should "
            "be a valid integer, given 'x'",
        ),
        (
            {"tensors": {"a": ["F3", [1]]}},
            "The description of the base lists too many tensors or an unknown dtype.",
        ),
    ],
)
def test_broken_description(base: Base, change: dict[str, object], message: str) -> None:
    record = json.loads(base().to_json()) | change
    with pytest.raises(IntegrityError) as caught:
        BaseDescription.from_json(json.dumps(record))
    assert str(caught.value) == message


def oracle(folder: Path) -> str:
    """The fingerprint by the library's loader and the standard library's writer, all in memory."""
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                array = file.get_tensor(name)
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                lines.append(
                    json.dumps([name, {"float32": "F32"}[array.dtype.name], list(array.shape), digest])
                )
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("family", LAYOUT_OF)
def test_fingerprint(family: str, base: Base, base_folder: Folder) -> None:
    assert base(family).fingerprint == oracle(base_folder(family)) == fingerprint_tensors(base_folder(family))


def test_fingerprint_of_known_bytes(tmp_path: Path) -> None:
    save_file(
        {"b": np.array([1, 2], np.int64), "a": np.zeros((1, 2), np.float32)}, tmp_path / "model.safetensors"
    )
    # made with sha256sum and printf; must never change, or published experts lose their base
    assert fingerprint_tensors(tmp_path) == "65abbb5fda6f02b634e06e6dcf4bc24c163426d5268df1f0ece2cd903c2a9ff6"


def test_any_changed_bit_changes_the_fingerprint(tmp_path: Path, base: Base, base_folder: Folder) -> None:
    shutil.copytree(base_folder(), tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint_tensors(tmp_path / "b") != base().fingerprint
    assert base(seed=1).fingerprint != base(seed=0).fingerprint


def shard(source: Path, target: Path, *, size: str = "8KB") -> Path:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size=size)
    return target


def test_sharded_equals_single(tmp_path: Path, base: Base, base_folder: Folder) -> None:
    folder = shard(base_folder("qwen3"), tmp_path / "s")
    assert len(list(folder.glob("*.safetensors"))) > 3
    description = BaseDescription.from_folder(folder)
    assert dataclasses.replace(description, config=base("qwen3").config) == base("qwen3")


def test_shards_are_checked_against_the_index(tmp_path: Path, base_folder: Folder) -> None:
    folder = shard(base_folder("qwen3"), tmp_path / "s", size="20KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    first, last = shards[0], shards[-1]
    moved = load_file(folder / last)
    name = next(iter(load_file(folder / first)))
    save_file(moved | {name: np.zeros(1, np.float32), "extra": np.zeros(1, np.float32)}, folder / last)
    index["weight_map"]["ghost"] = first
    index_path.write_text(json.dumps(index))
    with pytest.raises(AdmissionError) as caught:
        fingerprint_tensors(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The shards in '{folder}' do not match model.safetensors.index.json:"
    assert sorted(lines[1:]) == sorted(
        [
            f"  - tensor '{name}': in {first} and in {last}; keep one",
            f"  - tensor 'extra': found in {last}, listed under no file",
            f"  - tensor 'ghost': listed under {first}, not found there",
        ]
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "../x.safetensors"},
            "model.safetensors.index.json lists tensor 'a' under '../x.safetensors'; a "
            ".safetensors file in the same folder is needed.",
        ),
        (
            {"a": "x.bin"},
            "model.safetensors.index.json lists tensor 'a' under 'x.bin'; a .safetensors file in the "
            "same folder is needed.",
        ),
        ([], "model.safetensors.index.json has no weight_map of tensor names to file names."),
        (None, "model.safetensors.index.json has no weight_map of tensor names to file names."),
    ],
)
def test_hostile_index(tmp_path: Path, weight_map: object, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AdmissionError) as caught:
        fingerprint_tensors(tmp_path)
    assert str(caught.value) == message


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(AdmissionError) as caught:
        fingerprint_tensors(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' holds no safetensors: pytorch_model.bin is a pickle, which is never read; convert it where you "
        'trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{tmp_path}', dtype='auto').save_pretrained('NEW_FOLDER')\""
    )
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(
        AdmissionError, match=rf"SentenceTransformer as M; M\('{tmp_path}'\)\.save_pretrained\("
    ):
        fingerprint_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "consolidated.00.pth")
    with pytest.raises(
        AdmissionError, match=r"consolidated\.00\.pth is a pickle, .*, with the script of transformers"
    ):
        fingerprint_tensors(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(AdmissionError) as caught:
        fingerprint_tensors(tmp_path)
    assert str(caught.value) == (
        f"'{tmp_path}' holds neither model.safetensors nor model.safetensors.index.json; save the base with "
        "save_pretrained (pickled checkpoints are never read)."
    )


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(megabytes: int) -> int:
        save_file({"w": np.zeros((megabytes, 1 << 18), np.float32)}, tmp_path / "model.safetensors")
        seen: list[int] = []
        tracemalloc.start()
        fingerprint_tensors(tmp_path, progress=seen.append)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(seen) == megabytes << 20
        return top

    small, large = peak(2), peak(48)
    assert large < small + (1 << 18)
    assert large < 4 << 20


def test_base_may_be_linked(tmp_path: Path, base: Base, base_folder: Folder) -> None:
    # the download cache of the Hugging Face hub is made of symbolic links
    for path in base_folder().iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert BaseDescription.from_folder(tmp_path) == base()


def specs(*names: str, shape: tuple[int, ...] = (8, 4)) -> dict[str, TensorSpec]:
    return {
        f"{name}.weight": TensorSpec(
            dtype="F32", shape=shape[::-1] if "down" in name or "fc2" in name else shape
        )
        for name in names
    }


def gated(prefix: str, layers: int = 2, shape: tuple[int, ...] = (8, 4)) -> dict[str, TensorSpec]:
    names = (f"{prefix}.{n}.mlp.{r}_proj" for n in range(layers) for r in ("gate", "up", "down"))
    return specs(*names, shape=shape)


@pytest.mark.parametrize(
    "prefix", ["model.layers", "model.language_model.layers", "language_model.model.layers"]
)
def test_prefix_is_discovered(prefix: str) -> None:
    vision = specs(*(f"vision.layers.{n}.mlp.{r}" for n in range(5) for r in ("fc1", "fc2")), shape=(6, 3))
    config = {"model_type": "x", "text_config": {"num_hidden_layers": 2, "hidden_size": 4}}
    found = find_layout(gated(prefix) | vision, config=config)
    assert (found.layout.name, found.prefix, found.num_layers) == ("gated", prefix, 2)


def test_two_gated_towers() -> None:
    tensors = gated("visual.blocks", layers=5, shape=(6, 3)) | gated("model.layers")
    config: dict[str, object] = {"num_hidden_layers": 2, "hidden_size": 4}
    assert find_layout(tensors, config=config).prefix == "model.layers"
    with pytest.raises(AdmissionError) as caught:
        find_layout(tensors, config={})
    assert str(caught.value) == (
        "The base has several stacks of feed-forward layers that fit its config: model.layers (gated), "
        "visual.blocks (gated)."
    )


def test_unknown_layout() -> None:
    tensors = specs("model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.gate") | gated(
        "other.layers", layers=3
    )
    with pytest.raises(AdmissionError) as caught:
        find_layout(tensors, config={"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 4})
    assert str(caught.value) == (
        "No feed-forward layers of a known layout in the base (model_type 'mixtral', 11 tensors). Looked for, in "
        "every layer N of one prefix:\n"
        "  - gated: <prefix>.N.mlp.gate_proj.weight, <prefix>.N.mlp.up_proj.weight, <prefix>.N.mlp.down_proj.weight\n"
        "  - fused: <prefix>.N.mlp.gate_up_proj.weight, <prefix>.N.mlp.down_proj.weight\n"
        "  - dense_4h: <prefix>.N.mlp.dense_h_to_4h.weight, <prefix>.N.mlp.dense_4h_to_h.weight\n"
        "  - dense_fc: <prefix>.N.mlp.fc1.weight, <prefix>.N.mlp.fc2.weight\n"
        "  - encoder: <prefix>.N.intermediate.dense.weight, <prefix>.N.output.dense.weight\n"
        "  - not taken: other.layers (gated): 3 layers, the config says 1"
    )


def test_a_layer_with_a_missing_linear_is_not_a_layout() -> None:
    tensors = gated("model.layers")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(AdmissionError, match="No feed-forward layers of a known layout"):
        find_layout(tensors, config={})


def test_unknown_layout_is_told_before_hashing(tmp_path: Path) -> None:
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    seen: list[int] = []
    with pytest.raises(AdmissionError, match="known layout in the base \\(model_type 'mamba', 1 tensors\\)"):
        BaseDescription.from_folder(tmp_path, progress=seen.append)
    assert seen == []


def test_tokenizer_fingerprint(tmp_path: Path) -> None:
    empty = hashlib.sha256(b"[]").hexdigest()
    assert tokenizer_fingerprint(tmp_path) == empty
    (tmp_path / "vocab.json").write_text("{}")
    slow = tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    fast = tokenizer_fingerprint(tmp_path)
    entry = ["tokenizer.json", hashlib.sha256(b"{}").hexdigest()]
    assert fast == hashlib.sha256(json.dumps([entry]).encode()).hexdigest()
    assert len({empty, slow, fast}) == 3
    # options that change no ids do not count
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{ }")
    assert tokenizer_fingerprint(tmp_path) == fast
