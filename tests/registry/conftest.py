"""A pico anchor, adapters for it, and registries that hold them: numpy and safetensors only."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from experts.base import BaseDescription
from experts.card import BaseRef, TrainingInfo
from experts.fingerprint import tokenizer_fingerprint
from experts.package import pack
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, Statistics, StatisticsInfo
from experts.routing_origin import AnchorInfo
from registry import Registry
from registry.filesystem import FileSystem

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 8, 12, 2, 16

MakeExpert = Callable[..., Path]


def write_base(folder: Path, *, seed: int = 0) -> Path:
    """Write a two-layer Llama checkpoint with random weights."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {
            f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    folder.mkdir(parents=True)
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("A pico anchor.\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


def write_adapter(folder: Path, *, seed: int = 0, rank: int = 2) -> Path:
    """Write a PEFT adapter on the FFN of the upper layer."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }.items():
        module = f"base_model.model.model.layers.1.mlp.{name}"
        tensors[f"{module}.lora_A.weight"] = random.standard_normal((rank, columns)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = random.standard_normal((rows, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "pico",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("anchor") / "pico")


@pytest.fixture(scope="session")
def base_description(base_folder: Path) -> BaseDescription:
    return BaseDescription.from_folder(base_folder)


@pytest.fixture(scope="session")
def base_ref(base_folder: Path, base_description: BaseDescription) -> BaseRef:
    return BaseRef(
        name="pico",
        fingerprint=base_description.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(base_folder),
    )


@pytest.fixture(scope="session")
def make_expert(
    tmp_path_factory: pytest.TempPathFactory, base_description: BaseDescription, base_ref: BaseRef
) -> MakeExpert:
    """Pack an expert: make_expert("acme/contracts", version=2, seed=1, domain="law", routing=False)."""
    numbers = itertools.count()

    def make(name: str = "acme/contracts", **options: Any) -> Path:
        root = tmp_path_factory.mktemp("expert")
        adapter = write_adapter(root / f"adapter{next(numbers)}", seed=options.pop("seed", 0))
        info = write_statistics(adapter) if options.pop("routing", False) else None
        fields: dict[str, Any] = {
            "version": 1,
            "domain": "law",
            "license": "Apache-2.0",
            "base": base_description,
            "base_ref": base_ref,
            "training": TrainingInfo(method="lora_sft", tokens=10, steps=1),
            "routing": info,
        }
        pack(adapter, root / "package", name=name, **(fields | options))
        return root / "package"

    return make


def write_statistics(folder: Path, *, seed: int = 0) -> RoutingInfo:
    """Write additive statistics of 32 random states and return what describes them."""
    folder.mkdir(exist_ok=True)
    statistics = Statistics.from_states(np.random.default_rng(seed).standard_normal((32, HIDDEN)))
    info = RoutingInfo(statistics=StatisticsInfo(layer=1, normalization="none", tokens=32, documents=2))
    tensors = {
        "statistics.count": np.array([statistics.count]),
        "statistics.sum": statistics.sum,
        "statistics.scatter": statistics.scatter,
    }
    RoutingArtifacts(info=info, tensors=tensors).save(folder)
    return info


@pytest.fixture(scope="session")
def write_routing(base_ref: BaseRef) -> Callable[..., RoutingInfo]:
    """Write public artefacts, made on the base."""

    def write(folder: Path, **options: Any) -> RoutingInfo:
        return write_statistics(folder, **options).model_copy(update={"anchor": AnchorInfo.of(base_ref)})

    return write


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write another anchor: make_base(seed=9)."""
    return lambda *, seed: write_base(tmp_path_factory.mktemp("other") / "pico", seed=seed)


def ticking_clock() -> Callable[[], datetime]:
    """Noon on 2026-01-31, one minute later at each call."""
    ticks = itertools.count()
    return lambda: datetime(2026, 1, 31, 12, tzinfo=UTC) + timedelta(minutes=next(ticks))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A registry that holds the base and nothing else; copied, since creating one runs the migrations."""
    path = tmp_path_factory.mktemp("template") / "registry"
    Registry(path, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC)).add_base(base_folder, name="pico")
    return path


@pytest.fixture(scope="module")
def build_library(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fill a registry once for a module: ``build_library(fill)``; tests open copies of it."""

    def build(fill: Callable[[Registry], None]) -> Path:
        path = shutil.copytree(template, tmp_path_factory.mktemp("library") / "registry")
        fill(Registry(path, clock=ticking_clock()))
        return path

    return build


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where to make a registry: in memory where there is such a folder, since every change waits for the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder) / "registry"


@pytest.fixture
def open_copy(root: Path) -> Callable[[Path], Registry]:
    """Open a copy of a registry's folder, with a clock that starts an hour later."""

    def copy(path: Path) -> Registry:
        clock = ticking_clock()
        return Registry(shutil.copytree(path, root), clock=lambda: clock() + timedelta(hours=1))

    return copy


@pytest.fixture
def registry_folder(template: Path, root: Path) -> Path:
    return shutil.copytree(template, root)


@pytest.fixture
def registry(registry_folder: Path) -> Registry:
    """A registry that holds the base ``pico``."""
    return Registry(registry_folder, clock=ticking_clock())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and no clean-up after it has an effect."""


class FaultyFileSystem(FileSystem):
    """Fails at one call.

    Args:
        at: The number of the call that fails, from 0; None: none does.
        fault: What is raised there. After `Killed`, no call has an effect any more.

    Attributes:
        calls: The name of every call.
        done: Name, arguments and result of every call that went through.
    """

    def __init__(self, *, at: int | None = None, fault: BaseException | None = None) -> None:
        self.at = at
        self.fault = fault
        self.calls: list[str] = []
        self.done: list[tuple[str, tuple[Any, ...], Any]] = []

    def _step(self, call: str) -> None:
        number = len(self.calls)
        self.calls.append(call)
        if self.at is None or self.fault is None:
            return
        if number == self.at or (number > self.at and isinstance(self.fault, Killed)):
            raise self.fault


def _interrupted(name: str) -> Callable[..., Any]:
    real = getattr(FileSystem, name)

    def call(self: FaultyFileSystem, *arguments: Any) -> Any:
        self._step(name)
        if name == "write":  # a disk may take less than it is given
            descriptor, data = arguments
            arguments = (descriptor, data[: max(1, len(data) - 1)])
        result = real(self, *arguments)
        self.done.append((name, arguments, result))
        return result

    return call


for _name, _value in vars(FileSystem).items():
    if callable(_value) and not _name.startswith("_"):
        setattr(FaultyFileSystem, _name, _interrupted(_name))


@pytest.fixture(scope="session")
def faulty() -> type[FaultyFileSystem]:
    """The class, since test modules cannot import from a conftest."""
    return FaultyFileSystem


@pytest.fixture(scope="session")
def killed() -> type[Killed]:
    return Killed
