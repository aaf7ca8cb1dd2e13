"""Ours beside the peers of today, on bags that fit a GPU as they are: seconds and peaks of a training step.

All methods train the same encoder from the same weights on the same bag, one after the other, each alone on the device.
Ours gets a share of native's peak as its budget. Where the bag fits, ours must cost nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from launch.benchmarks import peers
from launch.benchmarks.device_training import DoesNotFitError, Training, planned
from launch.benchmarks.gpu_run import GIB, Pooled, Run, normaliser, random_tiles
from launch.benchmarks.table import Bound

FITS_BOUND = 1.02  # seconds over native's where the whole fits
BUDGETS = (1.0, 0.9, 0.8, 0.7)  # of ours' share: what an allocator wastes is not planned
OURS, FITS = "ours", "ours, whole card"
STEPS = 3  # timed


@dataclass(frozen=True)
class Case:
    """One encoder and bag.

    Attributes:
        build: makes the encoder, without its head.
        shape: tiles and their side, px.
        share: the share of native's peak that ours may take.
        slower: seconds over native's, that ours may take; None where nothing is claimed.
        methods: names of `METHODS`.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int]
    share: float
    slower: float | None
    methods: tuple[str, ...]


Method = Callable[[nn.Module, Case, bool], peers.Forward]
METHODS: dict[str, Method] = {
    "native": lambda encoder, case, whole: peers.native(encoder),
    "torch checkpoint": lambda encoder, case, whole: peers.torch_checkpoint(encoder),
    "save_on_cpu": lambda encoder, case, whole: peers.save_on_cpu(encoder),
    "DeepSpeed cpu_checkpointing": lambda encoder, case, whole: peers.deepspeed_cpu_checkpointing(encoder),
    "Accelerate checkpointing offload": lambda encoder, case, whole: peers.accelerate_offload(encoder),
    "Transformers checkpointing": lambda encoder, case, whole: peers.transformers_checkpointing(encoder),
    "TRL offload": lambda encoder, case, whole: peers.trl_offload(encoder),
    "torch memory budget": lambda encoder, case, whole: peers.torch_memory_budget(
        encoder, case.share, "inductor" if whole else "aot_eager"
    ),
}
_ANY = tuple(name for name in METHODS if not name.startswith("Transformers"))


def cases(*, whole: bool) -> list[Case]:
    """What is measured, at full size or in seconds."""
    if whole:
        vit = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
        sizes, encoders, bag = {**vit, "image_size": 224, "patch_size": 16}, ("ViT-B", "ResNet-18"), (256, 224)
        builds = [partial(timm.create_model, name, num_classes=0) for name in ("vit_base_patch16_224", "resnet18")]
        tiles, image_bag = bag, (512, 256)
    else:
        vit = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 6, "intermediate_size": 256}
        sizes, encoders = {**vit, "image_size": 64, "patch_size": 8}, ("ViT of 6 blocks", "ResNet-18, narrow")
        vit_sizes = {"embed_dim": 64, "num_heads": 2, "depth": 6, "img_size": 64, "patch_size": 8}
        builds = [
            partial(timm.create_model, "vit_tiny_patch16_224", num_classes=0, **vit_sizes),
            partial(timm.create_model, "resnet18", num_classes=0, channels=(32,) * 4),
        ]
        tiles, image_bag = (32, 64), (64, 64)
    return [
        Case(encoders[0], builds[0], tiles, 0.42, 1.05, _ANY),
        Case(f"{encoders[1]}, train-mode BatchNorm", builds[1], image_bag, 0.25, 1.30, _ANY),
        Case(
            f"{encoders[0]} of Transformers",
            partial(peers.TransformersViT, **sizes),
            tiles,
            0.42,
            None,
            ("native", "Transformers checkpointing"),
        ),
    ]


def compare(run: Run, case: Case) -> None:
    """Measure a case's methods and ours; a row each, and the reason where one cannot run."""
    tiles = random_tiles(run.machine, *case.shape, host=False)
    label = f"{case.name}, {case.shape[0]} tiles"
    native: dict[str, Any] = {}
    ways: dict[str, Callable[[], tuple[Training, float]]] = {
        name: partial(_peer, run, case, tiles, METHODS[name]) for name in case.methods
    }
    if case.slower is not None:
        ways |= {OURS: lambda: _ours(run, case, tiles, native["peak_gib"]), FITS: lambda: _ours(run, case, tiles, None)}
    losses = run.notes.setdefault("peers: loss of the first step", {}).setdefault(label, {})
    for name, way in ways.items():
        run.need(20, f"{name} on {label}")
        try:
            training, losses[name] = way()
            seconds = median(training.step() for _ in range(STEPS if run.whole else 1))
        except (DoesNotFitError, ImportError, ValueError, RuntimeError) as error:
            run.skipped[f"peers: {label}: {name}"] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            compared = {"ratio": seconds / native["seconds"], "over": "native"} if native else {}
            if native:
                compared["peak_ratio"] = training.peak_bytes / GIB / native["peak_gib"]
            run.row(training, part="peers", case=label, mode=name, seconds=seconds, **compared)
            native = native or run.rows[-1]
            del training
        if not native:
            return  # there is nothing to compare with
        run.machine.rest(host=True)


def _model(run: Run, case: Case) -> Pooled:
    torch.manual_seed(0)
    encoder = case.build()
    features: Any = encoder.num_features
    return Pooled(encoder, features).train().to(run.machine.device)


def _peer(run: Run, case: Case, tiles: Tensor, method: Method) -> tuple[Training, float]:
    """A peer's training after its first step, and that one's loss."""
    model, prepare = _model(run, case), normaliser(run.machine)
    forward = method(model.encoder, case, run.whole)
    training = Training(run.machine, model, lambda: model.head(forward(prepare(tiles)).mean(0, keepdim=True)))
    return training, _first_loss(training)


def _first_loss(training: Training) -> float:
    training.count(2**62)
    training.step()
    loss = training.loss
    training.step()  # the optimizer's state is there from now on
    return loss


def _ours(run: Run, case: Case, tiles: Tensor, native_gib: float | None) -> tuple[Training, float]:
    """Ours after its first step, and that one's loss.

    Args:
        native_gib: native's peak, of which ours gets its share (at full size it must keep to it); None: the whole card.

    Raises:
        DoesNotFitError: no plan keeps to the share.
    """
    machine, prepare = run.machine, normaliser(run.machine)
    reason = "nothing was tried"
    for part in BUDGETS:
        model = _model(run, case)
        size = None if native_gib is None else int(case.share * native_gib * GIB)
        budget = None if size is None else max(1, int(part * size) - machine.resident(model))
        policy = PartitionPolicy(gpu_budget_bytes=budget)
        if size is not None and not run.whole:
            policy = PartitionPolicy(mode="stream", chunk_size=16)  # searching takes longer than all else
        try:
            plan = planned(machine, model.encoder, tuple(tiles.shape), policy, machine.dtype, run.rates)
            handle = partition_layers(model.encoder, plan, check=False)
            training = Training(machine, model, partial(model, tiles, prepare=prepare), handle, plan)
            loss = _first_loss(training)
            if size is None or training.peak_bytes <= size or not run.whole:
                return training, loss
            reason = f"a peak of {training.peak_bytes:,} bytes, the share is {size:,}"
        except DoesNotFitError as error:
            reason = str(error)
        machine.rest(host=True)
    raise DoesNotFitError(reason)


def bounds(run: Run) -> list[Bound]:
    """Ours against native, at full size: in small cases most bytes are parameters and their optimizer's state."""
    rows = {(row["case"], row["mode"]): row for row in run.rows if row["part"] == "peers"}
    made: list[Bound] = []
    for case in cases(whole=True) if run.whole else ():
        label = f"{case.name}, {case.shape[0]} tiles"
        if (label, "native") not in rows or case.slower is None:
            continue
        for mode, share, slower in ((OURS, case.share, case.slower), (FITS, 1.0, FITS_BOUND)):
            row = rows.get((label, mode), {"peak_ratio": math.inf, "ratio": math.inf})  # it did not keep to its share
            made.append(Bound(f"{label}, {mode}: peak over native's", row["peak_ratio"], share, at_most=True))
            made.append(Bound(f"{label}, {mode}: seconds over native's", row["ratio"], slower, at_most=True))
    return made
