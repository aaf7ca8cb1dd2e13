"""Gradient equivalence: the same model on the same bags in one plain process and on several ranks, step by step.

The protocol of Campanella et al., Figure 3: normalised L1 of the differences of parameters and gradients, of two
convolutions of the encoder and of the aggregator's classifier (and of all parameters together), and the difference of
the loss. The reference is plain PyTorch: one process, no engine, no exchange.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.bags.sampler import share_tiles
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.log import logger
from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags
from ds_wsi.tile_parallel import TileParallelPolicy, shard_tiles, tile_mesh
from ds_wsi.training.step import bag_weight
from launch.benchmarks.ranks import run_ranks
from launch.benchmarks.table import Bound, Result

LAYERS = {
    "small": ("encoder.0.conv1.weight", "encoder.1.conv2.weight", "aggregator.classifier.weight"),
    "resnet18": ("encoder.layer1.0.conv1.weight", "encoder.layer4.0.conv2.weight", "aggregator.classifier.weight"),
}
EXCHANGES = ("gather", "replicated", "sharded")
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
FLOAT64_ENGINES = ("ddp", "fsdp2")  # DeepSpeed refuses float64 gradients, or keeps float32 master weights
LEARNING_RATES = {"small": {"sgd": 1e-2, "adam": 1e-3}, "resnet18": {"sgd": 1e-3, "adam": 1e-4}}
TILE_PX = {"small": 16, "resnet18": 64}
LENGTHS = (13, 6, 9, 17, 5, 11, 8, 14)  # tiles of the bags
BAGS_PER_STEP = 2
LIMITS = {
    "float32": (1e-6, 1e-4),
    "float64": (1e-12, 1e-9),
}  # of the first gradients, of the parameters after all steps
COLORS = ("#3b6ea5", "#5aa469", "#c4713b")  # of the layers


@dataclass(frozen=True)
class Case:
    """One training run: ranks, how many of them share a bag, engine, exchange, optimizer and dtype."""

    world: int
    size: int
    engine: str
    exchange: str
    optimizer: str
    dtype: str
    encoder: str = "small"

    @property
    def reference(self) -> tuple[str, str, str]:
        """What its plain process depends on."""
        return self.encoder, self.optimizer, self.dtype


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Train every case and compare it, step by step, with the plain process.

    Args:
        quick: SGD and Adam at all engines, but "gather" and "replicated" under DDP and ZeRO-2 alone on four ranks.
        slides: not read.
        options: steps, and lists, comma-separated, of worlds, engines, exchanges, optimizers, dtypes.

    Raises:
        ValueError: an unknown option.
    """
    steps, cases = _cases(quick, options)
    references = {key: _reference(*key, steps) for key in {case.reference for case in cases}}
    rows, curves = [], {}
    for world in sorted({case.world for case in cases}):
        chosen = [case for case in cases if case.world == world]
        by_rank = run_ranks(_train_cases, world, chosen, steps)
        for index, case in enumerate(chosen):
            reference = references[case.reference]
            rank_curves = [_compared(ranks[index], reference) for ranks in by_rank]
            curve = {
                key: [max(values) for values in zip(*(one[key] for one in rank_curves), strict=True)]
                for key in rank_curves[0]
            }
            curves[case] = curve
            rows.append(_row(case, curve))
            logger.info("%s", ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    bounds = [bound for dtype in LIMITS for bound in _bounds(dtype, [row for row in rows if row["dtype"] == dtype])]
    floors = {
        encoder: max(_gradients(_compared(*(_reference(encoder, "sgd", dtype, 1) for dtype in LIMITS))))
        for encoder in sorted({case.encoder for case in cases})
    }
    notes = {
        **{
            "steps": steps,
            "layers": LAYERS,
            "tiles": list(LENGTHS),
            "tile_px": TILE_PX,
            "learning_rates": LEARNING_RATES,
            "threads_per_rank": 1,
        },
        "plain float32 from plain float64, first gradients": floors,
    }
    return Result("Gradient equivalence", rows, bounds, lambda figure: _draw(figure, curves), notes)


def _cases(quick: bool, options: Mapping[str, str]) -> tuple[int, list[Case]]:
    choices = {
        "worlds": ("1", "2", "4"),
        "engines": ENGINES,
        "exchanges": EXCHANGES,
        "optimizers": ("sgd", "adam"),
        "dtypes": tuple(LIMITS),
    }
    unknown = [name for name in options if name not in (*choices, "steps")]
    if unknown:
        raise ValueError(f"--option must be one of steps, {', '.join(choices)}, got {unknown[0]!r}")
    values = {name: tuple(options[name].split(",")) if name in options else choices[name] for name in choices}
    cases = []
    for world, engine, exchange, optimizer, dtype in product(*(values[name] for name in choices)):
        if dtype == "float64" and engine not in FLOAT64_ENGINES:
            continue
        if quick and exchange != "sharded" and not (world == "4" and engine in ("ddp", "zero2")):
            continue
        if world == "1" and exchange != "sharded":
            continue  # one rank exchanges nothing
        cases.append(Case(int(world), int(world), engine, exchange, optimizer, dtype))
        if world == "4" and exchange == "sharded" and engine in ("ddp", "zero3"):  # two groups of two
            cases.append(Case(4, 2, engine, exchange, optimizer, dtype))
        if world == "4" and exchange == "sharded" and engine == "ddp":
            cases.append(Case(4, 4, engine, exchange, optimizer, dtype, "resnet18"))
    return int(options.get("steps", 20)), cases


class Block(nn.Module):
    """A residual block that halves the side."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short, self.bn3 = nn.Conv2d(width, out, 1, 2, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, out, H / 2, W / 2] of maps [N, width, H, W]."""
        inside = self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))
        return F.silu(inside + self.bn3(self.short(x)))


def make_model(encoder: str, dtype: torch.dtype) -> SlideModel:
    """An encoder with train-mode BatchNorm, and gated attention.

    "small" has two residual blocks and six norms. "resnet18" is timm's, narrow: it shows how rounding grows with depth.
    At a kink (ReLU, maximum pooling) the last bit of a float32 decides which way a gradient goes, so both are smooth:
    with kinks plain PyTorch in float32 and in float64 part by 1e-3 within 20 steps (SGD, 1e-3), without any ranks.
    """
    torch.manual_seed(0)
    if encoder == "small":
        body = nn.Sequential(Block(3, 8), Block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return SlideModel(body, build_aggregator("gated_abmil", 16, 2)).to(dtype).train()
    options = {"act_layer": "silu", "zero_init_last": False}
    resnet = timm.create_model("resnet18", num_classes=0, channels=(16, 16, 32, 64), **options)
    resnet.maxpool = nn.AvgPool2d(3, 2, 1)
    return SlideModel(resnet, build_aggregator("gated_abmil", resnet.num_features, 2)).to(dtype).train()


def bags_of(step: int, dtype: torch.dtype, tile_px: int) -> list[tuple[Tensor, int]]:
    """Two bags, (tiles [N, 3, S, S], label), the same in every process."""
    bags = []
    for number in (2 * step, 2 * step + 1):
        generator = torch.Generator().manual_seed(number)
        count = LENGTHS[number % len(LENGTHS)]
        label = number % 2
        # Blobs of colour: tiles of noise would all look alike to a network, and divide its rounding by small variances.
        coarse = torch.randn(count, 3, 4, 4, dtype=torch.float64, generator=generator) + 0.3 * label
        tiles = F.interpolate(coarse, size=(tile_px, tile_px), mode="bicubic")
        bags.append((tiles.to(dtype), label))
    return bags


def _reference(encoder: str, optimizer: str, dtype: str, steps: int) -> list[dict[str, Any]]:
    kind = getattr(torch, dtype)
    model = make_model(encoder, kind)
    steppers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    plain_optimizer = steppers[optimizer](model.parameters(), lr=LEARNING_RATES[encoder][optimizer])
    records = []
    for step in range(steps):
        tiles, labels = zip(*bags_of(step, kind, TILE_PX[encoder]), strict=True)
        loss = F.cross_entropy(model(stack_bags(tiles)).logits, torch.tensor(labels))
        loss.backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        parameters = {name: part.detach().clone() for name, part in model.named_parameters()}
        records.append(_record(LAYERS[encoder], step, steps, float(loss.detach()), gradients, parameters))
    return records


def _record(
    layers: Sequence[str],
    step: int,
    steps: int,
    loss: float,
    gradients: dict[str, Tensor],
    parameters: dict[str, Tensor],
) -> dict[str, Any]:
    """What is compared of a step: chosen layers, and everything at the ends."""
    grads = gradients if step == 0 else {name: gradients[name] for name in layers}
    weights = parameters if step == steps - 1 else {name: parameters[name] for name in layers}
    return {"loss": loss, "gradients": grads, "parameters": weights}


def _train_cases(cases: Sequence[Case], steps: int) -> list[list[dict[str, Any]]]:
    logger.setLevel(logging.WARNING)
    return [_train(case, steps) for case in cases]


def _train(case: Case, steps: int) -> list[dict[str, Any]]:
    from ds_wsi.engines.accelerator.stepper import Stepper  # DeepSpeed is imported by ranks only

    kind = getattr(torch, case.dtype)
    model = make_model(case.encoder, kind)
    mesh = tile_mesh(case.size)
    shard_tiles(model, mesh, TileParallelPolicy(case.size, case.exchange))
    stepper = Stepper(case.engine, model, case.optimizer, LEARNING_RATES[case.encoder][case.optimizer])
    records = []
    for step in range(steps):
        bags = bags_of(step, kind, TILE_PX[case.encoder])
        if mesh.slide_size == 2:
            bags = bags[mesh.slide_rank :: 2]
        stretches = share_tiles([len(tiles) for tiles, _ in bags], [1.0] * mesh.tile_size)[mesh.tile_rank]
        shares = [tiles[start:stop] for (tiles, _), (start, stop) in zip(bags, stretches, strict=True)]
        stack: StackedBags = stack_bags(shares, allow_empty=True)
        labels = torch.tensor([label for _, label in bags])
        total = stack_loss(stepper.model(stack), labels)
        # Not `run_micro_step`: gradients are looked at after the backward, before the step.
        stepper.backward(total * bag_weight(BAGS_PER_STEP, mesh.slide_size, 1))
        gradients = stepper.gradients()
        stepper.step()
        loss = _mean_loss(total.detach(), mesh)
        records.append(_record(LAYERS[case.encoder], step, steps, loss, gradients, stepper.parameters()))
    return records


def _mean_loss(total: Tensor, mesh: Any) -> float:
    """Over the two bags of the step, from all groups."""
    import torch.distributed as dist

    summed = total.clone()
    dist.all_reduce(summed)
    return float(summed) / mesh.tile_size / BAGS_PER_STEP


def _compared(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Differences by step: of the gradients and parameters of each layer, of all at the ends, and of the loss."""
    curves: dict[str, list[float]] = {"loss": []}
    for trained, plain in zip(records, reference, strict=True):
        curves["loss"].append(abs(trained["loss"] - plain["loss"]))
        for what in ("gradients", "parameters"):
            for layer in dict.fromkeys(name for names in LAYERS.values() for name in names if name in plain[what]):
                value = _normalised([(trained[what][layer], plain[what][layer])])
                curves.setdefault(f"{what} {layer}", []).append(value)
    for what, record, other in (
        ("gradients all", records[0]["gradients"], reference[0]["gradients"]),
        ("parameters all", records[-1]["parameters"], reference[-1]["parameters"]),
    ):
        assert record.keys() == other.keys()
        curves[what] = [_normalised([(record[name], other[name]) for name in other])]
    return curves


def _normalised(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Sum of |a - b| over sum of |b|."""
    above = sum((value.double() - reference.double()).abs().sum().item() for value, reference in pairs)
    return above / sum(reference.double().abs().sum().item() for _, reference in pairs)


def _gradients(curve: dict[str, list[float]]) -> list[float]:
    """The gradients' differences of the first step, by layer and of all."""
    return [values[0] for key, values in curve.items() if key.startswith("gradients")]


def _row(case: Case, curve: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "ranks": case.world,
        "ranks per bag": case.size,
        "engine": case.engine,
        "encoder": case.encoder,
        "exchange": case.exchange,
        "optimizer": case.optimizer,
        "dtype": case.dtype,
        "gradients, first step": max(_gradients(curve)),
        "parameters, last step": max(curve[key][-1] for key in curve if key.startswith("parameters")),
        "loss, at most": max(curve["loss"]),
    }


def _bounds(dtype: str, rows: list[dict[str, Any]]) -> list[Bound]:
    rows = [row for row in rows if row["encoder"] == "small" or dtype == "float64"]
    if not rows:
        return []
    first, last = LIMITS[dtype]
    worst = [max(row[key] for row in rows) for key in ("gradients, first step", "parameters, last step")]
    return [
        Bound(
            f"{dtype}, {len(rows)} runs: gradients of the first step within {first:g}", worst[0], first, at_most=True
        ),
        Bound(f"{dtype}, {len(rows)} runs: parameters after the last within {last:g}", worst[1], last, at_most=True),
    ]


def _draw(figure: Figure, curves: dict[Case, dict[str, list[float]]]) -> None:
    """Gradients, parameters and loss by step: one line per layer and run on the most ranks."""
    most = max(case.world for case in curves)
    axes = figure.subplots(1, 3)
    layers = LAYERS["small"]
    for axis, what in zip(axes, ("gradients", "parameters", "loss"), strict=True):
        for case, curve in curves.items():
            if case.world != most or case.encoder != "small":
                continue
            style = "-" if case.optimizer == "sgd" else ":"
            lines = {"loss": "#444444"}
            if what != "loss":
                lines = {f"{what} {layer}": color for layer, color in zip(layers, COLORS, strict=True)}
            for key, color in lines.items():
                values = [value or math.nan for value in curve[key]]  # equal to the last bit: nothing to show
                axis.plot(
                    range(1, len(values) + 1), values, style, color=color, marker=".", markersize=2, linewidth=0.6
                )
        axis.set_yscale("log")
        axis.set_ylim(1e-18, 1e-3)
        axis.set_xlabel("step")
        axis.set_title(what)
    axes[0].set_ylabel("normalised L1 to one process (loss: absolute)")
    for layer, color in zip(layers, COLORS, strict=True):
        axes[0].plot([], [], color=color, label=layer.removesuffix(".weight"))
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(
        f"{most} ranks against one process; solid SGD, dotted Adam; float32 above, float64 below", fontsize=9
    )
