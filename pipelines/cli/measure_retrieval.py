"""``coterie evaluate`` for composed retrievers: rankings on test collections, and whether they beat the base's.

Knows how to name collections and print numbers; they are computed by ``pipelines.retrieval.evaluation``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.loading import OptionError, quiet_transformers
from pipelines.cli.output import note, print_json, print_line, print_table
from pipelines.cli.progress import count_bar
from pipelines.retrieval.metrics import METRICS

if TYPE_CHECKING:
    from composer.lock import Lock
    from pipelines.retrieval.collection import Collection as Test
    from pipelines.retrieval.evaluation import CollectionScore
    from registry import Registry

__all__ = ["evaluate_retriever", "refuse_idle_options"]


def evaluate_retriever(
    out: Path,
    lock: Lock,
    folders: Mapping[str, Path],
    *,
    opt_out: Collection[str],
    leave_one_out: bool,
    heatmap: Path | None,
    batch_size: int,
    device: str,
    registry: Registry,
    as_json: bool,
) -> None:
    """Measure a composed retriever on collections and print the results.

    Args:
        out: The composed folder.
        lock: Of it.
        folders: Folder of a collection by its name.
        opt_out: Owners whose experts and documents are left out.
        leave_one_out: Whether to measure without each owner's experts too.
        heatmap: A picture to draw who answers into.
        batch_size: Texts encoded at once.
        device: Where the model runs; ``auto`` is understood.
        registry: Whose consent ledger is read too.
        as_json: Print JSON.

    Raises:
        CoterieError: A collection is damaged, or an owner is unknown.
    """
    from pipelines.retrieval.collection import read_collection

    whole = [read_collection(folder, name=name) for name, folder in folders.items()]
    left_out = _left_out(opt_out, lock, whole, registry)
    tests = [_without(test, left_out) for test in whole]

    from pipelines.retrieval.encoders import open_encoder
    from pipelines.retrieval.evaluation import evaluate
    from pipelines.retrieval.evaluation import leave_one_out as each_left_out

    with quiet_transformers(), count_bar("Encoding", unit="documents") as progress:
        experts = left_out.intersection(lock.composed_owners)
        encoder = open_encoder(out, opt_out=experts, registry=registry, device=_device(device))
        if leave_one_out:
            arms = each_left_out(encoder, tests, batch_size=batch_size, progress=progress)
        else:
            arms = {"composed": evaluate(encoder, tests, batch_size=batch_size, progress=progress)}
    for name, score in arms["composed"].items():
        if score.cut:
            note(
                f"Note: {score.cut} queries of {name} are longer than the {encoder.longest} tokens that are read."
            )
    if heatmap is not None:
        _draw(arms["composed"], heatmap)
    if as_json:
        plain = {arm: _plain(scores, sorted(left_out)) for arm, scores in arms.items()}
        print_json(plain if leave_one_out else plain["composed"])
        return
    _print_scores(arms["composed"])
    if leave_one_out:
        _print_arms(arms)


def _left_out(
    opt_out: Collection[str], lock: Lock, tests: Sequence[Test], registry: Registry
) -> frozenset[str]:
    """Check names against owners of experts, their parents and documents; add who has opted out in the registry."""
    from composer.optout import check_owners

    known = {document.owner for test in tests for document in test.documents if document.owner}
    known.update(lock.composed_owners)
    revoked = {entry.owner for entry in registry.opt_outs()}
    check_owners(set(opt_out) - revoked, known)
    return frozenset(known.intersection({*opt_out, *revoked}))


def _without(test: Test, left_out: Collection[str]) -> Test:
    """Leave owners' documents out, and say how much that is."""
    from pipelines.retrieval.collection import without_owners

    kept = without_owners(test, left_out)
    if gone := len(test.documents) - len(kept.documents):
        unanswered = len(test.queries) - len(kept.queries)
        note(
            f"Note: {gone} of {len(test.documents)} documents of {test.name} are left out with their owners, and "
            f"{unanswered} of {len(test.queries)} queries, which only they answer."
        )
    return kept


def refuse_idle_options(**given: object) -> None:
    """Refuse options of language models.

    Raises:
        OptionError: One of them was given.
    """
    idle = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if idle:
        raise OptionError(f"{', '.join(idle)}: not for retrievers; leave it out.")


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _draw(scores: Mapping[str, CollectionScore], path: Path) -> None:
    from pipelines.charts import draw_routing

    beside = path.with_name(f".{path.stem}.part.png")
    try:
        routing = {name: score.routing for name, score in scores.items()}
        draw_routing(routing, beside, title="Who answers a collection's queries").replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _plain(scores: Mapping[str, CollectionScore], left_out: Collection[str]) -> dict[str, object]:
    return {"opt_out": list(left_out), "collections": {name: asdict(score) for name, score in scores.items()}}


def _print_scores(scores: Mapping[str, CollectionScore]) -> None:
    headings = ("QUERIES", *(metric.upper() for metric in METRICS), "BASE", "CHANGE", "95 %", "P")
    owners = list(dict.fromkeys(owner for score in scores.values() for owner in score.routing))
    shares = [f"TO {owner.upper()}" for owner in owners]
    print_table(
        [
            (
                name,
                score.queries,
                *(f"{score.metrics[metric]:.3f}" for metric in METRICS),
                f"{score.base['ndcg@10']:.3f}",
                f"{score.against_base.difference:+.3f}",
                f"{score.against_base.low:+.3f} to {score.against_base.high:+.3f}",
                f"{score.against_base.p_value:.4f}",
                *(f"{score.routing[owner]:.0%}" for owner in owners),
            )
            for name, score in scores.items()
        ],
        columns=("COLLECTION", *headings, *shares),
        empty="No collection.",
        right=(*headings, *shares),
    )


def _print_arms(arms: Mapping[str, Mapping[str, CollectionScore]]) -> None:
    names = list(arms["composed"])
    headings = [name.upper() for name in names]
    print_line()
    print_table(
        [
            (arm, *(f"{scores[name].metrics['ndcg@10']:.3f}" for name in names))
            for arm, scores in arms.items()
        ],
        columns=("NDCG@10", *headings),
        empty="No arm.",
        right=headings,
    )
