"""Contexts over the pico registries, and dense models made by hand to compare with."""

from __future__ import annotations

import warnings

import pytest

PAIRS = {"acme": "acme/low", "bob": "bob/full", "zoe": "zoe/low"}
"""Both kinds; layers 1 to 3, 2 and 3, and 1 and 3."""


@pytest.fixture(scope="session")
def context(pico):
    """``context("olmo2", experts={...})``; fresh unless it has neither experts nor settings."""
    from pipelines.baselines import BaselineContext

    def make(family="llama", experts=None, **settings):
        chosen = PAIRS if experts is None else experts
        made = {"registry": pico.library(family), "base": family, "experts": chosen, **settings}
        if experts is None and not settings:
            return pico.once(lambda: BaselineContext(**made), "baseline context", family)
        return BaselineContext(**made)

    return make


@pytest.fixture(scope="session")
def by_hand(pico):
    """``by_hand("llama", "acme/low")``: the dense model's state dict; PEFT merges adapters, files give full FFNs."""

    def make(family, name):
        import torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(pico.base(family))
        files = pico.library(family).files(pico.library(family).expert(name))
        if "ffn.safetensors" in files:
            missing, unexpected = model.load_state_dict(load_file(files["ffn.safetensors"]), strict=False)
            assert missing
            assert not unexpected
            return model.state_dict()
        folder = pico.scratch("adapter")
        folder.mkdir()
        for path in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / path).write_bytes(files[path].read_bytes())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()

    return lambda family, name: pico.once(lambda: make(family, name), "dense by hand", family, name)


@pytest.fixture(scope="session")
def logits_of(pico):
    """Logits of the family's class with a state dict, as transformers alone computes them."""

    def run(family, state, ids):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(pico.base(family)).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return model(ids).logits

    return run
