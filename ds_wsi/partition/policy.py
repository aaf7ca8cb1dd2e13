"""What a user asks of the partitioning."""

from dataclasses import dataclass
from pathlib import Path

from ds_wsi.runtime.memory import free_disk_bytes

MODES = ("keep", "lean", "checkpoint", "recompute", "offload", "stream")
POLICY_MODES = ("auto", *MODES, "paper", "native")
AXES = ("batch", "spatial")
BN_POPULATIONS = ("stack", "bag")


@dataclass(frozen=True)
class PartitionPolicy:
    """How a module's activations are partitioned.

    Args:
        mode: "auto" plans a mode for each segment within the budgets; the others are for every segment:
            "keep" keeps what autograd saves; "lean" keeps the inputs of BatchNorm and the outputs of residual blocks,
            and rebuilds the rest; "checkpoint" keeps each block's input and rebuilds the block's lean values once;
            "recompute" keeps only the module's input, in memory constant in the number of chunks; "offload" is "keep"
            with the saved tensors in host memory; "stream" is "lean" with them in host memory; "paper" is Big-Layers'
            Algorithms 1 and 2, layer by layer, the baseline; "native" leaves the module as it is.
        axis: "batch": independent tiles [N, ...] in chunks of tiles; "spatial": large images [B, C, H, W] in blocks of
            rows with exact halos.
        chunk_size: tiles (or rows of each segment's output) a chunk; None lets the plan choose.
        gpu_budget_bytes: of activations on the device; None: nine tenths of what is free on a GPU, unlimited on a CPU.
        host_budget_bytes: of activations in host memory; None: half of what this process may still take.
        nvme_path: a folder on a fast local disk for what the host budget does not hold; "" for none. Reached through
            DeepSpeed's aio (`ds_wsi.engines.machine.nvme`).
        nvme_budget_bytes: of activations there; None: half of what is free.
        bn_population: what train-mode BatchNorm normalises over: "stack", all tiles of a call; "bag", each bag of it.
        compile: run the chunk's body under `torch.compile`.
        check: compare the partition with the module alone, on up to 4 tiles, before the first call of each kind.
    """

    mode: str = "auto"
    axis: str = "batch"
    chunk_size: int | None = None
    gpu_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    nvme_path: str = ""
    nvme_budget_bytes: int | None = None
    bn_population: str = "stack"
    compile: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, POLICY_MODES),
            ("axis", self.axis, AXES),
            ("bn_population", self.bn_population, BN_POPULATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("chunk_size", "gpu_budget_bytes", "host_budget_bytes", "nvme_budget_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or null, got {value}")
        if self.nvme_budget_bytes and not self.nvme_path:
            raise ValueError(f"nvme_budget_bytes must come with nvme_path, got {self.nvme_budget_bytes} without one")
        if self.nvme_path and self.mode == "paper":
            raise ValueError('nvme_path must not be given in mode "paper", which keeps maps in host memory, got one')

    def nvme_bytes(self) -> int:
        """How many bytes of activations may lie on the disk.

        Raises:
            ValueError: the folder is not there.
        """
        if not self.nvme_path:
            return 0
        if not Path(self.nvme_path).is_dir():
            raise ValueError(f"nvme_path must be a folder, got {self.nvme_path} (missing)")
        return self.nvme_budget_bytes or free_disk_bytes(self.nvme_path)
