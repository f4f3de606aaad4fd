"""Adds experts to a composition that was tuned, and keeps what was tuned: only the new experts' router rows are new.

Knows tuned tensors by name and rows by expert. What a row starts from is the artefacts' or the untuned router's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from composer.lock import TUNED_FOLDER, Lock, LockedRows
from experts.names import unknown_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["NEW_ROWS", "NewRows", "growth_problems", "keep_tuning", "projected_row", "recomputed_rows"]

NewRows = Literal["untuned", "embedding", "statistics"]
"""What a new expert's router row starts from where the others' rows were tuned. ``untuned``: what the composition's own
router gives it, from its prompts or a seed; ``embedding``: the others' tuned rows, by likeness of the published domain
embeddings; ``statistics``: the published sums of the router's inputs."""
NEW_ROWS: tuple[NewRows, ...] = get_args(NewRows)


def growth_problems(
    lock: Lock, new_rows: str, *, replaced: Collection[str], removed: Collection[str]
) -> list[str]:
    """Say why experts cannot be added beside tuned weights; empty when they can."""
    if new_rows not in NEW_ROWS:
        return [str(unknown_name("start of new rows", new_rows, NEW_ROWS))]
    if lock.tuned is None:
        return ["the folder was not tuned, so there is nothing to keep; add without `--new-rows`"]
    found = []
    if lock.tuned.trained == "all":
        found.append(
            "everything was tuned, the experts too, and a new expert has no tuned weights; add without `--new-rows` "
            "and tune again"
        )
    if replaced or removed:
        found.append(
            f"{', '.join(sorted({*replaced, *removed}))}: tuned weights hold this expert; only new ones can be added "
            "beside them"
        )
    return found


def keep_tuning(before: Path, plain: Path, out: Path, *, new_rows: NewRows) -> Path:
    """Write a composition with a tuned one's weights.

    Args:
        before: The tuned folder.
        plain: The same composition with more experts, untuned.
        out: What is written; must not exist.
        new_rows: What new rows start from.

    Raises:
        BuildError: ``out`` cannot be written, or artefacts that ``new_rows`` needs are missing.
    """
    from composer.tuned import write_grown

    old, new = Lock.read(before), Lock.read(plain)
    assert old.tuned is not None, "growth_problems() was empty"
    there = [expert.name for expert in old.experts]
    joined = [expert.name for expert in new.experts if expert.name not in there]
    rows = _rows_beside(plain, joined, _known_rows(before, old), new_rows)
    others = _sources(new, there, new_rows)
    beside = {expert: [name for name in others if name != expert] for expert in joined}
    return write_grown(before, plain, out, old.tuned, rows=rows, beside=beside, new_rows=new_rows)


def recomputed_rows(
    before: Path, composed: Path, grown: Sequence[LockedRows], *, scratch: Path
) -> dict[str, dict[str, Tensor]]:
    """Compute again, with nobody but those who are left, the router rows of experts that joined after a tuning.

    Args:
        before: The tuned folder; only rows that were tuned are read from it.
        composed: The composition of those who are left, untuned.
        grown: Whose rows, in the order in which they joined.
        scratch: A folder for compositions as they were when an expert joined.

    Returns:
        Expert -> name of the router's rows -> its row ``(d,)``.
    """
    lock = Lock.read(before)
    assert lock.tuned is not None, "it grew"
    later = {rows.expert for rows in lock.tuned.grown}
    known = {
        name: {who: row for who, row in rows.items() if who not in later}
        for name, rows in _known_rows(before, lock).items()
    }
    found: dict[str, dict[str, Tensor]] = {}
    for number, rows in enumerate(grown):
        # whoever came along in the same step had no row yet
        together = {other.expert for other in grown if rows.expert in other.beside}
        there = {
            name: {who: row for who, row in known[name].items() if who not in together} for name in known
        }
        folder = _as_it_was(composed, rows, scratch / str(number))
        found |= _rows_beside(folder, [rows.expert], there, cast("NewRows", rows.new_rows))
        for name, row in found[rows.expert].items():
            known[name][rows.expert] = row
    return found


def _as_it_was(composed: Path, rows: LockedRows, out: Path) -> Path:
    """Return the composition of an expert and those its rows were computed from; any will do where there are none."""
    from composer.recompose import recompose

    names = {rows.expert, *rows.beside}
    if not rows.beside or names == {expert.name for expert in Lock.read(composed).experts}:
        return composed
    out.parent.mkdir(exist_ok=True)
    return recompose(composed, out, only=names)


def _sources(lock: Lock, there: Sequence[str], new_rows: NewRows) -> Sequence[str]:
    """Return the experts whose rows, artefacts or weights a new row is computed from, beside its own expert's."""
    if new_rows == "embedding":
        return there
    everybody = [expert.name for expert in lock.experts]
    return everybody if new_rows == "statistics" or _measured_on_everybody(lock) else []


def _measured_on_everybody(lock: Lock) -> bool:
    """Whether the composition's own rows are taken where all owners' weights are: in a model with a merged trunk."""
    from composer.routing.scorers import SCORERS

    merged = lock.upcycle is not None and lock.upcycle.trunk != "frozen"
    return merged and bool(SCORERS.load(lock.router.scorer).from_prompts)


def _rows_beside(
    folder: Path, joined: Sequence[str], known: Mapping[str, Mapping[str, Tensor]], new_rows: NewRows
) -> dict[str, dict[str, Tensor]]:
    """Return the rows of new experts of an untuned composition, by expert and the name of the router's rows."""
    from composer.loading import load
    from composer.members import Members

    members = Members.open(folder, Lock.read(folder), without=())
    model = load(folder) if new_rows == "untuned" else None
    return {
        expert: {
            name: _new_row(name, rows, model, members, expert, new_rows).to(_dtype(rows))
            for name, rows in known.items()
        }
        for expert in joined
    }


def _known_rows(folder: Path, lock: Lock) -> dict[str, dict[str, Tensor]]:
    """Return every router's rows ``(d,)`` by the name of the parameter and the expert, or ``anchor``."""
    from safetensors.torch import load_file

    from composer.tuned import ROWS

    assert lock.tuned is not None
    later = {rows.expert: rows.file for rows in lock.tuned.grown}
    first = [expert.name for expert in lock.experts if expert.name not in later]
    found: dict[str, dict[str, Tensor]] = {}
    for entry in lock.tuned.files:
        for name, tensor in load_file(folder / TUNED_FOLDER / entry.path).items():
            if name.endswith(ROWS):
                with_anchor = ["anchor"] * (len(tensor) - len(first))
                found[name] = dict(zip([*with_anchor, *first], tensor, strict=True))
    for expert, entry in later.items():
        for name, row in load_file(folder / TUNED_FOLDER / entry.path).items():
            found[name][expert] = row
    return found


def _dtype(known: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(known.values())).dtype


def _new_row(
    name: str,
    known: Mapping[str, Tensor],
    model: ComposedForCausalLM | None,
    members: Members,
    expert: str,
    new_rows: NewRows,
) -> Tensor:
    """Return an expert's row ``(d,)`` of one router.

    Args:
        name: Of the router's rows in the model.
        known: Rows of those who are there.
        model: The untuned composition with the expert, where its row is wanted.
        members: Everybody, with their artefacts.
        expert: Who joins.
        new_rows: What the row starts from.
    """
    import torch

    if model is not None:
        scorer: Any = model.get_submodule(name.removesuffix(".rows"))
        row: Tensor = scorer.rows.detach()[scorer.position[model.expert_names.index(expert) + 1]]
        return row.clone()
    wide = {who: row.float() for who, row in known.items()}
    if new_rows == "embedding":
        return torch.from_numpy(_by_embedding(members, wide, expert))
    return torch.from_numpy(_by_statistics(members, name, wide, expert))


def projected_row(embeddings: Any, rows: Any, new: Any, *, ridge: float = 0.1) -> Any:
    """Project a domain embedding to a router row, by the linear map that best turns known embeddings into their rows.

    ``W = argmin sum_i |W d_i - r_i|^2 + ridge |W|^2`` with unit ``d_i``, so ``r = W d_new = sum_i a_i r_i`` with
    ``a = (D D^T + ridge I)^-1 D d_new``: Nexus's projection of domain embeddings (arXiv 2408.15901), linear and solved
    in closed form instead of trained.

    Args:
        embeddings: ``(n, m)``, of the experts with rows.
        rows: ``(n, d)``.
        new: ``(m,)``.
        ridge: Strength of the penalty.

    Returns:
        float64 ``(d,)``.
    """
    import numpy as np

    known = np.asarray(embeddings, dtype=np.float64)
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    wanted = np.asarray(new, dtype=np.float64)
    wanted = wanted / np.linalg.norm(wanted)
    shares = np.linalg.solve(known @ known.T + ridge * np.eye(len(known)), known @ wanted)
    return shares @ np.asarray(rows, dtype=np.float64)


def _by_embedding(members: Members, known: Mapping[str, Tensor], expert: str) -> Any:
    import numpy as np

    from experts.errors import BuildError

    published = {member.locked.name: _artifacts(members, member) for member in members.experts}
    found = {who: artifacts.embedding for who, artifacts in published.items()}
    lacking = sorted(name for name in found if found[name] is None and (name in known or name == expert))
    if lacking:
        raise BuildError(
            f"{', '.join(lacking)} publishes no domain embedding, so no row can be projected from it; use another "
            f"start of new rows ({', '.join(NEW_ROWS)})."
        )
    others = [name for name in known if name in found]
    made = {name: published[name].info.embedding for name in [*others, expert]}
    if len({info.digest for info in made.values()}) > 1:
        shown = ", ".join(f"{name}: '{info.model}' ({info.digest[:12]})" for name, info in made.items())
        raise BuildError(
            f"The domain embeddings were made by different embedders ({shown}), so no row can be projected from them; "
            f"use another start of new rows ({', '.join(NEW_ROWS)})."
        )
    row = projected_row(
        [found[name] for name in others], [known[name].numpy() for name in others], found[expert]
    )
    return np.asarray(row, dtype=np.float32)


def _by_statistics(members: Members, name: str, known: Mapping[str, Tensor], expert: str) -> Any:
    """Return the ridge direction of the new class among all, as long as the tuned rows are on average."""
    import numpy as np

    from composer.routing.scorers.ridge import solve_ridge
    from experts.errors import BuildError

    layer = members.description.layer_of(name.removeprefix("base."))
    branch = "attention" if "attn" in name or ".attention." in name else "ffn"
    classes = {
        member.locked.name: _artifacts(members, member).inputs(layer or 0, branch)
        for member in members.experts
    }
    lacking = sorted(who for who, sums in classes.items() if sums is None)
    if lacking:
        raise BuildError(
            f"{', '.join(lacking)} publishes no statistics of the inputs of layer {layer}'s {branch} router; use "
            f"another start of new rows ({', '.join(NEW_ROWS)})."
        )
    weights, _ = solve_ridge([sums for sums in classes.values() if sums is not None])
    direction = weights[list(classes).index(expert)]
    length = np.mean([float(row.norm()) for who, row in known.items() if who != "anchor"])
    return (direction / np.linalg.norm(direction) * length).astype(np.float32)


def _artifacts(members: Members, member: Any) -> Any:
    from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

    if member.card.routing is None:
        return RoutingArtifacts(info=RoutingInfo(), tensors={})
    return member.routing(members.description.hidden_size)
