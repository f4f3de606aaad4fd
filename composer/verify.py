"""Proves an opt-out: composes the model an owner never joined and compares it through all three doors.

Build: a folder composed without the owner. Load: this folder with the owner's files left unopened. Request: the
whole model told to leave the owner out for half of the rows of a batch. Each is compared on random and on given
prompts, in one pass and token by token through the cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.lock import Lock
from experts.errors import OptOutError
from experts.names import unknown_name

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM

__all__ = ["TOLERANCE", "Verification", "never_joined", "verify_optout"]

Door = Literal["build", "load", "request"]
TOLERANCE = 1e-5
"""Largest absolute logit difference allowed at the request door, in float32."""

RANDOM_PROMPTS = 4
PROMPT_LENGTH = 24
DECODED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One owner through one door.

    Attributes:
        owner: Who is left out.
        door: ``build``, ``load`` or ``request``.
        max_abs_diff: Largest absolute logit difference over all prompts, cached and uncached.
        bit_identical: Whether every logit is equal.
        passed: ``build`` and ``load`` must be bit-identical, ``request`` within `TOLERANCE`.
        prompts: How many prompts were compared.
    """

    owner: str
    door: Door
    max_abs_diff: float
    bit_identical: bool
    passed: bool
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def verify_optout(
    folder: Path | str,
    *,
    owner: str | None = None,
    prompts: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
) -> list[Verification]:
    """Compare opting out with never having been composed, in float32.

    Args:
        folder: A composed folder.
        owner: Whom to leave out; None: each owner in turn.
        prompts: Real text beside the random token sequences.
        progress: Told what is being compared.
        seed: Of the random prompts.

    Returns:
        Three rows per owner, one per door.

    Raises:
        UnknownNameError: ``owner`` has no expert in the composition.
        OptOutError: The composition does not promise exact opt-out.
    """
    folder = Path(folder)
    lock = Lock.read(folder)
    if owner is not None and owner not in lock.owners:
        raise unknown_name("owner", owner, lock.owners)
    if lock.untuned.optout_class != "exact":
        raise OptOutError(
            f"{folder} is of opt-out class '{lock.optout_class}': no door promises the never-joined model."
        )
    batch = _Prompts(folder, prompts, seed=seed)
    rows: list[Verification] = []
    whole = _load(folder)
    for one in [owner] if owner is not None else lock.owners:
        with never_joined(folder, {one}) as without:
            rows += _verify_owner(folder, without, one, whole, batch, progress or (lambda _: None))
    return rows


@contextmanager
def never_joined(folder: Path, owners: Collection[str]) -> Iterator[Path]:
    """Compose, from the same published files, the folder that these owners never joined.

    The manifest is planned and built anew from the files in ``folder``; nothing of the owners is in the result.
    """
    from composer.recompose import recompose

    with _scratch(folder) as scratch:
        yield recompose(folder, scratch / "composed", without=owners)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a temporary folder, beside the composed one where that is possible, so that files can be linked."""
    parent = folder.absolute().parent
    beside = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".verify-optout-") as scratch:
        yield Path(scratch)


def _load(folder: Path, **kwargs: Any) -> ComposedForCausalLM:
    import torch

    from composer.loading import load

    return load(folder, dtype=torch.float32, **kwargs)


class _Prompts:
    """Token sequences to compare on: ``(n, length)`` each, without padding."""

    def __init__(self, folder: Path, prompts: Sequence[str], *, seed: int) -> None:
        self.folder = folder
        self.texts = prompts
        self.seed = seed

    def __call__(self, vocab_size: int) -> list[torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        shape = (RANDOM_PROMPTS, PROMPT_LENGTH)
        batches = [torch.randint(0, vocab_size, shape, generator=generator)]
        if self.texts:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            for text in self.texts:
                ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
                if ids.shape[1] > DECODED:
                    batches.append(ids)
        return batches


def _verify_owner(
    folder: Path,
    without: Path,
    owner: str,
    whole: ComposedForCausalLM,
    prompts: _Prompts,
    progress: Callable[[str], None],
) -> list[Verification]:
    never = _load(without)
    batches = prompts(whole.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    expected = [_logits(never, ids) for ids in batches]
    rows = []
    for door in ("build", "load"):
        progress(f"{owner}: {door}")
        model = _build_without(folder, owner) if door == "build" else _load(folder, opt_out={owner})
        rows.append(_compare(owner, door, [_logits(model, ids) for ids in batches], expected))
    progress(f"{owner}: request")
    # beside rows that leave nobody out; those would need other weights where these were tuned
    other: set[str] = set() if whole.untuned is None else {owner}
    asked = [_first_half(whole, ids, [{owner}] * len(ids) + [other] * len(ids)) for ids in batches]
    # in the same batch: the last bits of a float32 product depend on its number of rows, experts or not
    beside = [_first_half(never, ids, None) for ids in batches]
    rows.append(_compare(owner, "request", asked, beside))
    return rows


def _build_without(folder: Path, owner: str) -> ComposedForCausalLM:
    """Build with the owner in the manifest's ``opt_out``, which is another road than never listing them."""
    from composer.recompose import recompose

    with _scratch(folder) as scratch:
        return _load(recompose(folder, scratch / "composed", opt_out={owner}))


def _logits(model: ComposedForCausalLM, ids: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    """Return the logits of one pass and of a pass whose last tokens go through the cache."""
    import torch

    with torch.inference_mode():
        full = model(ids, use_cache=False, **kwargs).logits
        split = ids.shape[1] - DECODED
        out = model(ids[:, :split], use_cache=True, **kwargs)
        steps = [out.logits[:, -1:]]
        for position in range(split, ids.shape[1]):
            out = model(
                ids[:, position : position + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
                **kwargs,
            )
            steps.append(out.logits)
    return [full, torch.cat(steps, dim=1)]


def _first_half(
    model: ComposedForCausalLM, ids: torch.Tensor, opt_out: list[set[str]] | None
) -> list[torch.Tensor]:
    """Run the prompts beside copies of themselves, and return the logits of the first half of the batch."""
    import torch

    doubled = torch.cat([ids, ids])
    return [logits[: len(ids)] for logits in _logits(model, doubled, opt_out=opt_out)]


def _compare(
    owner: str, door: Door, got: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]
) -> Verification:
    import torch

    pairs = [(a, b) for g, e in zip(got, expected, strict=True) for a, b in zip(g, e, strict=True)]
    identical = all(torch.equal(a, b) for a, b in pairs)
    # a NaN is a difference too: max() alone would drop it
    largest = max(float((a - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in pairs)
    return Verification(
        owner=owner,
        door=door,
        max_abs_diff=largest,
        bit_identical=identical,
        passed=identical if door != "request" else largest <= TOLERANCE,
        prompts=sum(len(e[0]) for e in expected),
    )
