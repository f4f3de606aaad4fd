"""Kind ``dense``: a whole fine-tuned language model of the base's architecture, as a Hugging Face folder.

Shards are laid one after the other into one file while packing, so that a packed expert is again a folder that
transformers loads. Streams bytes; knows nothing of how the model was trained or is composed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.files import capped, install_file
from experts.fingerprint import WEIGHTS, tokenizer_files, tokenizer_fingerprint
from experts.kinds.checkpoint import Checkpoint, has_checkpoint, weight_files
from experts.kinds.kind import DTYPES, ExpertKind, ResolvedConfig
from experts.pickles import conversion
from experts.same_architecture import DECIDES_NOTHING, architecture_problems

__all__ = ["DenseKind"]

_KEPT = frozenset(
    {"bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"}
)


@final
class DenseKind(ExpertKind):
    """Whole fine-tuned models."""

    name = "dense"
    config_file = "config.json"
    weights_file = WEIGHTS
    links_allowed = True  # a download is a folder of links, and packing copies what they point to
    left_behind = frozenset(
        {
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "all_results.json",
            "eval_results.json",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "train_results.json",
            "trainer_state.json",
            "training_args.bin",
        }
    )

    def detect(self, folder: Path) -> bool:
        """Say whether there is a checkpoint in one file or in shards, whatever is in it."""
        return has_checkpoint(folder)

    def raw_files(self, folder: Path) -> tuple[str, ...]:
        """Return the configuration, the shards and their index."""
        return (self.config_file, *weight_files(folder))

    def hint(self, folder: Path) -> str | None:
        """Say how to turn a pickled checkpoint into safetensors."""
        return conversion(folder)

    def resolve(self, config: Mapping[str, object], base: BaseDescription) -> ResolvedConfig:
        """Take every floating tensor of the base, if the settings that decide the function are the base's."""
        problems = architecture_problems(config, base.config)
        if problems:
            raise AdmissionError("config.json is not the base's:", problems=capped(problems))
        return ResolvedConfig(
            shapes={name: spec.shape for name, spec in base.tensors.items() if spec.dtype in DTYPES},
            layers=tuple(range(base.num_layers)),
            rank=None,
            ffn_only=False,
            dtype=None,
            base_name=None,
        )

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """Leave out what decides nothing, which may name places on the owner's machine."""
        return {key: value for key, value in config.items() if key in _KEPT or key not in DECIDES_NOTHING}

    def check_raw(self, folder: Path, base: BaseDescription, base_ref: BaseRef) -> None:
        """Refuse another architecture or tokenizer than the base's; a folder without one is taken to use the base's."""
        problems = architecture_problems(self.read_config(folder / self.config_file), base.config)
        if problems:
            raise AdmissionError(
                f"config.json in '{folder}' is not that of the base '{base_ref.name}':",
                problems=capped(problems),
            )
        if not tokenizer_files(folder):
            return
        found = tokenizer_fingerprint(folder)
        if found != base_ref.tokenizer_fingerprint:
            names = ", ".join(path.name for path in tokenizer_files(folder))
            raise AdmissionError(
                f"The tokenizer in '{folder}' ({names}, sha256:{found}) is not that of the base '{base_ref.name}' "
                f"(sha256:{base_ref.tokenizer_fingerprint}). If only settings were saved differently (padding, "
                "truncation, template), put the base's own file there; if the tokens differ, give the model the "
                "base's tokenizer with mergekit-tokensurgeon and train it again."
            )

    def install_weights(self, folder: Path, target: Path, base: BaseDescription) -> list[str]:
        """Write the one weights file in the base's order of tensors; remark on a model that is the base itself.

        Raises:
            AdmissionError: A tensor is missing, not allowed, or of another shape or dtype than the others.
        """
        found = Checkpoint.read(folder)
        config = self.read_config(folder / self.config_file)
        shapes = self.resolve(config, base).shapes
        found.check(shapes, base, folder)
        install_file(target, found.stream([name for name in base.tensors if name in shapes]))
        if found.fingerprint() != base.fingerprint:
            return []
        return [
            f"every tensor in '{folder}' is byte for byte the base's: this expert changes nothing. Is it the folder "
            "that training wrote?"
        ]
