"""What a user asks of stacking."""

from dataclasses import dataclass

from ds_wsi.runtime.bounds import LARGEST_FACTOR, MOST_MICRO_STEPS, MOST_TILES, require_at_most
from ds_wsi.runtime.setting import Decides, setting

FRAMEWORKS = ("dpgs", "classic", "padding", "sampling")
BALANCES = ("lpt", "round_robin")


@dataclass(frozen=True)
class StackingPolicy:
    """How the bags of an optimizer step lie on ranks and in stacks.

    Args:
        bags_per_step: bags of an optimizer step over all ranks; None: per_device_train_batch_size x ranks x
            gradient_accumulation_steps.
        virtual_workers: stacks that a rank computes one after the other in a step, each a share of its bags; None:
            gradient_accumulation_steps.
        max_tiles_per_rank: tiles of one stack at the most; None for no limit. A bag of more is refused.
        balance: how bags are dealt to workers: "lpt", the costliest first to the least loaded; "round_robin", in turn.
        cost_per_tile, cost_per_tile_squared: a and b of a bag's cost, a n + b n^2, in any unit (`fit_cost`).
        framework: "dpgs" stacks bags without loss; the others are what it is compared with: "classic" takes a step per
            bag, "padding" pads a stack to its longest bag, "sampling" draws `sample_tiles` instances of every bag.
        sample_tiles: instances per bag under "sampling".
        pack_bytes: instances of a stack that an aggregator computes at a time, so that they stay in the cache; 0: all.
    """

    bags_per_step: int | None = setting(
        None,
        "number of slides of an optimizer step over all processes, such as 32, however many processes there are",
        Decides.STEP,
        option="bags_per_step",
        kind=int,
        words="--per_device_train_batch_size x --gradient_accumulation_steps x processes",
        group="training",
    )
    virtual_workers: int | None = setting(
        None,
        "number of stacks of slides that each process computes one after the other in a step of --bags_per_step",
        Decides.STEP,
        option="virtual_workers",
        kind=int,
        words="--gradient_accumulation_steps",
    )
    max_tiles_per_rank: int | None = setting(
        None,
        "largest number of tiles of a stack, of --bags_per_step; a slide with more is refused",
        Decides.STEP,
        option="max_tiles_per_rank",
        kind=int,
        words="no limit",
    )
    balance: str = setting(
        "lpt",
        "which bags a process gets: the costliest first to the least loaded (lpt), or in turn (round_robin)",
        Decides.NOTHING,
    )
    cost_per_tile: float = setting(1.0, "cost of a bag per tile, in any unit, by which bags are dealt", Decides.NOTHING)
    cost_per_tile_squared: float = setting(
        0.0, "cost of a bag per squared number of tiles, in the same unit", Decides.NOTHING
    )
    framework: str = setting(
        "dpgs",
        "how slides of different length share a step: one after the other in stacks, padded, or sampled to one length",
        Decides.RESULT,
        option="framework",
        kind=FRAMEWORKS,
    )
    sample_tiles: int = setting(
        512,
        "number of tiles of each slide in --framework sampling",
        Decides.RESULT,
        option="sample_tiles",
        needs=("framework", ("sampling",)),
    )
    pack_bytes: int = setting(
        0,
        "bytes of instances that the aggregator computes at a time, so that they stay in the cache; 0 takes a stack",
        Decides.NOTHING,
    )

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("framework", self.framework, FRAMEWORKS),
            ("balance", self.balance, BALANCES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("bags_per_step", "virtual_workers", "max_tiles_per_rank", "sample_tiles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        require_at_most("virtual_workers", self.virtual_workers or 1, MOST_MICRO_STEPS)
        require_at_most("sample_tiles", self.sample_tiles, MOST_TILES)
        for name in ("cost_per_tile", "cost_per_tile_squared", "pack_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("cost_per_tile", "cost_per_tile_squared"):
            require_at_most(name, getattr(self, name), LARGEST_FACTOR)
        if self.framework == "classic" and self.bags_per_step not in (None, 1):
            raise ValueError(f'bags_per_step must be 1 in framework "classic", got {self.bags_per_step}')
        if self.framework == "classic":
            object.__setattr__(self, "bags_per_step", 1)

    @property
    def deals(self) -> bool:
        """Whether it decides which rank gets which bag."""
        return self.bags_per_step is not None or self.max_tiles_per_rank is not None

    def cost(self, tiles: int) -> float:
        """The cost of a bag of so many tiles."""
        return self.cost_per_tile * tiles + self.cost_per_tile_squared * tiles * tiles
