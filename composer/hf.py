"""Registers composed models with the Auto classes of transformers; importing it is all there is to do.

import composer.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("out", opt_out={"acme"})
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from composer.configuration import ComposedConfig
from composer.model import ComposedForCausalLM

__all__ = ["ComposedConfig", "ComposedForCausalLM"]

AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
