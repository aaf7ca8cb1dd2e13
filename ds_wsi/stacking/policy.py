"""What a user asks of stacking."""

from dataclasses import dataclass

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
        max_tiles_per_rank: of one stack; None for no limit. A bag of more is refused.
        balance: which bags a worker gets: "lpt", the costliest first to the least loaded; "round_robin", in turn.
        cost_per_tile, cost_per_tile_squared: of a bag of n tiles, a n + b n^2, in any unit (`fit_cost`).
        framework: "dpgs" stacks bags without loss; the others are what it is compared with: "classic" takes a step a
            bag, "padding" pads a stack to its longest bag, "sampling" draws `sample_tiles` instances of every bag.
        sample_tiles: of "sampling".
        pack_bytes: instances of a stack that an aggregator computes at a time, so that they stay in the cache; 0: all.
    """

    bags_per_step: int | None = None
    virtual_workers: int | None = None
    max_tiles_per_rank: int | None = None
    balance: str = "lpt"
    cost_per_tile: float = 1.0
    cost_per_tile_squared: float = 0.0
    framework: str = "dpgs"
    sample_tiles: int = 512
    pack_bytes: int = 0

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
        for name in ("cost_per_tile", "cost_per_tile_squared", "pack_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.framework == "classic" and self.bags_per_step not in (None, 1):
            raise ValueError(f'bags_per_step must be 1 in framework "classic", got {self.bags_per_step}')
        if self.framework == "classic":
            object.__setattr__(self, "bags_per_step", 1)

    @property
    def deals(self) -> bool:
        """Whether it decides which rank gets which bag."""
        return self.bags_per_step is not None or self.max_tiles_per_rank is not None

    def cost(self, tiles: int) -> float:
        """Of a bag."""
        return self.cost_per_tile * tiles + self.cost_per_tile_squared * tiles * tiles
