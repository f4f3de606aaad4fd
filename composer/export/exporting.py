"""Writes a composition as a checkpoint of a stock class, or says why there is none that computes the same.

``plan_export`` checks and lays out; ``export`` writes. A left-out owner's files are not opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.building import TOKENIZER_FILES, link_file, new_folder
from composer.export import TARGETS
from composer.export.card import write_card, write_owners
from composer.export.exactness import judge, read_rows
from composer.export.layout import Layout
from composer.export.rows import RouterRows
from composer.export.seats import Seat, merged_trunk, seat_all
from composer.export.shards import SHARD_BYTES, Progress, write_shards
from composer.export.target import ANCHOR
from composer.export.tensors import FLOATS, Entry
from composer.export.tuned import TunedTensors
from composer.loading import left_out
from composer.lock import Lock
from composer.members import BASE_FOLDER, Members
from composer.recipes import require_language_model
from experts.errors import BuildError, OptOutError
from experts.files import capped

if TYPE_CHECKING:
    from composer.export.target import StockTarget
    from registry import Registry

__all__ = ["ExportPlan", "export", "plan_export"]

_SPELLING = {torch: ours for ours, torch in FLOATS.items()}


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What `export` will write.

    Attributes:
        target: Name in `TARGETS`.
        stock: The stock class.
        members: The composition without the owners that are left out.
        seats: Who stands at which index.
        entries: Every tensor, in the order in which it is written.
        settings: What the stock class has and the base has not.
        dtype: Of every floating tensor, as torch spells it.
        densified: What is written in full although the composition stores less.
        dropped: Biases that are left out, so that the logits are not the composition's.
        left_out: Owners that are not in it.
    """

    target: str
    stock: StockTarget
    members: Members
    seats: tuple[Seat, ...]
    entries: tuple[Entry, ...]
    settings: dict[str, Any]
    dtype: str
    densified: tuple[str, ...]
    dropped: tuple[str, ...]
    left_out: tuple[str, ...]

    @cached_property
    def bytes(self) -> int:
        """Tensor bytes of the checkpoint."""
        return sum(entry.spec.nbytes for entry in self.entries)

    @property
    def mixed(self) -> tuple[str, ...]:
        """What of the checkpoint was computed from several owners together, in words."""
        lock, found = self.members.lock, []
        trunk = merged_trunk(lock)
        if trunk is not None:
            base = f"{lock.base.name} and " if lock.upcycle and lock.upcycle.seed_expert else ""
            found.append(
                f"the trunk is merged ({trunk.method}) from {base}{', '.join(e.name for e in lock.experts)}"
            )
        elif lock.upcycle is not None and lock.upcycle.copies:
            found.append(f"the trunk is that of {lock.experts[0].name}")
        if lock.tuned is not None:
            found.append(
                f"tuned after composing ({lock.tuned.trained}): those tensors hold all of "
                f"{', '.join(lock.tuned.owners)}"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for printing and ``--json``."""
        lock = self.members.lock
        return {
            "target": self.target,
            "architecture": self.stock.architecture,
            "composition": lock.name,
            "base": lock.base.name,
            "experts": [
                {"index": index, "name": seat.name, "owner": seat.member.locked.owner}
                for index, seat in enumerate(self.seats)
                if seat.member is not None
            ],
            "mixed": list(self.mixed),
            "left_out": list(self.left_out),
            "settings": self.settings,
            "dtype": self.dtype,
            "densified": list(self.densified),
            "dropped": list(self.dropped),
            "tensors": len(self.entries),
            "bytes": self.bytes,
        }


def plan_export(
    folder: Path | str,
    to: str,
    *,
    opt_out: Collection[str] = (),
    registry: Registry | Path | str | None = None,
    densify: bool = False,
    drop_bias: bool = False,
) -> ExportPlan:
    """Check that a composition has an exact stock form and lay it out; no weight is read.

    Args:
        folder: A composed folder.
        to: Name in `TARGETS`.
        opt_out: Owners to leave out.
        registry: A registry or its path, whose opt-outs count too.
        densify: Write low-rank experts in full, ``W + s B A`` (exact up to rounding), and copies of the anchor
            for absent experts, where that is exact.
        drop_bias: Leave the owners' router biases out. The logits are then not the composition's; measure the cost
            with `pipelines.calibration.bias_cost`.

    Raises:
        BuildError: There is no exact form; every reason is listed.
        OptOutError: An expert that stays was made from one that is left out.
        UnknownNameError: The target, or an owner, is unknown.
    """
    stock: StockTarget = TARGETS.load(to)()
    path = Path(folder)
    lock = Lock.read(path)
    require_language_model(path, lock.recipe)
    without = left_out(lock, opt_out, registry)
    members = Members.open(path, lock, without=without)
    if not members.experts:
        raise BuildError(
            f"Nobody is left in {path} to export. Use the base '{lock.base.name}' itself, in {path / BASE_FOLDER}."
        )
    _check_lineage(members)
    rows, tuned = read_rows(members), TunedTensors(members)
    seats = seat_all(members)
    verdict = judge(to, stock, members, rows, seats=seats, tuned=tuned, densify=densify, drop_bias=drop_bias)
    failure = f"{path} is not exactly {_article(stock.title)} {stock.title} model:"
    if verdict.problems:
        raise BuildError(failure, problems=verdict.problems)
    dtype = _dtype(members)
    router_rows = RouterRows(members, rows, tuned, dtype=dtype, left_out=without)
    layout = Layout(stock, members, seats, router_rows, tuned, dtype=dtype, dense=verdict.dense)
    entries = tuple(layout.entries())
    if lost := tuned.unclaimed():
        shown = [f"{name} was tuned, and {stock.title} has no place for it" for name in lost]
        raise BuildError(failure, problems=capped(shown))
    return ExportPlan(
        target=to,
        stock=stock,
        members=members,
        seats=seats,
        entries=entries,
        settings=stock.settings(
            num_experts=len(seats),
            top_k=min(lock.router.top_k, len(seats)),
            normalize=lock.router.normalize,
            intermediate_size=members.description.intermediate_size,
            dense=verdict.dense,
        ),
        dtype=FLOATS[dtype],
        densified=verdict.densified,
        dropped=verdict.dropped,
        left_out=tuple(sorted(without)),
    )


def _article(title: str) -> str:
    return "an" if title[0] in "AEIO" else "a"


def _check_lineage(members: Members) -> None:
    kept = members.lock.lineage  # without the files that were computed from a left-out owner's
    mixed = [
        member.locked.name
        for member in members.experts
        if any(f"{member.locked.folder}/{entry.path}" not in kept for entry in member.locked.files)
    ]
    if mixed:
        raise OptOutError(
            f"{', '.join(mixed)} was made from experts of an owner who is left out, so the checkpoint would not be "
            "without them. Leave it out too, or compose anew from what it was made of."
        )


def _dtype(members: Members) -> str:
    """Return the dtype the composition is loaded in, in safetensors' spelling."""
    config = members.description.config
    declared = members.lock.dtype or config.get("dtype") or config.get("torch_dtype")
    return _SPELLING.get(str(declared), members.description.dtype)


def export(
    plan: ExportPlan,
    out: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the checkpoint: tensors one by one, configuration, tokenizer, and who is who.

    Args:
        plan: What to write.
        out: The folder; it must not exist.
        shard_bytes: Tensor bytes of a file.
        progress: Told of every tensor.
        notes: Lines for the model card, for instance what dropping a bias was measured to cost.

    Raises:
        BuildError: ``out`` exists or cannot be written, or a tensor did not reach its file. Nothing is left behind.
    """
    source = plan.members.folder
    with new_folder(Path(out)) as staging:
        write_shards(staging, plan.entries, shard_bytes=shard_bytes, progress=progress)
        _write_config(plan, staging)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                link_file(source / name, staging / name)
        if plan.seats[0].id == ANCHOR and not plan.mixed:  # else index 0 and the trunk are no public base
            write_owners(staging / "owners.yaml", plan.members)
        write_card(
            staging / "README.md", plan.members, plan.seats, plan.stock, changes=(*_changes(plan), *notes)
        )
    return Path(out)


def _changes(plan: ExportPlan) -> list[str]:
    return [
        *plan.mixed,
        *(f"{text}: written in full" for text in plan.densified),
        *(f"{text}: dropped, so the logits are not the composition's" for text in plan.dropped),
    ]


def _write_config(plan: ExportPlan, staging: Path) -> None:
    from transformers import AutoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' advice on configurations is not for this reader
        base = AutoConfig.from_pretrained(plan.members.folder / BASE_FOLDER, local_files_only=True)
        config = plan.stock.config(base, dtype=plan.dtype, settings=plan.settings)
        config.to_json_file(staging / "config.json", use_diff=False)
