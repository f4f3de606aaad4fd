"""The other form of kind ``retriever``: a whole query encoder, fine-tuned from the embedding base, with its tokenizer.

It makes vectors as the base does (pooling, normalisation, longest input, tokens), so that they can be compared with
documents that the base has encoded. Streams bytes; knows nothing of torch or of how a query finds its expert.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.embedding import EMBEDDING_FILES, embedding_differences, read_embedding
from experts.errors import AdmissionError
from experts.files import capped, install_file, read_bounded, sha256_file, write_atomic
from experts.fingerprint import WEIGHTS
from experts.kinds.checkpoint import Checkpoint, has_checkpoint, weight_files
from experts.kinds.kind import DTYPES, MAX_CONFIG_BYTES, ExpertKind, ResolvedConfig
from experts.pickles import conversion
from experts.same_architecture import DECIDES_NOTHING, architecture_problems
from experts.strict import load_json
from experts.tokens import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    clean_settings,
    settings_problems,
    tokens_digest,
)

__all__ = ["FullEncoderKind"]

_KEPT = frozenset(
    {"bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"}
)
_IN_TRAINING_ONLY = frozenset(
    {"attention_probs_dropout_prob", "gradient_checkpointing", "hidden_dropout_prob"}
)
"""Keys of encoders that say how they are trained."""
_NEEDLESS = (DECIDES_NOTHING - _KEPT) | _IN_TRAINING_ONLY
_UNSAID = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True, False),  # there is no second embedding to be tied
}
"""What older or newer versions of transformers leave out, with the values that say nothing about an encoder."""
_CODE = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
_CLASS = re.compile(r"[A-Za-z0-9_]{1,80}")


@final
class FullEncoderKind(ExpertKind):
    """Whole query encoders."""

    name = "retriever"
    config_file = "config.json"
    weights_file = WEIGHTS
    more_files = (TOKENIZER_FILE, TOKENIZER_CONFIG)
    embeds = True
    links_allowed = True  # a download is a folder of links, and packing copies what they point to
    left_behind = frozenset(
        {
            *(name for name in EMBEDDING_FILES if "/" not in name),
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "sentencepiece.bpe.model",
            "trainer_state.json",
            "training_args.bin",
            "vocab.txt",
        }
    )
    folders_left_behind = frozenset(name.partition("/")[0] for name in EMBEDDING_FILES if "/" in name)

    def detect(self, folder: Path) -> bool:
        """Say whether there is a checkpoint in one file or in shards, whatever is in it."""
        return has_checkpoint(folder)

    def raw_files(self, folder: Path) -> tuple[str, ...]:
        """Return the configuration, the tokenizer's files, the shards and their index."""
        return (self.config_file, *self.more_files, *weight_files(folder))

    def hint(self, folder: Path) -> str | None:
        """Say how to turn a pickled checkpoint into safetensors."""
        return conversion(folder) if (folder / "modules.json").exists() else None

    def resolve(self, config: Mapping[str, object], base: BaseDescription) -> ResolvedConfig:
        """Take every floating tensor of the base, if the settings that decide the function are the base's.

        Raises:
            AdmissionError: Lists every key that is not allowed, and every setting that differs.
        """
        problems = _key_problems(config) or architecture_problems(_decisive(config), _decisive(base.config))
        shapes = {name: spec.shape for name, spec in base.tensors.items() if spec.dtype in DTYPES}
        dtypes = {base.tensors[name].dtype for name in shapes}
        if len(dtypes) > 1:
            problems.append(
                f"dtype: the base's tensors have several, {', '.join(sorted(dtypes))}; publish an adapter instead"
            )
        if problems:
            raise AdmissionError("config.json is not the base encoder's:", problems=capped(problems))
        return ResolvedConfig(
            shapes=shapes,
            layers=tuple(range(base.num_layers)),
            rank=None,
            ffn_only=False,
            dtype=base.dtype,
            base_name=None,
        )

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """Leave out what decides nothing, which may name places on the owner's machine."""
        return {key: value for key, value in config.items() if key not in _NEEDLESS}

    def check_raw(self, folder: Path, base: BaseDescription, base_ref: BaseRef) -> None:
        """Refuse an encoder that pools, normalises, compares or cuts off otherwise than the base.

        A folder without ``modules.json`` says nothing of that, and is taken to do as the base does.
        """
        if base.embedding is None or not (folder / "modules.json").exists():
            return
        config = self.read_config(folder / self.config_file)
        found = read_embedding(folder, config=config, hidden_size=base.hidden_size)
        problems = embedding_differences(base.embedding, found, of=("the base", f"'{folder.name}'"))
        if problems:
            raise AdmissionError(
                f"The query encoder in '{folder}' makes other vectors than the base '{base_ref.name}', which encodes "
                "the documents:",
                problems=problems,
            )

    def install_weights(self, folder: Path, target: Path, base: BaseDescription) -> list[str]:
        """Write the one weights file in the base's order of tensors; remark on an encoder that is the base itself.

        Raises:
            AdmissionError: A tensor is missing, not allowed, or of another shape or dtype than the base's.
        """
        found = Checkpoint.read(folder)
        shapes = {name: spec.shape for name, spec in base.tensors.items() if spec.dtype in DTYPES}
        found.check(shapes, base, folder, dtype=base.dtype)
        install_file(target, found.stream([name for name in base.tensors if name in shapes]))
        if found.fingerprint() != base.fingerprint:
            return []
        return [
            f"every tensor in '{folder}' is byte for byte the base's: this expert changes nothing. Is it the folder "
            "that training wrote?"
        ]

    def install_more(self, folder: Path, target: Path) -> None:
        """Copy the tokenizer, and its settings without the places that they name."""
        data = read_bounded(folder / TOKENIZER_FILE, max_bytes=1 << 26, follow_symlinks=True)
        install_file(target / TOKENIZER_FILE, iter([data]))
        settings = clean_settings(_settings(folder / TOKENIZER_CONFIG, follow_symlinks=True))
        write_atomic(target / TOKENIZER_CONFIG, (json.dumps(settings, indent=2) + "\n").encode())

    def check_more(self, files: Mapping[str, Path], base: BaseDescription, base_ref: BaseRef) -> None:
        """Check that the tokenizer makes the base's tokens: one tokenization serves every expert of a composition."""
        needless = _NEEDLESS & self.read_config(files[self.config_file]).keys()
        if needless:
            raise AdmissionError(
                f"{self.config_file} holds keys that decide nothing; pack the expert again:",
                problems=sorted(needless),
            )
        _check_tokens(files[TOKENIZER_FILE], base, base_ref)
        assert base.embedding is not None, "checked before"
        problems = settings_problems(
            _settings(files[TOKENIZER_CONFIG]), longest=base.embedding.max_seq_length
        )
        if problems:
            raise AdmissionError(f"{TOKENIZER_CONFIG} is not allowed:", problems=capped(problems))


def _settings(path: Path, *, follow_symlinks: bool = False) -> dict[str, object]:
    data = read_bounded(path, max_bytes=MAX_CONFIG_BYTES, follow_symlinks=follow_symlinks)
    found = load_json(data, what=TOKENIZER_CONFIG, max_bytes=MAX_CONFIG_BYTES, error=AdmissionError)
    if not isinstance(found, dict):
        raise AdmissionError(f"{TOKENIZER_CONFIG} is not a JSON object.")
    return found


def _check_tokens(path: Path, base: BaseDescription, base_ref: BaseRef) -> None:
    found = tokens_digest(path)
    if base.tokens is None:  # described before this digest was kept, or without tokenizer.json
        listed = json.dumps([[TOKENIZER_FILE, sha256_file(path)]]).encode()
        same = hashlib.sha256(listed).hexdigest() == base_ref.tokenizer_fingerprint
    else:
        same = found == base.tokens
    if not same:
        raise AdmissionError(
            f"{TOKENIZER_FILE} makes other tokens than that of the base '{base_ref.name}' (digest {found}, the base's "
            f"{base.tokens or 'unknown: the very file is needed'}). One tokenization serves all experts of a "
            "composition: train the query encoder with the base's tokenizer."
        )


def _key_problems(config: Mapping[str, object]) -> list[str]:
    """Say which keys have no place in a packed configuration, whatever the base's says."""
    problems = [f"{key}: names code, which is never run; remove it" for key in sorted(_CODE & config.keys())]
    classes = config.get("architectures", [])
    if not isinstance(classes, list) or not all(isinstance(c, str) and _CLASS.fullmatch(c) for c in classes):
        problems.append(f"architectures: {classes!r:.80} found; a list of class names is needed")
    return problems


def _decisive(config: Mapping[str, object]) -> dict[str, object]:
    """Leave out what an encoder without a head does not read, and defaults that only some versions write."""
    return {
        key: value
        for key, value in config.items()
        if key != "architectures" and key not in _IN_TRAINING_ONLY and value not in _UNSAID.get(key, ())
    }
