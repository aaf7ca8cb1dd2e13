"""The check at the first call: the partition gives what the module gives, or says which part of it stands in the way.

A few tiles of the call go through the module alone and through the partition, forward and backward, from the same
beginning. What may differ is rounding: up to 1000 eps, or 50 times what the opposite order of the tiles changes, and
where that is exceeded in float32 it must be so in float64 too. The module is as before afterwards, and so is every
generator: a run is the same with and without.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.arguments import Arguments
from ds_wsi.partition.mixing import Mixing, find_mixing, has_known_forward
from ds_wsi.partition.observed import SameDraws
from ds_wsi.partition.plan import PartitionPlan, SegmentPlan
from ds_wsi.partition.restored import Restored, plain_attributes
from ds_wsi.partition.trace import needs_batch_statistics, needs_image_statistics
from ds_wsi.partition.trials import INPUT_AFTER, Outcome, Trials, differences, distance, state_differences
from ds_wsi.partition.values import Prepare, prepared
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.numerics import autocast_dtype

TILES = (5, 4, 6, 8)  # the first number that the module takes; an odd one is no whole number of pairs
CHUNKS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 3, 6: 5, 8: 5}  # tiles of the first of two chunks
MANY_LEVELS = 20  # of norms: "recompute" computes each of them from the input
_IMAGE = (96, 64)  # rows and columns at most of the images on the spatial axis
_ROW_BLOCKS = 4
_NOISE = 50


class CheckFailed(ValueError):
    """A module that the partition would not compute as it is."""


@dataclass(frozen=True)
class Case:
    """What one check is about.

    Args:
        module: partitioned.
        original: its own forward.
        partitioned: makes its forward of a plan.
        plan: of the call.
        arguments: beside the tiles.
        device: of the computation.
        backward: whether the call saves for one.
        input_grad: whether a gradient reaches the tiles.
    """

    module: nn.Module
    original: Callable[..., Any]
    partitioned: Callable[[PartitionPlan], Callable[..., Any]]
    plan: PartitionPlan
    arguments: Arguments
    device: torch.device
    backward: bool
    input_grad: bool

    @property
    def owner(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    @property
    def by_tile(self) -> bool:
        """Whether chunks are tiles."""
        return self.plan.axis == "batch"

    def key(self, tiles: Tensor) -> int:
        """Equal for calls of which one check is enough."""
        parts = tuple(
            (
                *(id(part), type(part), id(getattr(part.forward, "__func__", part.forward))),
                tuple((name, type(value), value) for name, value in plain_attributes(part)),
                tuple((name, p is not None and p.requires_grad) for name, p in part._parameters.items()),
            )
            for part in self.module.modules()
        )
        kind = str(tiles.dtype), str(autocast_dtype(self.device)), str(self.device), tuple(tiles.shape[1:])
        modes = self.plan.axis, *sorted({part.mode for part in self.plan.segments})
        return hash((id(self.original), parts, kind, modes, self.arguments.key, self.backward, self.input_grad))


class FirstCalls:
    """The calls of one partitioned module that were checked."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # key -> tiles that were checked
        self._lock = threading.RLock()

    def check(self, case: Case, x: Tensor, prepare: Prepare | None) -> None:
        """Check a call whose like was not seen yet, before it runs.

        Args:
            case: of the call.
            x: its tiles, or images, on the module's device or on the host.
            prepare: applied to them first.

        Raises:
            ValueError: the partition would not give what the module gives; names the part.
        """
        if not len(x):
            return
        count = tiles_that_fit(case.plan, len(x)) if case.by_tile else min(2, len(x))
        with self._lock:
            key = case.key(x)
            if count <= self._seen.get(key, 0):
                return
            if count == 0:
                logger.debug("partition check: %s is not checked, a tile does not fit the budget twice", case.owner)
            else:
                self._within_memory(case, x, prepare, count)
            self._seen[key] = max(1, count)

    def _within_memory(self, case: Case, x: Tensor, prepare: Prepare | None, count: int) -> None:
        while count:
            try:
                sample = sample_of(case, x, count, prepare)
                reason = check_case(case, sample)
            except torch.OutOfMemoryError:
                reason = "the device's memory does not hold it"
                count //= 2
                continue
            break
        if reason:
            logger.debug("partition check: %s is not checked: %s", case.owner, reason)
        else:
            logger.debug("partition check: %s is exact in %s", case.owner, _modes(case.plan))


def check_case(case: Case, sample: Tensor) -> str:
    """Compare the module with its partition on a few tiles.

    Args:
        case: what is compared.
        sample: tiles [n, ...] on the device, of which 4, 6 or 8 may be taken where the module does not take 5.

    Returns:
        Why nothing could be said; "" where the partition is exact.

    Raises:
        ValueError: it is not; names the part.
    """
    with _quietly(case.device):
        own, wide = _dtype(case, sample), torch.float64
        reason, refusal = _judge(case, sample, own)
        if refusal is None or own == wide:
            if refusal is not None:
                raise CheckFailed(refusal)
            return reason
        # A refusal ends a run: rounding must not be its reason.
        unknown, confirmed = _judge(case, sample, wide)
        if unknown:
            raise CheckFailed(refusal)
        if confirmed is not None:
            raise CheckFailed(confirmed)
        logger.debug("partition check: %s differs in %s by rounding alone: %s", case.owner, own, refusal)
        return ""


def _judge(case: Case, sample: Tensor, dtype: torch.dtype) -> tuple[str, str | None]:
    """(Why nothing can be said, or ""; why the module is refused, or None)."""
    reason = ""
    for count in (n for n in ((len(sample),) if len(sample) < TILES[0] or not case.by_tile else TILES)):
        tiles = sample[:count]
        if len(tiles) < count:
            break
        with Restored(case.module, case.device, dtype) as held:
            tiles = tiles.to(dtype) if tiles.is_floating_point() else tiles
            try:
                verdict = _Verdict(case, held, tiles)
            except CheckFailed:
                raise
            except ValueError as error:
                if "must have tiles on its first axis" in str(error):
                    raise CheckFailed(str(error)) from error
                reason = f"{type(error).__name__}: {error}"
                continue
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the module alone does not take these tiles; the call itself will tell
                reason = f"{type(error).__name__}: {error}"
                continue
            return verdict.conclude()
    return reason or "it takes none of the numbers of tiles that were tried", None


class _Verdict:
    """The runs of one check in one dtype, and what they say."""

    def __init__(self, case: Case, held: Restored, tiles: Tensor) -> None:
        self.case, self.held, self.tiles = case, held, tiles
        self.names = {name: type(part).__name__ for part, name in held.names.items()}
        self.eps = torch.finfo(tiles.dtype if tiles.is_floating_point() else torch.get_default_dtype()).eps
        for parameter in case.module.parameters():
            if parameter.is_floating_point():
                self.eps = max(self.eps, torch.finfo(parameter.dtype).eps)
        self.floor = max(1e3 * self.eps, 1e-9)
        self.ceiling = max(4e4 * self.eps, 1e-5)  # no noise excuses more: the order of tiles may be what matters
        self.start = {name: tensor.clone() for name, tensor in held.tensors().items()}
        self.attributes = held.attributes()
        levels = sum(_is_level(part, case.plan.axis) for part in held.names)
        many = self.many = case.backward and levels > MANY_LEVELS and "recompute" in _modes(case.plan)
        self.trials = Trials(
            held,
            case.original,
            lambda chunk: case.partitioned(_with_chunks(case.plan, chunk, tiles, many=many)),  # no reference to self
            case.arguments,
            tiles,
            case.backward,
            case.input_grad,
            case.by_tile,
        )
        self.plain = self.trials.plain()

    def conclude(self) -> tuple[str, str | None]:
        """(Why nothing can be said, or ""; why the module is refused, or None)."""
        changed = self._counted()
        if changed is not None:
            return "", changed
        drawn = bool(self.plain.moved)
        count = len(self.tiles)
        if not self.case.by_tile:
            chunk = max(1, self.tiles.shape[2] // _ROW_BLOCKS)
        else:
            chunk = count if drawn else CHUNKS.get(count, 1)
        try:
            found = self._partition(chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the call itself would raise it, unless the number of tiles is the reason
            return self._raised(error, chunk)
        refusal = self._compared(found, drawn=drawn)
        if refusal is None and self.case.by_tile and drawn and count > 1:
            refusal = self._independent() or self._written_by_chunk()
        if refusal is None and self.many:
            refusal = self._forward_alone(chunk)
        return "", refusal

    def _partition(self, chunk: int) -> Outcome:
        """One run; a second where the module changes what it holds: what the trace drew and wrote is done by then."""
        found = self.trials.partition(chunk)
        written = any(
            name in self.plain.state and distance(self.start[name].cpu(), self.plain.state[name])
            for name in self.start
            if not _is_statistic(self.held, name)
        )
        if written or any(self.plain.moved) or self.plain.attributes != self.attributes:
            found = self.trials.partition(chunk)
        return found

    # ---------------------------------------------------------------------------------------- comparisons

    def _compared(self, found: Outcome, *, drawn: bool) -> str | None:
        """The sentence for what differs between the module alone and the partition."""
        outside = [name for name in self.plain.moved if name]
        far, apart = self._far(self.plain, found, noise=not drawn)
        same_draws = found.marks == self.plain.marks
        if (far or apart) and drawn and not outside:
            # The partition may draw in another order: let the order not matter.
            with SameDraws():
                plain = self.trials.plain()
                again = self.trials.partition(self._undivided_chunk())
            far, apart = self._far(plain, again, noise=False)
        if outside and (far or apart or not same_draws):
            kind = "a generator of its own" if outside[0] not in ("numpy.random", "random") else outside[0]
            return f"{self._who(_place(outside[0]))} must draw from torch's default generators, got {kind}."
        counted = self._attributes_differ(found)
        if counted is not None:
            return counted
        if far or apart:
            return self._explained(far, apart)
        if not same_draws:
            return (
                f"a partitioned {self.case.owner} must draw as often as alone, got generators that moved otherwise. "
                'HINT: mode "keep" draws once.'
            )
        return None

    def _far(self, plain: Outcome, found: Outcome, *, noise: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Values and state, and outputs of sub-modules, that are further apart than rounding."""
        buffers = {f"buffer {k!r}": v for k, v in state_differences(plain, found, self.start).items()}
        gaps = differences(plain, found) | buffers
        apart = dict(self.trials.apart)
        far = {name: gap for name, gap in gaps.items() if not gap <= self.floor}
        apart = {name: gap for name, gap in apart.items() if not gap <= self.floor}
        if (far or apart) and noise and self.case.by_tile and len(self.tiles) > 1:
            other = self.trials.reversed()
            noises, inside = differences(plain, other), self.trials.apart
            far = {name: gap for name, gap in far.items() if not gap <= self._tolerance(noises.get(name, 0.0))}
            apart = {name: gap for name, gap in apart.items() if not gap <= self._tolerance(inside.get(name, 0.0))}
        return far, apart

    def _tolerance(self, noise: float) -> float:
        return max(self.floor, min(self.ceiling, _NOISE * noise))

    def _independent(self) -> str | None:
        """For modules that draw: other tiles, the same draws."""
        if any(needs_batch_statistics(part) and not has_known_forward(part) for part in self.held.names):
            return None
        mixing = self._mixing()
        return None if mixing is None else self._mixes(mixing)

    def _written_by_chunk(self) -> str | None:
        """For modules that draw: buffers that do not hang on the draws, in two chunks."""
        mine = {name for name in self.start if not _is_statistic(self.held, name)}
        if all(torch.equal(self.plain.state[name], self.start[name].cpu()) for name in mine & self.plain.state.keys()):
            return None
        with SameDraws():
            plain = self.trials.plain()
            found = self.trials.partition(CHUNKS.get(len(self.tiles), 1))
        gaps = state_differences(plain, found, {name: self.start[name] for name in mine})
        return self._writes({name: gap for name, gap in gaps.items() if not gap <= self.floor})

    def _forward_alone(self, chunk: int) -> str | None:
        """The plan's own modes, forward only, where backward was checked in "lean"."""
        trials = replace(
            self.trials,
            partitioned=lambda size: self.case.partitioned(_with_chunks(self.case.plan, size, self.tiles, many=False)),
            backward=False,
        )
        found = trials.partition(chunk)
        outputs = {name: value for name, value in self.plain.values.items() if "gradient" not in name}
        far, apart = self._far(replace(self.plain, values=outputs), found, noise=False)
        return self._explained(far, apart) if far or apart else None

    # ---------------------------------------------------------------------------------------- sentences

    def _counted(self) -> str | None:
        """An attribute that every forward changes anew; one that is set once and stays is none."""
        if self.plain.attributes == self.attributes:
            return None
        first, second = self.trials.twice()
        return self._changes(first, second)

    def _attributes_differ(self, found: Outcome) -> str | None:
        return self._changes(self.plain.attributes, found.attributes, start=self.attributes)

    def _changes(
        self, before: dict[Any, Any], after: dict[Any, Any], start: dict[Any, Any] | None = None
    ) -> str | None:
        for place in sorted({*before, *after}):
            if before.get(place) == after.get(place) or before.get(place) != before.get(place):
                continue
            name, key = place
            old = (self.attributes if start is None else start).get(place)
            return (
                f"{self._who(name)} must not change its attribute {key!r} in forward, "
                f"got {_short(old)} -> {_short(before.get(place) if start is None else after.get(place))}."
            )
        return None

    def _explained(self, far: dict[str, float], apart: dict[str, float]) -> str:
        foreign = [part for part in self.held.names if needs_batch_statistics(part) and not has_known_forward(part)]
        if foreign and self.case.by_tile:
            name = self.held.names[foreign[0]]
            return (
                "a train-mode BatchNorm must have torch's or timm's own forward, "
                f"got {type(foreign[0]).__name__}'s (layer {name!r})."
            )
        mixing = self._mixing() if self.case.by_tile else None
        if mixing is not None:
            return self._mixes(mixing)
        buffers = {name.split("'")[1]: gap for name, gap in far.items() if name.startswith("buffer")}
        written = {
            name: gap
            for name, gap in buffers.items()
            if not _is_statistic(self.held, name) or not {*far} - {f"buffer {name!r}" for name in buffers}
        }
        sentence = self._writes(written)
        if sentence is not None:
            return sentence
        if INPUT_AFTER in far:
            return (
                f"{self._who(self.trials.writer())} must not change the partition's input in place, got an input that "
                f"changes by {far[INPUT_AFTER]:.1e}. HINT: x = x.clone() before it."
            )
        first = next((name for name, _ in self.trials.recorded.given if name in apart), None)
        what, gap = (f"an output of {self._who(first)}", apart[first]) if first is not None else next(iter(far.items()))
        return (
            f"{self.case.owner} must be computed in a partition as it is alone, got {what} that differs by {gap:.1e}. "
            'HINT: mode "native", or partition the sub-modules before and after it.'
        )

    def _mixing(self) -> Mixing | None:
        arguments, original = self.case.arguments, self.case.original
        return find_mixing(self.held, lambda tiles: arguments.call(original, tiles), self.tiles)

    def _mixes(self, mixing: Mixing) -> str:
        return (
            f"{self._who(mixing.name)} must treat tiles independently, got an output that changes by "
            f"{mixing.change:.1e} with another tile. HINT: partition the sub-module before it; batch statistics are "
            "exact in nn.BatchNorm2d."
        )

    def _writes(self, gaps: dict[str, float]) -> str | None:
        order = [name for name in self.start if name in gaps]
        if not order:
            return None
        owner, _, key = order[0].rpartition(".")
        return (
            f"{self._who(owner)} must not write its buffer {key!r} in forward, got {gaps[order[0]]:.1e} beside the "
            "plain module's. HINT: keep it out of the partition."
        )

    def _raised(self, error: Exception, chunk: int) -> tuple[str, str | None]:
        """A chunk that the module does not take alone hangs on the tiles beside it."""
        told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not self.case.by_tile or chunk >= len(self.tiles):
            return told, None
        self.held.rewind()
        try:
            with torch.no_grad():
                out = self.case.arguments.call(self.case.original, self.tiles[:chunk].clone())
            from ds_wsi.partition.outputs import form_of

            form_of(out, chunk, self.case.owner)
        except Exception as alone:
            if "must have tiles on its first axis" in str(alone):
                return "", str(alone)
            return "", (
                f"{self._who('')} must treat tiles independently, got an error for {chunk} of {len(self.tiles)} tiles "
                f"({type(alone).__name__}: {str(alone).splitlines()[0]}). HINT: partition a sub-module that does."
            )
        return told, None

    def _undivided_chunk(self) -> int:
        return len(self.tiles) if self.case.by_tile else max(1, self.tiles.shape[2] // _ROW_BLOCKS)

    def _who(self, name: str) -> str:
        return f"{name!r} ({self.names.get(name, self.case.owner)})"


def _place(generator: str) -> str:
    """The sub-module of a generator's name."""
    if generator in ("numpy.random", "random"):
        return ""
    return generator.removesuffix("'s own") if generator.endswith("'s own") else generator.rpartition(".")[0]


def _is_statistic(held: Restored, name: str) -> bool:
    """Whether a buffer is a torch norm's running statistic, which draws before the norm change."""
    owner = name.rpartition(".")[0]
    part = next(part for part, place in held.names.items() if place == owner)
    return isinstance(part, nn.modules.batchnorm._NormBase)


def _is_level(part: nn.Module, axis: str) -> bool:
    return needs_batch_statistics(part) or (axis == "spatial" and needs_image_statistics(part))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _modes(plan: PartitionPlan) -> str:
    return ", ".join(dict.fromkeys(part.mode for part in plan.segments))


def _with_chunks(plan: PartitionPlan, size: int, tiles: Tensor, *, many: bool) -> PartitionPlan:
    """The plan for the trial: its segments and modes, other chunks."""

    def changed(part: SegmentPlan) -> SegmentPlan:
        mode = "lean" if many and part.mode == "recompute" else part.mode
        return SegmentPlan(part.last, mode, size, part.host_input)

    return PartitionPlan(tuple(map(changed, plan.segments)), plan.axis, plan.bn_population, tuple(tiles.shape))


def tiles_that_fit(plan: PartitionPlan, tiles: int) -> int:
    """How many of a call's tiles the module alone holds within the plan's budget."""
    wanted = min(TILES[0], tiles)
    if tiles > wanted:
        wanted = min(max(TILES), tiles)
    if plan.native_peak_bytes and plan.gpu_budget_bytes:
        each = plan.native_peak_bytes / plan.input_shape[0]
        wanted = min(wanted, int(plan.gpu_budget_bytes / (1.5 * each)))
    return wanted


def sample_of(case: Case, x: Tensor, count: int, prepare: Prepare | None = None) -> Tensor:
    """The first tiles of a call, or a part of its first images."""
    part = x[:count]
    if not case.by_tile and part.dim() == 4 and part.shape[2] * part.shape[3] > 128 * 128:
        part = part[:, :, : _IMAGE[0], : _IMAGE[1]]
    part = part.detach().to(case.device)
    return (part if prepare is None else prepared(prepare, part, 0)).detach().clone()


def _dtype(case: Case, sample: Tensor) -> torch.dtype:
    """What the check computes in: the parameters' dtype, float32 where that is half as long."""
    kinds = [parameter.dtype for parameter in case.module.parameters() if parameter.is_floating_point()]
    kinds = kinds or ([sample.dtype] if sample.is_floating_point() else [torch.get_default_dtype()])
    return torch.promote_types(kinds[0], torch.float32)


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Full precision, no compiling, gradients as asked: whatever is in force around the call."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
