"""Several baselines on the same windows, one after the other. Knows their names; makes each and lets it go again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experts.errors import ManifestError
from pipelines.baselines import BASELINES, make_baseline
from pipelines.baselines.arm import score
from pipelines.baselines.merge import PUBLIC

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.baselines.context import BaselineContext
    from pipelines.evaluate import DomainWindows, Evaluation

__all__ = ["compare"]

Progress = Callable[[int, int], None]
"""Called with the tokens done so far and in all, of all arms together."""


def compare(
    context: BaselineContext,
    windows: Mapping[str, DomainWindows],
    *,
    baselines: Iterable[str] = (),
    public: Tensor | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Measure baselines, with their default options unless others are given.

    Args:
        context: Anchor and experts.
        windows: By domain; the oracle sends each domain to the expert of the same name.
        baselines: Rows of `BASELINES`; none: all that can be made. ``single`` stands for every expert alone.
        public: Token ids int64 ``(windows, length)`` that ``weighted_soup`` takes its weights from.
        options: By baseline: the options of `pipelines.baselines.make_baseline`.
        batch_size: Windows run at once.
        progress: Told how many tokens are done.

    Returns:
        By arm; ``single`` gives ``expert:<domain>`` for each.

    Raises:
        UnknownNameError: There is no such baseline.
        ManifestError: ``weighted_soup`` is asked for without public text, or options for what is not measured.
    """
    chosen, given = _chosen(baselines, public), options or {}
    for name in given:
        if name not in chosen:
            raise ManifestError(f"Options for the baseline '{name}', which is not measured.")
    arms = dict(_arms(context, chosen, public))
    tokens = sum(domain.tokens for domain in windows.values())
    results: dict[str, Evaluation] = {}
    for number, (arm, (name, needed)) in enumerate(arms.items()):
        results[arm] = score(
            make_baseline(name, context, **{**needed, **given.get(name, {})}),
            windows,
            batch_size=batch_size,
            progress=progress and _shifted(progress, by=number * tokens, total=len(arms) * tokens),
        )
    return results


def _chosen(baselines: Iterable[str], public: Tensor | None) -> list[str]:
    names = list(dict.fromkeys(baselines))
    for name in names:
        BASELINES[name]  # raises for an unknown one
    if "weighted_soup" in names and public is None:
        raise ManifestError("The weighted soup is weighed on public text, and none is given. Give some.")
    return names or [name for name in BASELINES if name != "weighted_soup" or public is not None]


def _arms(
    context: BaselineContext, names: Iterable[str], public: Tensor | None
) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Name of each arm, and the baseline and options that make it."""
    for name in names:
        if name == "single":
            for domain in context.domains:
                yield f"expert:{domain}", (name, {"domain": domain})
        elif name == "weighted_soup":
            yield name, (name, {"validation": {PUBLIC: public}})
        else:
            yield name, (name, {})


def _shifted(progress: Progress, *, by: int, total: int) -> Progress:
    return lambda done, _: progress(by + done, total)
