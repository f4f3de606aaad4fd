"""What a tuning job would do to a composition, checked before a model is loaded.

Knows manifests, locks, consent and texts; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.lock import Lock, OptOutClass
from composer.recipes import RECIPES, require_language_model
from experts.errors import ConsentError, PlanError
from pipelines.tune.job import TuneJob

if TYPE_CHECKING:
    from composer.planning import Plan
    from registry import Registry

__all__ = ["TuningPlan", "plan_tuning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPlan:
    """What a job would do to a composition.

    Attributes:
        name: The composition.
        train: What is trained.
        owners: Whose text or experts will be in the trained weights, sorted.
        text_owners: Whose text is trained on, sorted.
        optout_class_before: Of the composition, which is kept inside the result.
        tokens: That will be trained on.
        steps: Of the optimiser.
        folder: The composed folder, or None where it is still to be built.
        plan: The plan of the manifest, or None where there is a folder.
        warnings: What may be a mistake in the job.
    """

    name: str
    train: str
    owners: tuple[str, ...]
    text_owners: tuple[str, ...]
    optout_class_before: OptOutClass
    tokens: int
    steps: int
    folder: Path | None
    plan: Plan | None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for printing and ``--json``."""
        return {
            "name": self.name,
            "train": self.train,
            "owners": list(self.owners),
            "text_owners": list(self.text_owners),
            "optout_class": "retrain",
            "optout_class_before": self.optout_class_before,
            "tokens": self.tokens,
            "steps": self.steps,
        }


def plan_tuning(source: Path | str, job: TuneJob, *, registry: Registry) -> TuningPlan:
    """Check what can be checked without loading a model; nothing is written.

    Args:
        source: A manifest, or a composed folder.
        job: What to train.
        registry: Of the experts, and of who has opted out.

    Raises:
        PlanError: The manifest cannot be composed, or its router has nothing to train.
        ConsentError: Somebody whose text or expert is involved has opted out.
        BuildError: The folder is not a composed one.
        DataError: A file of text is missing, empty or malformed.
    """
    from pipelines.train.windows import read_documents

    path = Path(source)
    lock, plan = None, None
    if path.is_dir():
        lock = Lock.read(path)
        require_language_model(path, lock.recipe)
    else:
        plan = _plan(path, registry)
        require_language_model(path, plan.manifest.recipe)
    _check_consent(job, lock.involved if lock else (), registry)
    _check_trainable(job, *_router(lock, plan))
    for text in job.data:
        read_documents(text.text)
    involved = lock.involved if lock else plan.involved if plan else ()
    return TuningPlan(
        name=lock.name if lock else plan.manifest.name if plan else "",
        train=job.train,
        owners=tuple(sorted({*involved, *job.text_owners})),
        text_owners=job.text_owners,
        optout_class_before=_class_before(lock, plan),
        tokens=job.tokens,
        steps=job.steps,
        folder=path if lock else None,
        plan=plan,
        warnings=_alike(job.text_owners, {*involved, *(record.owner for record in registry.experts())}),
    )


def _alike(text_owners: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Warn of owners nobody knows whose names are nearly somebody's: leaving that one out would keep their text."""
    near = {name: get_close_matches(name, sorted(known), n=1) for name in text_owners if name not in known}
    return tuple(
        f"Text of '{name}', of whom there is no expert. Is it {found[0]}'s? Leaving {found[0]} out would keep it."
        for name, found in near.items()
        if found
    )


def _plan(path: Path, registry: Registry) -> Plan:
    from composer.manifest import Manifest
    from composer.planning import plan

    return plan(Manifest.from_file(path), registry)


def _class_before(lock: Lock | None, plan: Plan | None) -> OptOutClass:
    if lock is not None:
        return lock.untuned.optout_class
    assert plan is not None
    return plan.optout_class


def _router(lock: Lock | None, plan: Plan | None) -> tuple[str, str, int]:
    """Return the recipe's and the scorer's names, and how many experts there are."""
    if lock is not None:
        return lock.recipe, lock.router.scorer, len(lock.experts)
    assert plan is not None
    return plan.manifest.recipe, plan.manifest.router.scorer, len(plan.experts)


def _check_consent(job: TuneJob, involved: Sequence[str], registry: Registry) -> None:
    out = {entry.owner: entry for entry in registry.opt_outs()}
    problems = [
        f"{owner} opted out on {out[owner].when} (recorded by {out[owner].who}): {out[owner].reason}"
        for owner in sorted({*involved, *job.text_owners})
        if owner in out
    ]
    if problems:
        raise ConsentError(
            "Tuning would put owners who have opted out into every trained weight. Take their text out of the job, and "
            "their experts out of the composition with `coterie remove`:",
            problems=problems,
        )


def _check_trainable(job: TuneJob, recipe: str, scorer: str, experts: int) -> None:
    from composer.routing.scorers import SCORERS

    if not experts:
        raise PlanError(
            "The composition has no experts, so there is nothing to route between and nothing to tune."
        )
    if job.train == "routers" and not RECIPES.load(recipe).routes:
        raise PlanError(
            f"train: routers, but '{recipe}' makes one dense model, which has no router. Train the trunk, or compose "
            "with a recipe that routes (`btx`, `bam`)."
        )
    if job.train == "routers" and not SCORERS.load(scorer).trainable:
        trainable = ", ".join(f"'{name}'" for name in SCORERS if SCORERS.load(name).trainable)
        raise PlanError(
            f"train: routers, but the router '{scorer}' is solved from statistics and has nothing to train. Compose "
            f"with a scorer that has ({trainable}), or train the trunk."
        )
