"""Speed of attention experts: a BAM with keys and values of its own per expert, against the BTX of the same models.

A BAM computes more than a BTX: every attention expert, for every token. How much more is arithmetic, which is printed
beside the times; ``decode_vs_flops`` is the decoding speed relative to BTX over the speed that the arithmetic
predicts, so 1 means that attention experts cost exactly what they compute. ``prefill_vs_btx`` is the speed of a
prefill, BTX = 1, and ``prefill_vs_flops`` the same over its prediction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import Aim, Report, arguments, ratio, working_folder
from forward import Bench, Load

AIMS = (Aim(figure="decode_vs_flops", bound=0.8, at_least=True),)
OWNERS = ("code", "law", "math")
EXPERTS = len(OWNERS) + 1
"""Three owners' models and the seed, as published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Floating-point operations of one token in one pass, two for each multiplication and addition.

    Attributes:
        attention: Projections of one attention.
        scores: Queries times keys and probabilities times values, over the positions before it.
        ffn: One FFN.
        router: One router.
        head: The output matrix.
        layers: Decoder layers.
    """

    attention: int
    scores: int
    ffn: int
    router: int
    head: int
    layers: int

    @property
    def btx(self) -> int:
        """One attention, one FFN and one router in every layer."""
        return self.layers * (self.attention + self.scores + self.ffn + self.router) + self.head

    @property
    def bam(self) -> int:
        """All attention experts, one FFN and two routers in every layer."""
        attention = EXPERTS * (self.attention + self.scores)
        return self.layers * (attention + self.ffn + 2 * self.router) + self.head


def count(config: Any, *, positions: float) -> Flops:
    """Count what a Llama computes for a token that sees so many positions."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    return Flops(
        attention=2 * (2 * d * d + 2 * d * kv),
        scores=int(2 * 2 * d * positions),
        ffn=2 * 3 * d * config.intermediate_size,
        router=2 * d * EXPERTS,
        head=2 * d * config.vocab_size,
        layers=config.num_hidden_layers,
    )


def prepare(work: Path, *, tiny: bool) -> None:
    """Register a seed and three dense models, and compose a BTX and a BAM of them, both top-1."""
    from _models import Shape, make_checkpoints

    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from registry import Registry

    real = Shape(hidden=1024, layers=4, intermediate=2048, vocabulary=4096, heads=8)
    shape = Shape(hidden=32, layers=2, intermediate=48, vocabulary=64, heads=2) if tiny else real
    seed, *models = make_checkpoints(work / "checkpoints", shape, count=EXPERTS)
    registry = Registry(work / "registry")
    base = registry.add_base(seed, name="seed")
    for owner, folder in zip(OWNERS, models, strict=True):
        _register(registry, f"{owner}/dense", folder, base, work)
    for recipe, upcycle in (("btx", {}), ("bam", {"attention": {"kv": "own"}})):
        manifest = Manifest.from_dict(
            {
                "name": recipe,
                "recipe": recipe,
                "base": "seed",
                "experts": [f"{owner}/dense" for owner in OWNERS],
                "router": {"top_k": 1, "normalize": False},
                "upcycle": {"trunk": "frozen", **upcycle},
            }
        )
        build(plan(manifest, registry), work / recipe, registry=registry)


def _register(registry: Any, name: str, folder: Path, base: Any, work: Path) -> None:
    from experts.card import BaseRef
    from experts.package import pack

    staging = work / "packed" / name
    staging.parent.mkdir(parents=True, exist_ok=True)
    pack(
        folder,
        staging,
        name=name,
        version=1,
        domain=name.partition("/")[0],
        license="Apache-2.0",
        base=base.description,
        base_ref=BaseRef(
            name=base.name,
            fingerprint=base.fingerprint,
            tokenizer_fingerprint=base.tokenizer_fingerprint,
        ),
    )
    registry.register(staging)


def show(what: str, flops: Flops) -> float:
    """Print the arithmetic of one comparison; return the predicted speed of BAM, BTX = 1."""
    parts = asdict(flops)
    layers = parts.pop("layers")
    print(f"{what}, FLOPs per token: " + ", ".join(f"{name} {value:,}" for name, value in parts.items()))
    print(f"  BTX {layers} x (attention + scores + ffn + router) + head = {flops.btx:,}")
    print(f"  BAM {layers} x ({EXPERTS} x (attention + scores) + ffn + 2 x router) + head = {flops.bam:,}")
    predicted = flops.btx / flops.bam
    print(f"  predicted speed of BAM, BTX = 1: {predicted:.3f}")
    return predicted


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__, rounds=8).parse_args()
    import torch

    from composer.loading import load

    report = Report(name="bam", aims=AIMS)
    amount = Load(batch=1, prompt=8, prefills=2, steps=2, context=4)
    if not options.tiny:
        amount = Load(batch=1, prompt=256, prefills=4, steps=32, context=256)
    with working_folder(options.work) as work, torch.inference_mode():
        prepare(work, tiny=options.tiny)
        btx, bam = (load(work / recipe, dtype="float32") for recipe in ("btx", "bam"))
        config = btx.base.config
        bench = Bench(report, amount, vocabulary=config.vocab_size, clock=options.clock)
        arms: dict[str, tuple[Any, dict[str, Any]]] = {"btx": (btx, {}), "bam": (bam, {})}
        jobs = (
            ("decode", bench.decode, amount.context + amount.steps / 2),
            ("prefill", bench.prefill, amount.prompt / 2),
        )
        for name, work_of, positions in jobs:
            predicted = show(name, count(config, positions=positions))
            seconds = bench.compare(
                work_of, {f"{name}-{arm}": model for arm, model in arms.items()}, rounds=options.rounds
            )
            speed = ratio(seconds[f"{name}-btx"], seconds[f"{name}-bam"])
            report.figure(f"{name}_vs_btx", speed)
            report.figure(f"{name}_vs_flops", speed / predicted)
    report.write(options.out)


if __name__ == "__main__":
    main()
