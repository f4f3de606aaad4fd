"""Registries whose experts a stock class can hold, compositions of them, and the stock classes themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ALL = (0, 1, 2, 3)
SOME = (1, 2)
EXPERTS: dict[str, tuple[int, str, tuple[int, ...], float]] = {
    "acme/full": (1, "ffn", ALL, 0.0),
    "bob/full": (2, "ffn", ALL, 0.0),
    "zoe/full": (3, "ffn", ALL, 0.0),
    "acme/low": (1, "lora", ALL, 0.0),
    "acme/some": (1, "ffn", SOME, 0.0),
    "bob/some": (2, "ffn", SOME, 0.0),
    "acme/biased": (1, "ffn", ALL, -1.0),
}
"""Name -> seed, kind, layers and router bias."""
FULL = ("acme/full", "bob/full", "zoe/full")
STOCK = {
    "olmo2": "flex_olmo",
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen3": "qwen3_moe",
    "one_head": "olmoe",
}
"""Base family, or a base of the pico sizes that is made here, -> its target."""


class Stock:
    """Makes registries, compositions and exports; keeps them for the session."""

    full = FULL
    targets = STOCK

    def __init__(self, pico: Any) -> None:
        self.pico = pico

    def library(self, family: str) -> Any:
        """A registry with the base, public rows for every layer, and the experts of `EXPERTS`."""
        return self.pico.once(lambda: self._fill(family), "export-library", family)

    def _fill(self, family: str) -> Any:
        from registry import Registry

        pico = self.pico
        made_here = {"mistral": self._mistral, "one_head": self._one_head}
        if family in made_here:
            pico.once(made_here[family], "base", family, 0)
        empty = pico.once(pico._empty_registry, "empty")
        registry = Registry(shutil.copytree(empty, pico.scratch("registry")))
        if family != "llama":
            registry.add_base(pico.base(family), name=family)
        public = self.rows(family, seed=0, layers=ALL, bias=None)
        folder = pico.scratch("public")
        folder.mkdir()
        public.save(folder)
        registry.set_base_routing(family, folder, public.info)
        for name, (seed, kind, layers, bias) in EXPERTS.items():
            if family in made_here and kind == "lora":
                continue
            raw = pico.scratch("raw")
            if kind == "ffn":
                pico.write_ffn(raw, family=family, seed=seed, layers=layers)
            else:
                pico.write_lora(raw, family=family, seed=seed, r=2, layers_to_transform=list(layers))
            rows = self.rows(family, seed=seed, layers=layers, bias=bias)
            registry.register(pico.pack(raw, name=name, family=family, artifacts=rows))
        return registry

    def _mistral(self) -> Path:
        """A Mistral of the Llama's sizes: a window shorter than a prompt, tied embeddings, scaled positions."""
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        return self._base("mistral", sliding_window=8, tie_word_embeddings=True, rope_parameters=rope)

    def _one_head(self) -> Path:
        """A Qwen3 whose only head is as wide as the states, so that its norms are those of OLMoE."""
        return self._base("qwen3", num_attention_heads=1, num_key_value_heads=1, head_dim=self.pico.width)

    def _base(self, model_type: str, **settings: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        like = json.loads((self.pico.base("llama") / "config.json").read_text())
        shared = {name: like[name] for name in like if name.endswith(("size", "heads", "layers", "token_id"))}
        torch.manual_seed(0)
        folder = self.pico.scratch(model_type)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shared | settings))
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        model.save_pretrained(folder)
        return folder

    def rows(self, family: str, *, seed: int, layers: tuple[int, ...], bias: float | None) -> Any:
        """Router rows of a domain, with one bias or none."""
        beside = self.pico.public_digest(family, layers=ALL)
        artifacts = self.pico.artifacts(family=family, seed=seed, layers=layers, public_digest=beside)
        tensors = {name: tensor for name, tensor in artifacts.tensors.items() if not name.endswith(".bias")}
        if bias is not None:
            tensors |= {f"row.{layer}.bias": np.array([bias], dtype="f4") for layer in layers}
        info = artifacts.info
        written = info.rows.model_copy(update={"has_bias": bias is not None})
        return dataclasses.replace(artifacts, info=info.model_copy(update={"rows": written}), tensors=tensors)

    def composed(self, family: str, experts: tuple[str, ...] = FULL, **settings: Any) -> Path:
        """A composed folder; ``settings`` go to the router, but ``dtype``."""
        router = {"scorer": "learned", "context": "token", **settings}
        manifest = self.pico.manifest(family=family, experts=experts, **router)
        registry = self.library(family)
        return self.pico.once(
            lambda: self.pico.compose(manifest, registry=registry), "export-composed", manifest.digest
        )

    def export(self, folder: Path, to: str, *, shard_bytes: int = 1 << 30, **options: Any) -> Path:
        """Export into a new folder."""
        from composer.export.exporting import export, plan_export

        return export(plan_export(folder, to, **options), self.pico.scratch("stock"), shard_bytes=shard_bytes)

    def logits(self, folder: Path, ids: Any, **options: Any) -> Any:
        """What the composition answers."""
        import torch

        from composer.loading import load

        with torch.no_grad():
            return load(folder, **options)(ids).logits

    def stock_logits(self, folder: Path, ids: Any) -> Any:
        """What the stock class answers; every key of the checkpoint must fit."""
        import torch
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        assert not any(info.values()), info
        assert not type(model).__module__.startswith("composer")
        with torch.no_grad():
            return model.eval()(ids).logits


@pytest.fixture(scope="session")
def stock(pico: Any) -> Stock:
    """Registries, compositions and exports for stock classes."""
    return Stock(pico)


@pytest.fixture(scope="session")
def message() -> Callable[..., str]:
    """Return the message of the error that a call raises."""

    def of(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
        from experts.errors import CoterieError

        with pytest.raises(CoterieError) as caught:
            call(*args, **kwargs)
        return str(caught.value)

    return of
