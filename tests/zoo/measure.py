"""One comparison: a partitioned copy of a module against the plain one, in float64, beside what rounding alone does.

The noise is what the plain module differs from itself when its tiles come in another order, or, if it draws, when the
last digit of its input is another. A result is exact where no tensor is further from the plain one than the model's
floor, 1e-9 of its size, or `FACTOR` times that tensor's own noise.
"""

import copy
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ds_wsi
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.graph.segments import tile_ranges

from .draws import SameDraws
from .entry import ZooModel
from .steps import Found, build, call, directions, distances, outputs, step, tile_input

CHUNK = 3  # of seven tiles: 3 + 2 + 2, no tile is left alone
BLOCK = 3  # rows of each segment's output in a block, on the spatial axis
ORDERS = {"batch": (1, 4), "spatial": (1,)}  # cyclic orders of the tiles, or images
FACTOR = 20.0
BLUR = 1e-5  # a plain module that differs from itself by more cannot show a fault
STEP = 1e-8  # of the differences along a direction that a drawn network's gradient is held against
SLOPE = 1e-4
EPSILON = 4e-16  # of the input: the noise of a network that draws
PACKAGE = str(Path(ds_wsi.__file__).parent)

STATUSES = ("exact", "refused", "wrong", "crashed", "timed out", "undecided", "not run")


@dataclass(frozen=True)
class Case:
    """What is compared.

    Args:
        model: the model's key in the zoo.
        axis: "batch" or "spatial".
        mode: the policy's.
        train: training mode, else evaluation mode.
        draws: whether the model has dropout and drop path.
    """

    model: str
    axis: str = "batch"
    mode: str = "lean"
    train: bool = True
    draws: bool = False

    @property
    def setting(self) -> tuple[str, bool, bool]:
        """Cases that share a plain module: axis, train, draws."""
        return self.axis, self.train, self.draws

    @property
    def key(self) -> str:
        """Unique in a file of results."""
        words = [self.model, self.axis, self.mode, "train" if self.train else "eval"]
        return " ".join([*words, "draws"] if self.draws else words)


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Args:
        status: one of `STATUSES`.
        detail: the worst tensor, the refusal's sentence, or the error and where it was raised.
        error: the worst tensor's, the largest difference over the largest value.
        noise: the largest noise of any tensor, in the same measure.
        seconds: CPU time of the partitioned step; the module's own check at its first call is in it.
        plain_seconds: CPU time of the plain step.
        norms: BatchNorm layers.
    """

    status: str
    detail: str = ""
    error: float = 0.0
    noise: float = 0.0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    norms: int = 0


@dataclass
class Reference:
    """The plain module of a setting, what its step gives, and its noise by tensor."""

    module: nn.Module
    x: Tensor
    keyword: str | None
    floor: float
    found: Found
    noise: dict[str, float]
    seconds: float
    draws: bool

    @property
    def norms(self) -> int:
        """How many BatchNorm layers it has."""
        return sum(isinstance(part, _BatchNorm) for part in self.module.modules())


def reference(model: ZooModel, axis: str, *, train: bool, draws: bool) -> Reference:
    """The plain module's step, and its noise.

    Raises:
        Exception: whatever the plain module raises.
    """
    module, x = build(model, train, draws), tile_input(model, axis)
    started = time.process_time()
    results = step(copy.deepcopy(module), x, model.keyword)
    seconds = time.process_time() - started
    torch.manual_seed(5)
    drawn = not torch.equal(results["generator"], torch.random.get_rng_state())  # type: ignore[arg-type]
    if drawn:  # another order of tiles is another draw
        signs = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
        others = [step(copy.deepcopy(module), x * (1 + EPSILON * signs), model.keyword)]
    else:
        others = [step(copy.deepcopy(module), x, model.keyword, order) for order in ORDERS[axis]]
    noise: dict[str, float] = {}
    for other in others:
        for name, size in distances(other, results):
            noise[name] = max(noise.get(name, 0.0), size)
    return Reference(module, x, model.keyword, model.floor, results, noise, seconds, drawn)


def measure(plain: Reference, axis: str, mode: str, longest: float = 120.0) -> Outcome:
    """Hold one mode against the plain module."""
    crossed = plain.norms if plain.module.training else 0
    predicted = plain.seconds * crossed * 0.6  # each norm is crossed from the input
    if mode == "recompute" and predicted > longest / 4:
        detail = f"it would recompute across {crossed} norms, for about {predicted:.0f} s"
        return Outcome("not run", detail, plain_seconds=plain.seconds, norms=plain.norms)
    return (_drawn if plain.draws else _fixed)(plain, axis, mode)


def partitioned(plain: Reference, axis: str, mode: str, chunk: int) -> nn.Module:
    """A partitioned copy of the plain module."""
    module = copy.deepcopy(plain.module)
    partition_layers(module, PartitionPolicy(mode=mode, axis=axis, chunk_size=chunk))
    return module


def _fixed(plain: Reference, axis: str, mode: str) -> Outcome:
    """A module without draws: its step, tensor by tensor."""
    return _guarded(plain, lambda: _held(plain, partitioned(plain, axis, mode, _size(axis)), plain.found, plain.noise))


def _drawn(plain: Reference, axis: str, mode: str) -> Outcome:
    """A module that draws.

    In one chunk it draws what the plain module draws: the steps are equal. Across norms mode "recompute" draws in
    another order, and so does any mode where the module has branches, which are computed level by level: that is no
    fault. In several chunks it draws chunk by chunk: without BatchNorm its step is the plain module's on each chunk in
    turn. With BatchNorm its step is the plain one where every tile has the same draw, and its gradient is that of its
    own draw, by differences along a direction.
    """
    couples = plain.module.training and plain.norms > 0

    def whole() -> Outcome:
        return _held(plain, partitioned(plain, axis, mode, 10**6), plain.found, plain.noise)

    def by_chunk() -> Outcome:
        expected = step(_ByChunk(copy.deepcopy(plain.module)), plain.x, plain.keyword)
        return _held(plain, partitioned(plain, axis, mode, _size(axis)), expected, plain.noise)

    def same_draws() -> Outcome:
        with SameDraws():
            expected = step(copy.deepcopy(plain.module), plain.x, plain.keyword)
            return _held(plain, partitioned(plain, axis, mode, _size(axis)), expected, plain.noise)

    def own_draw() -> Outcome:
        return _slope(plain, partitioned(plain, axis, mode, _size(axis)))

    parts = {"one chunk": whole, "the same draws for all": same_draws, "gradient of its own draw": own_draw}
    if not couples and axis == "batch":
        parts = {"one chunk": whole, "chunk by chunk": by_chunk}
    elif couples and mode == "recompute":
        del parts["one chunk"]
    outcome = Outcome("exact")
    for name, part in parts.items():
        result = _guarded(plain, part)
        if name == "one chunk" and couples and result.status == "wrong":
            continue  # another order of draws
        worst = max(result.error, outcome.error)
        outcome = replace(result, error=worst, seconds=result.seconds + outcome.seconds)
        if result.status != "exact":
            return replace(outcome, error=result.error, detail=f"{name}: {result.detail}")
    return outcome


def _chunks(x: Tensor) -> list[Tensor]:
    """The tiles, chunk by chunk, as a partition cuts them."""
    return [x[first:last] for first, last in tile_ranges((0, len(x)), CHUNK)]


class _ByChunk(nn.Module):
    """The plain module, chunk after chunk: what draws mean in a partition without norms to cross."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (key, x) = (None, args[0]) if args else next(iter(kwargs.items()))
        parts = [outputs(call(self.module, part, key)) for part in _chunks(x)]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_buffers(*args, **kwargs)


def _held(plain: Reference, module: nn.Module, expected: Found, noise: dict[str, float]) -> Outcome:
    """A module's step against what is expected of it."""
    started = time.process_time()
    results = step(module, plain.x, plain.keyword)
    seconds = time.process_time() - started
    sizes = dict(distances(results, expected))
    worst = max(sizes, key=lambda name: sizes[name] / max(plain.floor, FACTOR * noise.get(name, 0.0)))
    loud = max(noise, key=lambda name: noise[name]) if noise else ""
    outcome = Outcome("exact", worst, sizes[worst], noise.get(loud, 0.0), seconds)
    if sizes[worst] > max(plain.floor, FACTOR * noise.get(worst, 0.0)):
        return replace(outcome, status="wrong", detail=f"{worst}, of noise {noise.get(worst, 0.0):.1e}")
    if not torch.equal(torch.random.get_rng_state(), results["generator"]):  # type: ignore[arg-type]
        return replace(outcome, status="wrong", detail="backward does not leave the generator as forward left it")
    if outcome.noise > BLUR:
        return replace(outcome, status="undecided", detail=f"{loud}: the plain module differs from itself as much")
    return outcome


def _slope(plain: Reference, module: nn.Module) -> Outcome:
    """The gradient of a module's own draw against differences, and the plain module's as the noise."""
    started = time.process_time()
    error = _slope_error(module, plain.x, plain.keyword)
    seconds = time.process_time() - started
    noise = _slope_error(copy.deepcopy(plain.module), plain.x, plain.keyword)
    status = "undecided" if noise > SLOPE else "exact" if error <= SLOPE else "wrong"
    return Outcome(status, "gradient of its own draw, by differences", error, noise, seconds)


def _slope_error(module: nn.Module, x: Tensor, keyword: str | None) -> float:
    tensors = step(module, x, keyword)
    generator = torch.Generator().manual_seed(4)
    moved: list[tuple[Tensor, Tensor | None]] = [(x, tensors["input's gradient"])]
    moved += [(parameter, parameter.grad) for parameter in module.parameters()]
    lines = [
        torch.randn(tensor.shape, dtype=torch.float64, generator=generator) * tensor.detach().square().mean().sqrt()
        for tensor, _ in moved
    ]
    slope = sum((line * grad).sum().item() for line, (_, grad) in zip(lines, moved, strict=True) if grad is not None)
    values = []
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for sign in (1, -1):
        _move(moved, lines, sign * STEP)
        torch.manual_seed(5)
        # With gradients, as in the step: what needs none may be computed, and drawn, in another order.
        results = outputs(call(module, x, keyword))
        values.append(sum((out * grad).sum().item() for out, grad in zip(results, directions(results), strict=True)))
        _move(moved, lines, -sign * STEP)
        for name, buffer in module.named_buffers():
            buffer.copy_(state[name])
    measured = (values[0] - values[1]) / (2 * STEP)
    return abs(slope - measured) / max(abs(measured), 1e-30)


def _move(moved: list[tuple[Tensor, Tensor | None]], lines: list[Tensor], by: float) -> None:
    with torch.no_grad():
        for line, (tensor, _) in zip(lines, moved, strict=True):
            tensor.add_(line, alpha=by)


def _size(axis: str) -> int:
    return CHUNK if axis == "batch" else BLOCK


def _guarded(plain: Reference, run: Callable[[], Outcome]) -> Outcome:
    """A comparison whose errors are outcomes: a refusal is an error that the package raises with its rule."""
    try:
        outcome = run()
    except Exception as error:
        outcome = failure(error)
    return replace(outcome, plain_seconds=plain.seconds, norms=plain.norms)


def failure(error: BaseException) -> Outcome:
    """Refused where the package itself raised a sentence with "must"; crashed otherwise, with the place."""
    frames = traceback.extract_tb(error.__traceback__)
    package_frames = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    text = " ".join(str(error).split())
    # A refusal may wrap what the model's Python raised, but not a slip of the package's own.
    cause = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    slip = bool(cause) and cause[-1].filename.startswith(PACKAGE) and not isinstance(error.__cause__, ValueError)
    if package_frames and frames[-1].filename == package_frames[-1].filename and " must " in text and not slip:
        return Outcome("refused", text)
    where = f" at {Path(package_frames[-1].filename).name}:{package_frames[-1].lineno}" if package_frames else ""
    return Outcome("crashed", f"{type(error).__name__}: {text[:300]}{where}")


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries' warnings say nothing here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
