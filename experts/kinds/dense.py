"""Kind ``dense``: a whole fine-tuned language model of the base's architecture, as a Hugging Face folder.

Shards are laid one after the other into one file while packing, so that a packed expert is again a folder that
transformers loads. Streams bytes; knows nothing of how the model was trained or is composed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.files import CHUNK, capped, install_file, open_regular
from experts.fingerprint import checkpoint_files, tokenizer_files, tokenizer_fingerprint
from experts.kinds.kind import DTYPES, ExpertKind, ResolvedConfig
from experts.safetensors_header import StoredTensor, TensorSpec
from experts.same_architecture import DECIDES_NOTHING, architecture_problems
from experts.schema import compare_schema

__all__ = ["DenseKind"]

INDEX = "model.safetensors.index.json"
_KEPT = frozenset(
    {"bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version"}
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")


@final
class DenseKind(ExpertKind):
    """Whole fine-tuned models."""

    name = "dense"
    config_file = "config.json"
    weights_file = "model.safetensors"
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
        return (folder / self.config_file).exists() and any(
            (folder / name).exists() for name in (self.weights_file, INDEX)
        )

    def raw_files(self, folder: Path) -> tuple[str, ...]:
        """Return the configuration, the shards and their index."""
        shards = sorted(path.name for path in checkpoint_files(folder))
        index = [INDEX] if (folder / INDEX).exists() else []
        return (self.config_file, *index, *shards)

    def hint(self, folder: Path) -> str | None:
        """Say how to turn a pickled checkpoint into safetensors."""
        found = next((name for name in _PICKLES if (folder / name).exists()), None)
        if found is None:
            return None
        return (
            f'{found} is a pickle, which is never read; convert it where you trust it: python -c "from transformers '
            "import AutoModelForCausalLM as M; M.from_pretrained('FOLDER', dtype='auto')"
            ".save_pretrained('NEW_FOLDER')\""
        )

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
        """Refuse another tokenizer than the base's; a folder without one is taken to use the base's."""
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
        found = _Checkpoint.read(folder)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    path: Path
    tensor: StoredTensor


class _Checkpoint:
    """Where the tensors of a checkpoint lie, and their digests once they were read."""

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self.places = places
        self._lines: list[bytes] = []

    @classmethod
    def read(cls, folder: Path) -> _Checkpoint:
        return cls(
            {
                name: _Place(path=path, tensor=tensor)
                for path, tensors in checkpoint_files(folder).items()
                for name, tensor in tensors.items()
            }
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: BaseDescription, folder: Path) -> None:
        counts = Counter(place.tensor.dtype for place in self.places.values() if place.tensor.dtype in DTYPES)
        dtype = counts.most_common(1)[0][0] if counts else DTYPES[0]
        expected = {name: TensorSpec(dtype=dtype, shape=shape) for name, shape in shapes.items()}
        found: dict[str, TensorSpec] = {
            name: place.tensor
            for name, place in self.places.items()
            if name in shapes or not self._needless(name, base)
        }
        problems = compare_schema(found, expected)
        if problems:
            raise AdmissionError(
                f"The checkpoint in '{folder}' does not hold exactly the base's tensors, all of one dtype out of "
                f"{', '.join(DTYPES)}:",
                problems=capped(problems),
            )

    def _needless(self, name: str, base: BaseDescription) -> bool:
        """Say whether a tensor says nothing: a buffer that is computed, or the copy of a tied embedding."""
        if name.endswith(".rotary_emb.inv_freq") or name in base.tensors:
            return True
        if name != "lm_head.weight" or not base.config.get("tie_word_embeddings"):
            return False
        twin = next((n for n in self.places if n.endswith("embed_tokens.weight")), None)
        return twin is not None and self._digest(name) == self._digest(twin)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in _pieces(self.places[name]):
            digest.update(piece)
        return digest.hexdigest()

    def stream(self, names: list[str]) -> Iterator[bytes]:
        """Yield the bytes of one safetensors file with these tensors, noting their digests on the way."""
        self._lines.clear()
        yield _header([(name, self.places[name].tensor) for name in names])
        for name in names:
            tensor, digest = self.places[name].tensor, hashlib.sha256()
            for piece in _pieces(self.places[name]):
                digest.update(piece)
                yield piece
            line = json.dumps([name, tensor.dtype, list(tensor.shape), digest.hexdigest()])
            self._lines.append(line.encode() + b"\n")

    def fingerprint(self) -> str:
        """Return what `experts.fingerprint.fingerprint_tensors` says of the tensors that were streamed."""
        return hashlib.sha256(b"".join(sorted(self._lines))).hexdigest()


def _header(tensors: list[tuple[str, StoredTensor]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    return len(text).to_bytes(8, "little") + text


def _pieces(place: _Place) -> Iterator[bytes]:
    with open_regular(place.path, follow_symlinks=True) as stream:
        yield from _read(stream, place.tensor)


def _read(stream: BinaryIO, tensor: StoredTensor) -> Iterator[bytes]:
    for start in range(tensor.start, tensor.end, CHUNK):
        size = min(CHUNK, tensor.end - start)
        piece = os.pread(stream.fileno(), size, start)
        if len(piece) != size:
            raise AdmissionError("The file became shorter while it was read; try again.")
        yield piece
