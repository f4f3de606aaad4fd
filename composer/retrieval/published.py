"""Reads what the owners of a composition published about their queries, and says what is missing for a router.

Knows cards and routing files; knows no equation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experts.errors import BuildError

if TYPE_CHECKING:
    from composer.members import Member, Members
    from composer.retrieval.facts import ExpertFacts, Labels
    from composer.retrieval.options import RetrievalRouter
    from composer.retrieval.scorers.base import Need
    from experts.card import ExpertCard
    from experts.retrieval_artifacts import Moments, RetrievalArtifacts, Scores
    from experts.retrieval_info import RetrievalInfo

__all__ = ["facts_of", "foreign_names", "publication_problems", "state_layer"]


def facts_of(members: Members, options: RetrievalRouter) -> list[ExpertFacts]:
    """Read the facts of every loaded expert, in canonical order.

    Names of experts that are not loaded are dropped here, with their numbers, before any arithmetic.
    """
    names = frozenset(member.locked.name for member in members.experts)
    return [_facts(member, members.description.hidden_size, names, options) for member in members.experts]


def _facts(member: Member, width: int, names: frozenset[str], options: RetrievalRouter) -> ExpertFacts:
    from composer.retrieval.facts import ExpertFacts
    from experts.retrieval_info import BASE_NAME

    published = member.routing(width).retrieval
    if published is None:
        raise BuildError(f"{member.locked.name} publishes nothing about its queries. Build the folder again.")
    moments = _moments(published, options)
    utility = published.utility
    columns = {} if utility is None else dict(enumerate((BASE_NAME, *utility.experts)))
    return ExpertFacts(
        name=member.locked.name,
        count=float(moments.count),
        sum=moments.sum,
        scatter=moments.scatter,
        unit=_of_length_one(published.info, options),
        labels=None if published.scores is None else _labels(published.scores, names),
        gram=None if utility is None else utility.gram,
        utility={
            name: utility.cross[:, column].copy()
            for column, name in columns.items()
            if utility is not None and name in {*names, BASE_NAME}
        },
    )


def _of_length_one(info: RetrievalInfo, options: RetrievalRouter) -> bool:
    """Say whether what is scored has length 1: mean states and tokens have, embeddings where the base divides them."""
    return options.route_on != "embedding" or info.normalization == "l2"


def _moments(published: RetrievalArtifacts, options: RetrievalRouter) -> Moments:
    places = {
        "embedding": published.embedding,
        "layer_state": published.state,
        "static_tokens": published.static,
    }
    moments = places[options.route_on]
    assert moments is not None, "the plan asked for it"
    return moments


def _labels(scores: Scores, names: frozenset[str]) -> Labels:
    """Take the columns of experts that are there; the others' numbers go no further."""
    from composer.retrieval.facts import Labels

    return Labels(
        counts=scores.counts,
        vectors=scores.vectors,
        quality={
            name: scores.quality[:, column].copy()
            for column, name in enumerate(scores.experts, start=1)
            if name in names
        },
    )


def state_layer(members: Members, options: RetrievalRouter) -> int | None:
    """Return the layer whose input is routed on; None where embeddings are."""
    if options.route_on != "layer_state":
        return None
    layers = {_state_layer(member.card) for member in members.experts}
    if len(layers) != 1 or None in layers:
        raise BuildError("The experts' states were not taken at one layer. Build the folder again.")
    return layers.pop()


def _state_layer(card: ExpertCard) -> int | None:
    info = _info(card)
    return None if info is None or info.state is None else info.state.layer


def _info(card: ExpertCard) -> RetrievalInfo | None:
    return None if card.routing is None else card.routing.retrieval


def foreign_names(card: ExpertCard) -> tuple[str, ...]:
    """Return the experts of other owners that an expert's published sums speak of, sorted."""
    info = _info(card)
    if info is None:
        return ()
    named = {group.expert for group in (info.pilots.groups if info.pilots else ())}
    named |= {name for made in (info.utility, info.scores) if made for name in made.experts}
    return tuple(sorted(name for name in named if "/" in name and name.partition("/")[0] != card.owner))


def publication_problems(
    cards: Sequence[ExpertCard], options: RetrievalRouter, needs: frozenset[Need]
) -> list[str]:
    """Say what the owners did not publish that a scorer needs; one line for each expert."""
    infos = {card.name: _info(card) for card in cards}
    missing = [f"{name} publishes nothing about its queries" for name, info in infos.items() if info is None]
    if missing:
        return missing
    known = {name: info for name, info in infos.items() if info is not None}
    names = sorted(known)
    found = [
        text for name, info in known.items() for text in _expert_problems(name, info, options, needs, names)
    ]
    if options.route_on == "layer_state":
        found += _state_problems({card.name: card for card in cards}, known)
    if options.route_on == "static_tokens":
        found += [
            f"{name} publishes no sums of token embeddings, which `route_on: static_tokens` needs; publish them "
            "(`retrieval: {static_statistics: true}` in its job), or route on the embedding"
            for name, info in known.items()
            if not info.static_tokens
        ]
    if options.route_on != "embedding" and needs & {"pilots", "utility"}:
        found.append(
            f"scorer '{options.scorer}' is made of embeddings, and `route_on: {options.route_on}` scores something "
            "else; route on the embedding"
        )
    return found


def _expert_problems(
    name: str,
    info: RetrievalInfo,
    options: RetrievalRouter,
    needs: frozenset[Need],
    names: Sequence[str],
) -> list[str]:
    found = []
    if info.queries < options.min_group:
        found.append(f"{name} sums up {info.queries} queries; router.min_group asks for {options.min_group}")
    if "scatter" in needs and not info.second_moment and not _of_length_one(info, options):
        found.append(
            f"{name} publishes no second moment, which '{options.scorer}' needs where queries have any length; route "
            "with `scorer: centroid`"
        )
    if "pilots" in needs:
        found += _label_problems(name, "scores", info, options) or _column_problems(
            name, info.scores.experts if info.scores else (), names, options
        )
    if "utility" in needs:
        found += _label_problems(name, "utility", info, options) or _column_problems(
            name, info.utility.experts if info.utility else (), names, options
        )
    return found


def _label_problems(name: str, what: str, info: RetrievalInfo, options: RetrievalRouter) -> list[str]:
    made = info.scores if what == "scores" else info.utility
    if made is None:
        publish = "publish them (`coterie expert score`), or " if what == "scores" else ""
        return [
            f"{name} publishes no {what} of its queries, which '{options.scorer}' needs; {publish}route with "
            "`scorer: lda`"
        ]
    if (made.split, made.metric) != (options.label_split, options.label_metric):
        return [
            f"{name} made its {what} on '{made.split}' queries by '{made.metric}'; the router asks for "
            f"'{options.label_split}' by '{options.label_metric}' (label_split, label_metric)"
        ]
    return []


def _column_problems(
    name: str, columns: Sequence[str], names: Sequence[str], options: RetrievalRouter
) -> list[str]:
    lacking = [other for other in names if other not in columns]
    if not lacking:
        return []
    return [f"{name} did not score {', '.join(lacking)} on its queries, which '{options.scorer}' needs"]


def _state_problems(cards: Mapping[str, ExpertCard], infos: Mapping[str, RetrievalInfo]) -> list[str]:
    """All states must be of one layer, and no expert may change a layer below it."""
    without = [name for name, info in infos.items() if info.state is None]
    if without:
        return [
            f"{name} publishes no sums of layer states, which `route_on: layer_state` needs; route on the embedding"
            for name in without
        ]
    layers = {name: info.state.layer for name, info in infos.items() if info.state is not None}
    at = next(iter(layers.values()))
    other = [
        f"{name} summed its states at layer {layer}, {next(iter(layers))} at layer {at}"
        for name, layer in layers.items()
        if layer != at
    ]
    return other or [
        f"{name} changes layer {min(card.layers)}, below layer {at}, where the router decides; route on the embedding"
        for name, card in cards.items()
        if min(card.layers) < at
    ]
