"""What the runs of one check say: the sentence that names the part which a partition would not compute as it is."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.conditions import by_value
from ds_wsi.partition.checking.mixing import Mixing, find_mixing, with_others
from ds_wsi.partition.checking.trials import (
    INPUT_AFTER,
    Outcome,
    Trials,
    differences,
    distance,
    left_behind,
    state_differences,
)
from ds_wsi.partition.graph.leaves import has_own_forward, needs_batch_statistics, needs_image_statistics
from ds_wsi.partition.graph.trace import stays_whole
from ds_wsi.partition.module.observed import SameDraws
from ds_wsi.partition.module.outputs import form_of
from ds_wsi.partition.module.restored import Restored
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import says_no_memory

CHUNKS = {1: 1, 2: 1, 3: 2, 4: 3, 5: 3, 6: 5, 7: 5, 8: 5}  # tiles of the first of two chunks
MANY_LEVELS = 20  # of norms: "recompute" computes each of them from the input
_ROW_BLOCKS = 4
_NOISE = 50


class Verdict:
    """The runs of one check in one dtype, and what they say."""

    def __init__(self, case: Case, held: Restored, tiles: Tensor) -> None:
        self.case, self.held, self.tiles = case, held, tiles
        self.names = {name: type(part).__name__ for part, name in held.names.items()}
        self.eps = torch.finfo(tiles.dtype if tiles.is_floating_point() else torch.get_default_dtype()).eps
        for parameter in case.module.parameters():
            if parameter.is_floating_point():
                self.eps = max(self.eps, torch.finfo(parameter.dtype).eps)
        self.start = {name: tensor.clone() for name, tensor in held.tensors().items()}
        self.attributes = held.attributes()
        levels = sum(_is_level(part, case.plan.axis) for part in held.names)
        many = self.many = case.backward and levels > MANY_LEVELS and "recompute" in case.modes
        self.trials = Trials(
            held,
            case.original,
            lambda chunk: case.with_chunks(chunk, tiles, lean=many),  # no reference to self
            case.arguments,
            tiles,
            case.backward,
            case.input_grad,
            case.by_tile,
        )
        self.plain = self.trials.plain()
        self.eps = max(self.eps, self.trials.coarsest)
        # Of 16 bits, too, no tile may hang on another: what is rounded there is a few of their eps apart.
        self.floor = min(max(1e3 * self.eps, 1e-9), 2e-2)
        self.ceiling = min(max(4e4 * self.eps, 1e-5), 0.2)  # no noise excuses more: the tiles' order may matter

    def conclude(self) -> tuple[str, str | None]:
        """(Why nothing can be said, or ""; why the module is refused, or None)."""
        changed = self._counted()
        if changed is not None:
            return "", changed
        after = self.plain.values[INPUT_AFTER]
        if after is not None and (gap := distance(self.tiles.cpu(), after)):
            # Backward reads the tiles again, as they were given.
            return "", (
                f"{self._who(self.trials.writer())} must not change the partition's input in place, got an input that "
                f"changes by {gap:.1e}. HINT: x = x.clone() before it."
            )
        drawn = bool(self.plain.moved)
        count = len(self.tiles)
        if not self.case.by_tile:
            chunk = max(1, self.tiles.shape[2] // _ROW_BLOCKS)
        else:
            chunk = count if drawn else CHUNKS.get(count, 1)
        try:
            outcome = self._partition(chunk)
        except Exception as error:  # the call itself would raise it, unless the number of tiles is the reason
            if says_no_memory(error):
                raise
            return self._raised(error, chunk)
        refusal = self._compared(outcome, drawn=drawn)
        if refusal is None and self.case.by_tile and drawn and count > 1:
            refusal = self._independent() or self._written_by_chunk()
        if refusal is None and self.many:
            refusal = self._forward_alone(chunk)
        if refusal is None and count > 1 and stays_whole(self.case.module, self.case.plan.axis):
            refusal = self._decides()
        return "", refusal

    def _partition(self, chunk: int) -> Outcome:
        """One run; a second where the module changes what it holds: what the trace drew and wrote is done by then."""
        outcome = self.trials.partition(chunk)
        written = any(
            name in self.plain.state and distance(self.start[name].cpu(), self.plain.state[name])
            for name in self.start
            if not _is_statistic(self.held, name)
        )
        if written or any(self.plain.moved) or self.plain.attributes != self.attributes:
            outcome = self.trials.partition(chunk)
        return outcome

    # ---------------------------------------------------------------------------------------- comparisons

    def _compared(self, outcome: Outcome, *, drawn: bool) -> str | None:
        """The sentence for what differs between the module alone and the partition."""
        outside = [name for name in self.plain.moved if name]
        far, apart = self._far(self.plain, outcome, noise=not drawn)
        same_draws = outcome.marks == self.plain.marks
        if (far or apart) and drawn and not outside:
            # The partition may draw in another order: let the order not matter.
            with SameDraws():
                plain = self.trials.plain()
                again = self.trials.partition(self._undivided_chunk())
            far, apart = self._far(plain, again, noise=False)
        if outside and (far or apart or not same_draws):
            kind = "a generator of its own" if outside[0] not in ("numpy.random", "random") else outside[0]
            return f"{self._who(_place(outside[0]))} must draw from torch's default generators, got {kind}."
        counted = self._attributes_differ(outcome)
        if counted is not None:
            return counted
        kept = self._keeps_tiles(self.plain, outcome)
        if kept is not None:
            return kept
        if far or apart:
            return self._explained(far, apart)
        if not same_draws:
            return (
                f"a partitioned {self.case.owner} must draw as often as alone, got generators that moved otherwise. "
                'HINT: mode "keep" draws once.'
            )
        return None

    def _far(self, plain: Outcome, outcome: Outcome, *, noise: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Values and state, and outputs of sub-modules, that are further apart than rounding."""
        buffers = {f"buffer {k!r}": v for k, v in state_differences(plain, outcome, self.start).items()}
        gaps = differences(plain, outcome, self.trials.faint) | buffers
        apart = dict(self.trials.apart)
        far = {name: gap for name, gap in gaps.items() if not gap <= self.floor}
        apart = {name: gap for name, gap in apart.items() if not gap <= self.floor}
        if (far or apart) and noise and self.case.by_tile and len(self.tiles) > 1:
            other = self.trials.reversed()
            noises, inside = differences(plain, other, self.trials.faint), self.trials.apart
            far = {name: gap for name, gap in far.items() if not gap <= self._tolerance(noises.get(name, 0.0))}
            apart = {name: gap for name, gap in apart.items() if not gap <= self._tolerance(inside.get(name, 0.0))}
        return far, apart

    def _tolerance(self, noise: float) -> float:
        return max(self.floor, min(self.ceiling, _NOISE * noise))

    def _independent(self) -> str | None:
        """The sentence for a module that draws and mixes tiles: other tiles, the same draws."""
        if any(needs_batch_statistics(part) and not has_own_forward(part) for part in self.held.names):
            return None
        mixing = self._mixing()
        return None if mixing is None else self._mixes(mixing)

    def _written_by_chunk(self) -> str | None:
        """The sentence for what a module that draws writes and that does not hang on the draws, in two chunks."""
        mine = {name for name in self.start if not _is_statistic(self.held, name)}
        state = self.plain.state
        same = state.keys() == self.start.keys() and all(
            torch.equal(state[name], self.start[name].cpu()) for name in mine & state.keys()
        )
        if same and self.plain.attributes == self.attributes:
            return None
        with SameDraws():
            plain = self.trials.plain()
            outcome = self.trials.partition(CHUNKS.get(len(self.tiles), 1))
            kept = self._keeps_tiles(plain, outcome)
        counted = self._changes(plain.attributes, outcome.attributes, start=self.attributes)
        gaps = state_differences(plain, outcome, {name: self.start[name] for name in mine})
        return counted or kept or self._writes({name: gap for name, gap in gaps.items() if not gap <= self.floor})

    def _keeps_tiles(self, plain: Outcome, outcome: Outcome) -> str | None:
        """The sentence for a tensor that a forward keeps in the module.

        A partition would not keep as it is what hangs on the tiles. A table that a module makes once, of positions say,
        does not hang on them.
        """
        names = left_behind(plain, outcome, self.start, self.floor)
        if not names:
            return None
        other = self.trials.elsewhere(with_others(self.tiles, 0) if self.case.by_tile else self.tiles.flip(-1))
        for name in names:
            mine, elsewhere = plain.state.get(name), other.state.get(name)
            if mine is None or elsewhere is None or distance(mine, elsewhere):
                owner, key = self.held.place_of(name)
                value = mine if mine is not None else outcome.state[name]
                return (
                    f"{self._who(owner)} must not keep what it computes of the tiles, got its attribute {key!r} "
                    f"{list(value.shape)}. HINT: return it, or keep the sub-module out of the partition."
                )
        return None

    def _decides(self) -> str | None:
        """The sentence for a module that decides by values and was not recorded, which would have told."""
        reads = self.trials.reads
        name = by_value(self.case, self.held, self.tiles, reads) if reads else None
        if name is None:
            return None
        return (
            f"{self._who(name)} must not decide by the values of all its tiles, got a condition that a chunk's may not "
            "fulfil. HINT: partition the sub-modules before and after it."
        )

    def _forward_alone(self, chunk: int) -> str | None:
        """The plan's own modes, forward only, where backward was checked in "lean"."""
        trials = replace(
            self.trials,
            partitioned=lambda size: self.case.with_chunks(size, self.tiles, lean=False),
            backward=False,
        )
        outcome = trials.partition(chunk)
        outputs = {name: value for name, value in self.plain.values.items() if "gradient" not in name}
        far, apart = self._far(replace(self.plain, values=outputs), outcome, noise=False)
        return self._explained(far, apart) if far or apart else None

    # ---------------------------------------------------------------------------------------- sentences

    def _counted(self) -> str | None:
        """An attribute that every forward changes anew; one that is set once and stays is none."""
        if self.plain.attributes == self.attributes:
            return None
        first, second = self.trials.twice()
        return self._changes(first, second)

    def _attributes_differ(self, outcome: Outcome) -> str | None:
        return self._changes(self.plain.attributes, outcome.attributes, start=self.attributes)

    def _changes(
        self, before: dict[Any, Any], after: dict[Any, Any], start: dict[Any, Any] | None = None
    ) -> str | None:
        for attribute in sorted({*before, *after}):
            if before.get(attribute) == after.get(attribute) or before.get(attribute) != before.get(attribute):
                continue
            name, key = attribute
            old = (self.attributes if start is None else start).get(attribute)
            return (
                f"{self._who(name)} must not change its attribute {key!r} in forward, "
                f"got {_short(old)} -> {_short(before.get(attribute) if start is None else after.get(attribute))}."
            )
        return None

    def _explained(self, far: dict[str, float], apart: dict[str, float]) -> str:
        foreign = [part for part in self.held.names if needs_batch_statistics(part) and not has_own_forward(part)]
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
        if not self.case.by_tile and not any(self.plain.moved):  # seldom, and dear: of every place that rows may have
            self.trials.partition(self._undivided_chunk(), rows=True)
            apart = {name: gap for name, gap in self.trials.apart.items() if not gap <= self.floor}
        first = next((name for name, _ in self.trials.recorded.given if name in apart), None)
        what, gap = (f"an output of {self._who(first)}", apart[first]) if first is not None else next(iter(far.items()))
        return (
            f"{self.case.owner} must be computed in a partition as it is alone, got {what} that differs by {gap:.1e}. "
            'HINT: mode "native", or partition the sub-modules before and after it.'
        )

    def _mixing(self) -> Mixing | None:
        arguments, original = self.case.arguments, self.case.original
        try:
            return find_mixing(self.held, lambda tiles: arguments.call(original, tiles), self.tiles)
        except Exception as error:  # tiles that no bag holds may be more than the module takes
            if says_no_memory(error):
                raise
            logger.debug("partition check: %s on other tiles: %s: %s", self.case.owner, type(error).__name__, error)
            return None

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
        owner, key = self.held.place_of(order[0])
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
            form_of(out, chunk, self.case.owner)
        except Exception as alone:
            if "must have tiles on its first axis" in str(alone):
                return "", str(alone)
            return "", (
                f"{self._who('')} must treat tiles independently, got an error for {chunk} of {len(self.tiles)} tiles "
                f"({type(alone).__name__}: {str(alone).splitlines()[0]}). HINT: partition a sub-module that does."
            )
        overwritten = self._overwritten() if "modified by an inplace operation" in told else None
        return "" if overwritten else told, overwritten

    def _overwritten(self) -> str | None:
        """The sentence for a buffer that a forward reads for its backward, and a later chunk writes."""
        state = self.plain.state
        gaps = {name: distance(self.start[name].cpu(), state[name]) for name in self.start if name in state}
        gaps = {name: gap for name, gap in gaps.items() if gap}
        sentence = self._writes({name: gap for name, gap in gaps.items() if not _is_statistic(self.held, name)})
        if sentence is None and gaps:
            owner, key = self.held.place_of(next(iter(gaps)))
            sentence = (
                f"{self.case.owner} must not read the running statistics of {self._who(owner)} before it writes them, "
                f"got {key!r} in the graph of a gradient. HINT: read a clone, or partition the parts beside it."
            )
        return sentence

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
    owner, key = held.place_of(name)
    part = next(part for part, full_name in held.names.items() if full_name == owner)
    return isinstance(part, nn.modules.batchnorm._NormBase) and key in part._buffers


def _is_level(part: nn.Module, axis: str) -> bool:
    return needs_batch_statistics(part) or (axis == "spatial" and needs_image_statistics(part))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
