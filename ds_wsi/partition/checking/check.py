"""The check at the first call: the partition gives what the module gives, or says which part of it stands in the way.

A few tiles of the call go through the module alone and through the partition, forward and backward, from the same
beginning. What may differ is rounding: up to 1000 eps, or 50 times what the opposite order of the tiles changes, and
where that is exceeded in float32 it must be so in float64 too. The module is as before afterwards, and so is every
generator: a run is the same with and without.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.conditions import by_number
from ds_wsi.partition.checking.verdict import CHUNKS, Verdict
from ds_wsi.partition.execution.input_tensor import Prepare, prepared
from ds_wsi.partition.graph.trace import stays_whole
from ds_wsi.partition.graph.unrecorded import ForbiddenError
from ds_wsi.partition.module.restored import Restored
from ds_wsi.partition.module.surroundings import undisturbed
from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import says_no_memory

TILES = (4, 5, 6, 8)  # the first number that the module takes; alone and in chunks of 3 and 1: 8 tiles in all
_IMAGE = (96, 64)  # rows and columns at most of the images on the spatial axis


class RefusedError(ValueError):
    """A module that the partition would not compute as it is."""


class FirstCalls:
    """The calls of one partitioned module that were checked."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # key -> tiles that were checked
        self._lock = threading.RLock()

    def check(self, case: Case, x: Tensor, prepare: Prepare | None) -> None:
        """Check a call whose like was not seen yet, before it runs.

        Args:
            case: what the call is checked for.
            x: the call's tiles, or images, on the module's device or on the host.
            prepare: applied to them first.

        Raises:
            ValueError: the partition would not give what the module gives; names the part.
        """
        if not len(x):
            return
        count = tiles_that_fit(case.plan, len(x)) if case.by_tile else min(2, len(x))
        with self._lock:
            key, enough = case.key(x), min(count, TILES[0])
            if enough and enough <= self._seen.get(key, 0):
                return
            if count == 0:
                logger.debug("partition check: %s is not checked, a tile does not fit the budget twice", case.owner)
            else:
                self._within_memory(case, x, prepare, count)
            self._seen[key] = enough

    def _within_memory(self, case: Case, x: Tensor, prepare: Prepare | None, count: int) -> None:
        while count:
            try:
                sample = sample_of(case, x, count, prepare)
                reason = check_case(case, sample, len(x))
            except RuntimeError as error:
                if not says_no_memory(error):
                    raise
                reason = "the device's memory does not hold it"
                count //= 2
                continue
            break
        if reason:
            logger.debug("partition check: %s is not checked: %s", case.owner, reason)
        else:
            logger.debug("partition check: %s is exact in %s", case.owner, case.modes)


def check_case(case: Case, sample: Tensor, tiles: int | None = None) -> str:
    """Compare the module with its partition on a few tiles.

    Args:
        case: what is compared.
        sample: tiles [n, ...] on the device, of which 4, 6 or 8 may be taken where the module does not take 5.
        tiles: how many the call has; None: as many as the sample.

    Returns:
        Why nothing could be said; "" where the partition is exact.

    Raises:
        ValueError: it is not; names the part.
    """
    with _quietly(case.device):
        dtype, wide = _dtype(case, sample), torch.float64
        counts, refusal = _counts(case, sample, len(sample) if tiles is None else tiles)
        if refusal is not None:
            raise RefusedError(refusal)
        reason, refusal = _judge(case, sample, dtype, counts)
        if refusal is None or dtype == wide:
            if refusal is not None:
                raise RefusedError(refusal)
            return reason
        # A refusal ends a run: rounding must not be its reason.
        unknown, confirmed = _judge(case, sample, wide, counts)
        if unknown:
            raise RefusedError(refusal)
        if confirmed is not None:
            raise RefusedError(confirmed)
        logger.debug("partition check: %s differs in %s by rounding alone: %s", case.owner, dtype, refusal)
        return ""


def _counts(case: Case, sample: Tensor, tiles: int) -> tuple[tuple[int, ...], str | None]:
    """(The numbers of tiles to try in turn; why the module is refused, or None)."""
    all_of_them = (len(sample),)
    if not case.by_tile:
        return all_of_them, None
    enough = len(sample) >= TILES[0]
    if not stays_whole(case.module, case.plan.axis):
        return TILES if enough else all_of_them, None
    with Restored(case.module, case.device) as held:
        other, refusal = by_number(case, held, sample, tiles if enough else 0)
    # Where more tiles are more operations, the larger number shows more.
    return TILES if enough and not other else all_of_them, refusal


def _judge(case: Case, sample: Tensor, dtype: torch.dtype, counts: tuple[int, ...]) -> tuple[str, str | None]:
    """(Why nothing can be said, or ""; why the module is refused, or None)."""
    reason, first = "", None
    for count in counts:
        tiles = sample[:count]
        if len(tiles) < count:
            break
        with Restored(case.module, case.device, dtype) as held:
            tiles = tiles.to(dtype) if tiles.is_floating_point() else tiles
            try:
                verdict = Verdict(case, held, tiles)
            except ForbiddenError as error:
                raise RefusedError(str(error)) from error
            except ValueError as error:
                if "must have tiles on its first axis" in str(error):
                    raise RefusedError(str(error)) from error
                reason = f"{type(error).__name__}: {error}"
                continue
            except Exception as error:  # the module alone does not take these tiles; the call itself will tell
                if says_no_memory(error):
                    raise
                # Chunks are differentiated by autograd.grad, as here.
                if "use_reentrant" in str(error) and stays_whole(case.module, case.plan.axis):
                    raise RefusedError(
                        f"a partitioned {case.owner} must not checkpoint inside a partition, got a reentrant "
                        'checkpoint. HINT: switch its checkpointing off; mode "checkpoint" does the same, exactly.'
                    ) from error
                reason = f"{type(error).__name__}: {error}"
                continue
            unknown, refusal = verdict.conclude()
        if unknown and count != counts[-1]:  # a chunk of one tile, say, that it does not take, and no call has
            reason = unknown
            continue
        if refusal is not None and first is None and CHUNKS.get(count) == count - 1 and _leaves_no_tile_alone(case):
            first = refusal  # of a chunk of one tile, which no call has: a number of tiles without one decides
            continue
        return unknown, refusal and (first or refusal)
    if first is not None:
        return "", first
    return reason or "it takes none of the numbers of tiles that were tried", None


def _leaves_no_tile_alone(case: Case) -> bool:
    """Whether no call has a chunk of one tile, but for a call of one tile: see `tile_ranges`."""
    sizes = [part.chunk_size for part in case.plan.segments]
    return case.by_tile and case.plan.bn_population == "stack" and min(sizes, default=0) > 2


def tiles_that_fit(plan: PartitionPlan, tiles: int) -> int:
    """How many of a call's tiles the module alone holds within the plan's budget."""
    count = min(TILES[0], tiles)
    if tiles > count:
        count = min(max(TILES), tiles)
    if plan.native_peak_bytes and plan.gpu_budget_bytes:
        each = plan.native_peak_bytes / plan.input_shape[0]
        count = min(count, int(plan.gpu_budget_bytes / (1.5 * each)))
    return count


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
        stack.enter_context(undisturbed())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
