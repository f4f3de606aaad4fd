"""Loads whole query encoders of owners beside the base, each a module of its own.

Nothing of them is ever written into the base, so documents and other owners' queries cannot change. Knows files and
tensors; knows nothing of routing.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from experts.base import BaseDescription
from experts.errors import BuildError
from experts.files import capped
from experts.kinds.kind import DTYPES
from experts.kinds.retriever_full import FullEncoderKind

if TYPE_CHECKING:
    from composer.members import Member

__all__ = ["is_whole", "load_whole"]


def is_whole(member: Member) -> bool:
    """Say whether an expert is a whole query encoder, not an adapter; no file is opened."""
    return FullEncoderKind.weights_file in {entry.path for entry in member.locked.files}


def load_whole(member: Member, base: nn.Module, description: BaseDescription) -> nn.Module:
    """Load one, as `transformers` loads the base: in its class, with its configuration, dtype and attention.

    The expert's own configuration and tokenizer were found to be the base's when it was admitted; neither is opened.

    Args:
        member: The expert.
        base: The base encoder; adapters may be on it.
        description: What is known of its tensors.

    Raises:
        BuildError: The file does not hold exactly the base's tensors.
    """
    expected = {name: spec.shape for name, spec in description.tensors.items() if spec.dtype in DTYPES}
    with member.tensors(FullEncoderKind.weights_file) as tensors:
        state = {name: tensors[name] for name in tensors}
    odd = sorted(set(state) ^ set(expected))
    odd += sorted(name for name in state if name in expected and tuple(state[name].shape) != expected[name])
    if odd:
        raise BuildError(
            f"{FullEncoderKind.weights_file} of {member.locked.name} does not hold exactly the base's tensors. Build "
            "the folder again:",
            problems=capped(odd),
        )
    cls: Any = type(base)
    config: Any = copy.deepcopy(base.config)
    model: nn.Module = cls.from_pretrained(None, config=config, state_dict=state, dtype=base.dtype)
    return model.eval()
