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

from composer.lock import TUNED_FOLDER, Lock, LockedTuning
from composer.recipes import RECIPES
from experts.errors import OptOutError
from experts.names import unknown_name

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM
    from composer.probes import Probe
    from composer.recipes.base import Recipe

__all__ = ["TOLERANCE", "Verification", "never_joined", "verify_optout"]

Door = Literal["build", "load", "request"]
TOLERANCE = 1e-5
"""Largest absolute difference of an output allowed at the request door, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One owner through one door.

    Attributes:
        owner: Who is left out.
        door: ``build``, ``load`` or ``request``.
        max_abs_diff: Largest absolute difference of a logit or of an embedding's coordinate over all prompts.
        bit_identical: Whether every number is equal.
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
        owner: Whom to leave out; None: everybody in turn, whose expert or whose text alone is in the folder.
        prompts: Real text beside the random token sequences.
        progress: Told what is being compared.
        seed: Of the random prompts.

    Returns:
        Three rows per owner, one per door. Where the composition's class is ``recompose``, requests cannot leave
        anybody out, and there are two. Owners whose text alone went into tuned weights have no part in building, so
        that door is not theirs; never having joined is the composition from before it was tuned.

    Raises:
        UnknownNameError: Nothing of ``owner`` is in the composition.
        OptOutError: The composition's class is ``retrain``.
    """
    folder = Path(folder)
    lock = Lock.read(folder)
    if owner is not None and owner not in lock.involved:
        raise unknown_name("owner", owner, lock.involved)
    promised = lock.untuned.optout_class
    if promised == "retrain":
        raise OptOutError(
            f"{folder} is of opt-out class '{lock.optout_class}': no door promises the never-joined model."
        )
    doors: tuple[Door, ...] = ("build", "load", "request") if promised == "exact" else ("build", "load")
    recipe: Recipe = RECIPES.load(lock.recipe)()
    probe = recipe.probe(folder, prompts, seed=seed)
    rows: list[Verification] = []
    whole = _load(folder)
    for one in [owner] if owner is not None else lock.involved:
        own = doors if one in lock.composed_owners else doors[1:]
        with never_joined(folder, {one}) as without:
            rows += _verify_owner(folder, without, one, whole, probe, own, progress or (lambda _: None))
    return rows


@contextmanager
def never_joined(folder: Path, owners: Collection[str]) -> Iterator[Path]:
    """Compose, from the same published files, the folder that these owners never joined.

    The manifest is planned and built anew from the files in ``folder``; nothing of the owners is in the result.
    """
    from composer.recompose import recompose

    with _scratch(folder) as scratch:
        composed = recompose(folder, scratch / "composed", without=owners)
        yield _tuned_again(folder, composed, scratch / "tuned", owners)


def _tuned_again(folder: Path, composed: Path, out: Path, owners: Collection[str]) -> Path:
    """Put back what was tuned before these owners joined; nothing where it holds something of them."""
    tuned = Lock.read(folder).without(owners).tuned
    if tuned is None:
        return composed
    from composer.tuned import write_grown

    write_grown(folder, composed, out, tuned)
    _compute_rows_again(folder, composed, out, tuned)
    return out


def _compute_rows_again(folder: Path, composed: Path, out: Path, tuned: LockedTuning) -> None:
    """Replace rows of experts who joined after the tuning where they are not what they are without these owners."""
    from safetensors.torch import load_file, save_file

    from composer.upcycling.growth import recomputed_rows

    recomputed = recomputed_rows(folder, composed, tuned.grown, scratch=out.with_name(f"{out.name}.grown"))
    for rows in tuned.grown:
        path = out / TUNED_FOLDER / rows.file.path
        linked, anew = load_file(path), recomputed[rows.expert]
        if not all(_same_row(row, anew[name]) for name, row in linked.items()):
            path.unlink()  # the folder's own file is linked here
            save_file(anew, path)


def _same_row(linked: torch.Tensor, anew: torch.Tensor) -> bool:
    """Whether rows are the same but for the last bits, which another machine may compute differently."""
    largest = float(linked.abs().max())
    return float((linked.float() - anew.float()).abs().max()) <= TOLERANCE * largest


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


def _verify_owner(
    folder: Path,
    without: Path,
    owner: str,
    whole: ComposedForCausalLM,
    probe: Probe,
    doors: tuple[Door, ...],
    progress: Callable[[str], None],
) -> list[Verification]:
    never = _load(without)
    batches = probe.batches(whole)
    expected = [probe.outputs(never, batch) for batch in batches]
    rows = []
    for door in doors:
        if door == "request":
            continue
        progress(f"{owner}: {door}")
        model = _build_without(folder, owner) if door == "build" else _load(folder, opt_out={owner})
        rows.append(_compare(owner, door, [probe.outputs(model, batch) for batch in batches], expected))
    if "request" not in doors:
        return rows
    progress(f"{owner}: request")
    asked, beside = zip(*(probe.requests(whole, never, batch, owner) for batch in batches), strict=True)
    rows.append(_compare(owner, "request", asked, beside))
    return rows


def _build_without(folder: Path, owner: str) -> ComposedForCausalLM:
    """Build with the owner in the manifest's ``opt_out``, which is another road than never listing them."""
    from composer.recompose import recompose

    with _scratch(folder) as scratch:
        composed = recompose(folder, scratch / "composed", opt_out={owner})
        return _load(_tuned_again(folder, composed, scratch / "tuned", {owner}))


def _compare(
    owner: str, door: Door, got: Sequence[list[torch.Tensor]], expected: Sequence[list[torch.Tensor]]
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
