"""Measures a causal language model on texts of several domains: loss, bits per byte, speed, and who was routed to.

Knows windows of tokens and any model of transformers, composed or not; knows nothing of files' meaning or of how
the model was made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composer.optout import owner_names
from experts.errors import DataError
from pipelines.train.windows import make_windows, read_documents

__all__ = [
    "DomainScore",
    "DomainWindows",
    "Evaluation",
    "evaluate",
    "leave_one_out",
    "measure",
    "prepare",
    "read_domains",
]

Progress = Callable[[int, int], None]
"""Called with the tokens done so far and in all."""

Run = Callable[[str, slice, Tensor], Tensor]
"""Given a domain, which of its windows, and their ids ``(batch, length)``: logits ``(batch, length, vocabulary)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainWindows:
    """What is measured of one domain.

    Attributes:
        ids: int64 ``(windows, length)``.
        text_bytes: UTF-8 bytes of the text that the predicted tokens stand for.
    """

    ids: Tensor
    text_bytes: int

    @property
    def tokens(self) -> int:
        """Predicted tokens: all but the first of every window."""
        return len(self.ids) * (self.ids.shape[1] - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScore:
    """One model on one domain.

    Attributes:
        nll: Mean negative log-likelihood, nats per token.
        bits_per_byte: The same sum in bits, per byte of text: comparable between tokenizers and domains.
        tokens: Tokens predicted.
        seconds: Time it took.
        routing: Share of the routed weight of ``anchor`` and of each owner; empty for a plain model.
        sent: Share of the tokens that are sent to ``anchor`` and to each owner, that is, whose largest weight is
            theirs; empty for a plain model. See `composer.trace.RoutingTrace.sent`.
        load: Share of the tokens that use ``anchor`` and each expert at all; empty for a plain model.
        router_entropy: Mean entropy of the router's distribution over the allowed experts, in nats, before
            selection; None for a plain model. See `composer.trace.RoutingTrace.entropy`.
    """

    nll: float
    bits_per_byte: float
    tokens: int
    seconds: float
    routing: Mapping[str, float]
    sent: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[str, float] = field(default_factory=dict)
    router_entropy: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens predicted in a second."""
        return self.tokens / self.seconds if self.seconds else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model, with the same owners left out, on every domain.

    Attributes:
        opt_out: Owners left out by request, sorted.
        domains: Score by domain.
    """

    opt_out: tuple[str, ...]
    domains: Mapping[str, DomainScore]

    @property
    def mean_nll(self) -> float:
        """Mean over the domains, each counted once, in nats per token."""
        return fmean(score.nll for score in self.domains.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        domains = {
            name: {**asdict(score), "tokens_per_second": score.tokens_per_second}
            for name, score in self.domains.items()
        }
        return {"opt_out": list(self.opt_out), "mean_nll": self.mean_nll, "domains": domains}


def read_domains(files: Mapping[str, Path | Sequence[Path]]) -> dict[str, list[str]]:
    """Read the documents of each domain from ``.jsonl`` (one ``{"text": ...}`` a line) or ``.txt`` files.

    Raises:
        DataError: A file is missing or is not in one of these forms; the message names the file and the line.
    """
    domains = {}
    for name, given in files.items():
        paths = [given] if isinstance(given, Path) else list(given)
        for path in paths:
            if path.suffix not in (".jsonl", ".txt"):
                raise DataError(
                    f"'{path}' is neither .jsonl nor .txt. Give a .jsonl file with {{\"text\": ...}} on every line, "
                    "or a .txt file that is one document."
                )
        domains[name] = read_documents(paths)
    return domains


def prepare(
    data: Mapping[str, Sequence[str]],
    tokenizer: Any,
    *,
    sequence_length: int = 128,
    max_tokens: int | None = 4096,
    seed: int = 0,
) -> dict[str, DomainWindows]:
    """Cut each domain's documents into windows; the same arguments give the same windows.

    Args:
        data: Documents by domain.
        tokenizer: The model's.
        sequence_length: Tokens in a window.
        max_tokens: At most about this many tokens of a domain, from all over its documents; None: all.
        seed: Decides which.

    Raises:
        DataError: There is no domain, or one does not fill a window.
    """
    if not data:
        raise DataError("There is no domain to evaluate on. Give at least one, such as law=law.jsonl.")
    limit = sys.maxsize if max_tokens is None else max(1, max_tokens // sequence_length)
    prepared = {}
    for name, documents in data.items():
        windows = make_windows(
            documents,
            tokenizer,
            sequence_length=sequence_length,
            limit=limit,
            seed=seed,
            what=f"the text of '{name}'",
        )
        ids = torch.from_numpy(windows.ids).long()
        texts = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
        prepared[name] = DomainWindows(ids=ids, text_bytes=sum(len(text.encode()) for text in texts))
    return prepared


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Mapping[str, Sequence[str]],
    *,
    sequence_length: int = 128,
    batch_size: int = 4,
    max_tokens: int | None = 4096,
    opt_out: Collection[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on every domain.

    Args:
        model: A causal LM, composed or not, in eval mode, on any device.
        tokenizer: Its tokenizer.
        data: Documents by domain.
        sequence_length: Tokens in a window; each window is predicted from its own beginning.
        batch_size: Windows run at once. Logits take batch x length x vocabulary x 4 bytes.
        max_tokens: At most about this many tokens of a domain; None: all.
        opt_out: Owners left out by request; a composed model only.
        seed: Decides which windows are taken where there are more.
        progress: Told how many tokens are done.

    Raises:
        DataError: There is no domain, or one does not fill a window.
        OptOutError: ``opt_out`` is no collection of names.
        UnknownNameError: It names somebody who is not in the composition.
    """
    windows = prepare(data, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens, seed=seed)
    return measure(model, windows, batch_size=batch_size, opt_out=opt_out, progress=progress)


def leave_one_out(
    model: nn.Module,
    tokenizer: Any,
    data: Mapping[str, Sequence[str]],
    *,
    sequence_length: int = 128,
    batch_size: int = 4,
    max_tokens: int | None = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Measure a composed model whole and with each owner left out by request, on the same windows.

    Returns:
        ``composed`` and ``composed-without:<owner>`` for every owner, as `evaluate` gives them.

    Raises:
        DataError: There is no domain, one does not fill a window, or the model has no owners.
    """
    owners: tuple[str, ...] = getattr(model, "owners", ())
    if not owners:
        raise DataError("Leaving one out needs a composed model with owners; this one has none.")
    windows = prepare(data, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens, seed=seed)
    total = sum(domain.tokens for domain in windows.values()) * (len(owners) + 1)
    arms: dict[str, tuple[str, ...]] = {"composed": ()}
    arms |= {f"composed-without:{owner}": (owner,) for owner in owners}
    results: dict[str, Evaluation] = {}
    for arm, left_out in arms.items():
        done = sum(score.tokens for result in results.values() for score in result.domains.values())
        results[arm] = measure(
            model,
            windows,
            batch_size=batch_size,
            opt_out=left_out,
            progress=progress and _shifted(progress, by=done, total=total),
        )
    return results


def _shifted(progress: Progress, *, by: int, total: int) -> Progress:
    return lambda done, _: progress(by + done, total)


def measure(
    model: nn.Module,
    windows: Mapping[str, DomainWindows],
    *,
    batch_size: int = 4,
    opt_out: Collection[str] = (),
    run: Run | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on windows that `prepare` cut.

    Args:
        model: A causal LM in eval mode.
        windows: By domain.
        batch_size: Windows run at once.
        opt_out: Owners left out by request; a composed model only.
        run: Gives the logits in another way, for instance from stored states of layers that several models share.
        progress: Told how many tokens are done.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
        UnknownNameError: It names somebody who is not in the composition.
    """
    opt_out = owner_names(opt_out)
    total = sum(domain.tokens for domain in windows.values())
    done = 0
    domains = {}
    for name, domain in windows.items():
        with _trace(model) as trace:
            started, nll = perf_counter(), 0.0
            for start in range(0, len(domain.ids), batch_size):
                part = slice(start, start + batch_size)
                ids = domain.ids[part]
                with torch.inference_mode():
                    logits = _logits(model, ids, opt_out) if run is None else run(name, part, ids)
                    nll += float(_summed_nll(logits, ids))
                done += len(ids) * (ids.shape[1] - 1)
                if progress is not None:
                    progress(done, total)
            seconds = perf_counter() - started
        domains[name] = DomainScore(
            nll=nll / domain.tokens,
            bits_per_byte=nll / math.log(2) / domain.text_bytes if domain.text_bytes else math.nan,
            tokens=domain.tokens,
            seconds=seconds,
            **_routing_of(trace),
        )
    return Evaluation(opt_out=tuple(sorted(opt_out)), domains=domains)


def _trace(model: nn.Module) -> Any:
    """A recorder of the routing, or nothing for a plain model."""
    if not hasattr(model, "owners_of_experts"):
        return nullcontext()
    from composer.trace import RoutingTrace

    return RoutingTrace(model)  # type: ignore[arg-type]


def _routing_of(trace: Any) -> dict[str, Any]:
    """What a recorder says about a domain."""
    if trace is None:
        return {"routing": {}}
    return {
        "routing": trace.mass(),
        "sent": trace.sent(),
        "load": trace.load(),
        "router_entropy": trace.entropy(),
    }


def _logits(model: nn.Module, ids: Tensor, opt_out: Collection[str]) -> Tensor:
    parameter = next(model.parameters())
    kwargs = {"opt_out": set(opt_out)} if opt_out else {}
    output = model(input_ids=ids.to(parameter.device), use_cache=False, **kwargs)
    logits: Tensor = output.logits
    return logits


def _summed_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over the windows of ``-log p(id[t+1] | id[..t])``, in float32; window by window, to save memory."""
    targets = ids[:, 1:].to(logits.device)
    losses = [
        F.cross_entropy(predicted[:-1].float(), target, reduction="sum")
        for predicted, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).sum()
