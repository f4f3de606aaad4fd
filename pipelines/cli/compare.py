"""``coterie compare``: a composed folder beside the baselines made of the same experts, on the same text.

Knows how to name texts and print numbers; the baselines are in ``pipelines.baselines``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import (
    DeviceOption,
    DtypeOption,
    OptionError,
    dtype_name,
    note_if_alone,
    open_folder,
    quiet_transformers,
)
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import note, print_json, print_table
from pipelines.cli.progress import count_bar
from pipelines.cli.windows import (
    BatchSizeOption,
    DataOption,
    MaxTokensOption,
    SequenceLengthOption,
    domain_files,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.evaluate import Evaluation

__all__ = ["EXAMPLES", "compare_folder"]

EXAMPLES = examples(
    "coterie compare composed --data law=law.jsonl --data code=code.jsonl",
    "coterie compare composed --data law=law.jsonl --baseline soup --baseline btm --opt-out acme",
    "coterie compare composed --data law=law.jsonl --baseline btm --btm-top-k 1 --btm-temperature 2",
    "coterie compare composed --data law=law.jsonl --baseline weighted_soup --public news.txt --json",
)

_PUBLIC = ""
"""Stands for the public text among the domains, none of which can be called so."""
_PUBLIC_WINDOWS = 32
"""Windows of public text behind the weights of the weighted soup."""


def compare_folder(
    context: typer.Context,
    out: OutFolder,
    data: DataOption,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="Only this one: anchor, single, soup, weighted_soup, ties, dare_ties, btm, prompt_router, oracle, "
            "or one that a plug-in adds; may be given several times.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            "--public",
            metavar="FILE",
            help="Text that is nobody's, from which weighted_soup takes its weights.",
            show_default=False,
        ),
    ] = None,
    btm_top_k: Annotated[
        int | None,
        typer.Option(
            "--btm-top-k",
            min=1,
            metavar="N",
            help="Experts that btm mixes at a token, the likeliest so far; by default all.",
            show_default=False,
        ),
    ] = None,
    btm_temperature: Annotated[
        float | None,
        typer.Option(
            "--btm-temperature",
            metavar="T",
            help="Above 0: by how much btm flattens its weights; by default 1.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            min=1,
            metavar="N",
            help="Tokens from which prompt_router chooses, and which the base predicts; by default 32.",
            show_default=False,
        ),
    ] = None,
    opt_out: OptOutOption = None,
    sequence_length: SequenceLengthOption = 128,
    max_tokens: MaxTokensOption = 4096,
    batch_size: BatchSizeOption = 4,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a composed model beside its baselines.

    These are other ways to use the same experts, none of which trains anything: the anchor and each expert alone
    (single); their weights averaged (soup, weighted_soup) or merged by TIES and DARE; their predictions mixed by how
    well each predicted so far (btm); one expert a window, chosen from its beginning (prompt_router) or known to be
    the domain's (oracle, which looks at the name given to --data). Losses are in nats per token. Owners who are left
    out of the model are left out of every baseline.
    """
    files = domain_files(data)

    from pipelines.baselines import BASELINES

    for name in baseline or ():
        BASELINES[name]  # a typing mistake is reported before anything is loaded
    if baseline and "weighted_soup" in baseline and public is None:
        raise OptionError(
            "--baseline weighted_soup takes its weights from public text: give it with --public."
        )
    options = _options(
        baseline or (), btm_top_k, btm_temperature, prompt_tokens, sequence_length=sequence_length
    )

    from pipelines.baselines import BaselineContext, compare
    from pipelines.evaluate import measure, prepare, read_domains

    texts = read_domains({**files, **({_PUBLIC: public} if public else {})})
    store = open_registry(context, registry)
    with count_bar("Comparing", unit="tokens") as progress:
        with open_folder(out, opt_out=opt_out or (), registry=store, device=device, dtype=dtype) as (
            model,
            tokenizer,
        ):
            note_if_alone(model)
            weighed = texts.pop(_PUBLIC, None)
            windows = prepare(
                texts, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens or None
            )
            ids = _public_ids(weighed, tokenizer, sequence_length) if weighed else None
            arms = {"composed": measure(model, windows, batch_size=batch_size)}
            settings = {"device": str(model.device), "dtype": dtype_name(model)}
        del model  # the baselines have an anchor of their own
        with quiet_transformers():
            given = BaselineContext.from_composed(out, opt_out=opt_out or (), registry=store, **settings)
            _note_names(given.domains, files, baseline or tuple(BASELINES), btm_top_k)
            arms |= compare(
                given,
                windows,
                baselines=baseline or (),
                public=ids,
                options=options,
                batch_size=batch_size,
                progress=progress,
            )
    if as_json:
        print_json({arm: {**result.to_dict(), **_shown(arm, options)} for arm, result in arms.items()})
    else:
        _print(arms, files)


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "btm": {"top_k": None, "temperature": 1.0},
    "prompt_router": {"prompt_tokens": 32},
}
"""What the baselines do where no option is given."""


def _options(
    baselines: Collection[str],
    top_k: int | None,
    temperature: float | None,
    prompt_tokens: int | None,
    *,
    sequence_length: int,
) -> dict[str, dict[str, Any]]:
    """Return what was given by baseline, and refuse what would have no effect."""
    if temperature is not None and not 0 < temperature < math.inf:
        raise OptionError(f"--btm-temperature {temperature:g}: it must be a number above 0.")
    if prompt_tokens is not None and prompt_tokens >= sequence_length:
        raise OptionError(
            f"--prompt-tokens {prompt_tokens} covers windows of {sequence_length} tokens whole, so the base alone "
            "would predict them. Lower it, or raise --sequence-length."
        )
    options: dict[str, dict[str, Any]] = {}
    for flag, name, option, value in (
        ("--btm-top-k", "btm", "top_k", top_k),
        ("--btm-temperature", "btm", "temperature", temperature),
        ("--prompt-tokens", "prompt_router", "prompt_tokens", prompt_tokens),
    ):
        if value is None:
            continue
        if baselines and name not in baselines:
            raise OptionError(
                f"{flag} is for the baseline {name}, which is not measured. Add --baseline {name}."
            )
        options.setdefault(name, {})[option] = value
    return options


def _shown(arm: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"options": {**_DEFAULTS[arm], **options.get(arm, {})}} if arm in _DEFAULTS else {}


def _note_names(
    experts: Sequence[str], data: Collection[str], baselines: Collection[str], top_k: int | None
) -> None:
    """Say where a name or a number does less than it seems to."""
    if top_k is not None and top_k > len(experts):
        note(f"Note: --btm-top-k {top_k}: there are only {len(experts)} experts, and btm mixes all of them.")
    strangers = [domain for domain in data if domain not in experts]
    if strangers and "oracle" in baselines:
        known = ", ".join(experts) or "none"
        note(
            f"Note: no expert here has the domain {', '.join(strangers)} (known: {known}), so the oracle takes the "
            "base for its text."
        )


def _public_ids(documents: Sequence[str], tokenizer: Any, sequence_length: int) -> Tensor:
    from pipelines.evaluate import prepare

    limit = _PUBLIC_WINDOWS * sequence_length
    cut = prepare({_PUBLIC: documents}, tokenizer, sequence_length=sequence_length, max_tokens=limit)
    return cut[_PUBLIC].ids


def _print(arms: Mapping[str, Evaluation], domains: Mapping[str, Path]) -> None:
    headings = [*(domain.upper() for domain in domains), "MEAN"]
    print_table(
        [
            (
                arm,
                *(f"{result.domains[domain].nll:.3f}" for domain in domains),
                f"{result.mean_nll:.3f}",
            )
            for arm, result in arms.items()
        ],
        columns=("NLL", *headings),
        empty="No arm.",
        right=headings,
    )
