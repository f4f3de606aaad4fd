"""Speed of a composed model against the stock Mixture-of-Experts class of transformers with the same weights.

A Llama with FFN experts on every layer and learned rows is a Mixtral: the stock model shares the composed model's
very tensors, and their logits are compared before anything is timed. Runs take turns; a speed is the stock time
over the composed time, so 1 means as fast and more is faster.

The cost of a per-row opt-out is measured on a composition with two more owners whose rows never win: opting one
of them out in half of the rows and the other in the rest changes the set every row is routed with and none of the
arithmetic of the experts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _common import Aim, Report, Sample, arguments, ratio, times, working_folder

AIMS = (
    Aim(figure="prefill_vs_stock", bound=0.98, at_least=True),
    Aim(figure="decode_vs_stock", bound=0.98, at_least=True),
    Aim(figure="optout_overhead", bound=0.03),
)
KERNELS = ("grouped_mm", "eager")
OWNERS = tuple(f"owner-{number}" for number in range(1, 8))
BYSTANDERS = ("bystander-1", "bystander-2")
NEVER_WINS = -1e4
"""Router bias of the bystanders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is run.

    Attributes:
        batch: Rows.
        prompt: Positions of a prefill.
        prefills: Prefills in a round.
        steps: Tokens decoded one by one in a round.
        context: Positions before the first of them.
    """

    batch: int = 4
    prompt: int = 128
    prefills: int = 8
    steps: int = 48
    context: int = 16


def prepare(work: Path, *, tiny: bool) -> None:
    """Compose the FFNs of the owners, and of the owners and the bystanders."""
    from _models import Shape, make_checkpoints, register_ffn, register_public_rows, write_manifest

    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from registry import Registry

    # layers of SmolLM2-135M's size, the anchor of the demo
    real = Shape(hidden=576, layers=8, intermediate=1536, vocabulary=4096, heads=9)
    shape = Shape(hidden=32, layers=2, intermediate=48, vocabulary=64, heads=2) if tiny else real
    (checkpoint,) = make_checkpoints(work / "checkpoints", shape, count=1)
    registry = Registry(work / "registry")
    base = register_public_rows(registry, checkpoint, work)
    for seed, owner in enumerate((*OWNERS, *BYSTANDERS), start=1):
        bias = NEVER_WINS if owner in BYSTANDERS else None
        register_ffn(registry, f"{owner}/ffn", shape.ffn(seed), base=base, work=work, seed=seed, bias=bias)
    for name, owners in (("members", OWNERS), ("crowd", (*OWNERS, *BYSTANDERS))):
        path = write_manifest(work / f"{name}.yaml", [f"{owner}/ffn" for owner in owners])
        build(plan(Manifest.from_file(path), registry), work / name, registry=registry)


def stock_twin(composed: Any) -> Any:
    """Return a Mixtral that shares the composed model's tensors."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    base = composed.base
    given = base.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        given.pop(name, None)
    layers = base.model.layers
    config = MixtralConfig(
        **given,
        num_local_experts=layers[0].mlp.experts.num_experts,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    with torch.device("meta"):
        stock = MixtralForCausalLM(config)
    stock.model.rotary_emb = base.model.rotary_emb
    tensors = {name: tensor for name, tensor in base.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{number}.mlp"
        tensors[f"{prefix}.gate.weight"] = layer.mlp.router.scorer.rows.data
        for name in ("gate_up_proj", "down_proj"):
            tensors[f"{prefix}.experts.{name}"] = getattr(layer.mlp.experts, name).data
    stock.load_state_dict(tensors, assign=True)
    return stock.requires_grad_(False).eval()


def use_kernel(models: Sequence[Any], kernel: str) -> None:
    """Let the models run their experts with a kernel."""
    for model in models:
        model.config._experts_implementation = kernel


class Bench:
    """Runs prefill and decode.

    Args:
        report: Where every run is recorded.
        load: What is run.
        vocabulary: Number of token ids.
        clock: What the figures are made of, ``wall`` or ``cpu``.
    """

    def __init__(self, report: Report, load: Load, *, vocabulary: int, clock: str) -> None:
        import torch

        self.report = report
        self.load = load
        self.clock = clock
        generator = torch.Generator().manual_seed(0)
        length = load.prompt + load.context
        ids = torch.randint(vocabulary, (load.batch, length), generator=generator)
        self.prompt, self.context = ids[:, : load.prompt], ids[:, load.prompt :]

    def prefill(self, model: Any, **options: Any) -> Iterator[Sample]:
        """Run the prompt without a cache."""
        for _ in range(self.load.prefills):
            yield _timed(lambda: model(self.prompt, use_cache=False, **options))[1]

    def decode(self, model: Any, **options: Any) -> Iterator[Sample]:
        """Take greedy steps, one sample each, after a context that is not measured."""
        output = model(self.context, use_cache=True, **options)
        for _ in range(self.load.steps):
            ids = output.logits[:, -1:].argmax(-1)
            step = partial(model, ids, past_key_values=output.past_key_values, use_cache=True, **options)
            output, sample = _timed(step)
            yield sample

    def compare(
        self,
        work: Callable[..., Iterator[Sample]],
        arms: dict[str, tuple[Any, dict[str, Any]]],
        *,
        rounds: int,
    ) -> dict[str, list[float]]:
        """Let arms take turns after a warm-up; return their times.

        They alternate step by step: a shared machine is as fast for one as for the other only over so short a time.
        """
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds + 1):
            running = {arm: work(model, **options) for arm, (model, options) in arms.items()}
            samples: dict[str, list[Sample]] = {arm: [] for arm in arms}
            names = list(arms)
            while True:
                names.reverse()
                step = {arm: sample for arm in names if (sample := next(running[arm], None)) is not None}
                if not step:
                    break
                for arm, sample in step.items():
                    samples[arm].append(sample)
            for arm, mine in samples.items() if turn else ():
                seconds[arm] += times(mine, self.clock)
                self.report.run(arm, _total(mine))
        return seconds

    def against_stock(self, composed: Any, stock: Any, kernel: str, *, rounds: int) -> tuple[float, float]:
        """Return the composed model's speeds of prefill and decode, stock = 1."""
        use_kernel((composed, stock), kernel)
        check_equal(composed, stock, self.context, {}, {})
        speeds = []
        for name, work in (("prefill", self.prefill), ("decode", self.decode)):
            ours, theirs = f"{name}-composed-{kernel}", f"{name}-stock-{kernel}"
            seconds = self.compare(work, {ours: (composed, {}), theirs: (stock, {})}, rounds=rounds)
            speeds.append(ratio(seconds[theirs], seconds[ours]))
        return speeds[0], speeds[1]

    def opt_out(self, crowd: Any, *, rounds: int) -> tuple[float, float]:
        """Return what a per-row opt-out adds to prefill and decode, as a part of the time without."""
        half = self.load.batch // 2
        rows = [{BYSTANDERS[0]}] * half + [{BYSTANDERS[1]}] * (self.load.batch - half)
        check_equal(crowd, crowd, self.context, {}, {"opt_out": rows})
        added = []
        for name, work in (("prefill", self.prefill), ("decode", self.decode)):
            plain, masked = f"{name}-everybody", f"{name}-opt-out"
            arms = {plain: (crowd, {}), masked: (crowd, {"opt_out": rows})}
            seconds = self.compare(work, arms, rounds=rounds)
            added.append(ratio(seconds[masked], seconds[plain]) - 1.0)
        return added[0], added[1]


def _timed(job: Callable[[], Any]) -> tuple[Any, Sample]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = job()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return result, Sample(seconds=seconds, cpu_seconds=cpu_seconds, growth_mb=0.0, peak_mb=0.0)


def _total(samples: Sequence[Sample]) -> Sample:
    """Add up what one round took."""
    return Sample(
        seconds=sum(sample.seconds for sample in samples),
        cpu_seconds=sum(sample.cpu_seconds for sample in samples),
        growth_mb=0.0,
        peak_mb=0.0,
    )


def check_equal(ours: Any, theirs: Any, ids: Any, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Check that two models, or one under two sets of options, give the same logits.

    Raises:
        SystemExit: They do not, so a comparison of their speeds would say nothing.
    """
    difference = float((ours(ids, **a).logits - theirs(ids, **b).logits).abs().max())
    if difference > 1e-4:
        raise SystemExit(f"the logits differ by {difference:g}: not the same model")


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__, rounds=8).parse_args()
    import torch

    from composer.loading import load

    report = Report(name="forward", aims=AIMS)
    with working_folder(options.work) as work, torch.inference_mode():
        prepare(work, tiny=options.tiny)
        vocabulary = 64 if options.tiny else 4096
        amount = Load(batch=4, prompt=8, prefills=2, steps=2, context=4) if options.tiny else Load()
        bench = Bench(report, amount, vocabulary=vocabulary, clock=options.clock)
        composed = load(work / "members", dtype="float32")
        stock = stock_twin(composed)
        defaults = (composed.config._experts_implementation, stock.config._experts_implementation)
        report.machine["default_kernels"] = {"composed": defaults[0], "stock": defaults[1]}
        for kernel in KERNELS:
            default = kernel == defaults[1]
            rounds = options.rounds if default else max(1, options.rounds // 4)
            prefill, decode = bench.against_stock(composed, stock, kernel, rounds=rounds)
            suffix = "" if default else f"_{kernel}"
            report.figure(f"prefill_vs_stock{suffix}", prefill)
            report.figure(f"decode_vs_stock{suffix}", decode)
        del composed, stock
        gc.collect()
        crowd = load(work / "crowd", dtype="float32")
        prefill, decode = bench.opt_out(crowd, rounds=options.rounds)
        report.figure("optout_overhead", max(prefill, decode))
        report.figure("optout_overhead_prefill", prefill)
        report.figure("optout_overhead_decode", decode)
    report.write(options.out)


if __name__ == "__main__":
    main()
