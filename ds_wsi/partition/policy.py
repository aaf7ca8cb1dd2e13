"""What a user asks of the partitioning."""

from dataclasses import dataclass
from pathlib import Path

from ds_wsi.runtime.setting import SWITCH, Decides, setting, size_in_bytes

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
        chunk_size: tiles (or rows of each segment's output) per chunk; None lets the plan choose.
        gpu_budget_bytes: bytes of activations on the device; None: nine tenths of what is free on a GPU, unlimited on
            a CPU.
        host_budget_bytes: bytes of activations in host memory; None: half of what this process may still take.
        nvme_path: a folder on a fast local disk for what the host budget does not hold; "" for none. Reached through
            DeepSpeed's aio (`ds_wsi.engines.machine.nvme`).
        nvme_budget_bytes: bytes of activations there; None: half of what is free.
        bn_population: what train-mode BatchNorm normalises over: "stack", all tiles of a call; "bag", each bag of it.
        compile: run the chunk's body under `torch.compile`.
        keep_plans: keep plans in the user's cache folder by what they depend on, and take them from there.
        check: compare the partition with the module alone, on up to 4 tiles, before the first call of each kind.
    """

    mode: str = setting(
        "auto",
        "how the encoder's activations are fitted into memory: native computes a bag as it is, auto plans within "
        "--gpu_budget, the others are parts of such a plan",
        Decides.RESOLVED,
        resolved="partition",
        option="partition",
        kind=POLICY_MODES,
    )
    axis: str = setting(
        "batch",
        "what is cut: independent tiles (batch), or the rows of large images (spatial)",
        Decides.RESOLVED,
        resolved="partition",
    )
    chunk_size: int | None = setting(
        None,
        "number of tiles that the encoder computes at a time",
        Decides.RESOLVED,
        resolved="partition",
        option="partition_chunk_size",
        kind=int,
        words="the plan chooses",
    )
    gpu_budget_bytes: int | None = setting(
        None,
        "memory for activations on the device, such as 24GiB",
        Decides.NOTHING,
        option="gpu_budget",
        kind=size_in_bytes,
        words="nine tenths of what is free on a GPU, no limit on a CPU",
    )
    host_budget_bytes: int | None = setting(
        None,
        "memory for activations on the host, such as 128GiB",
        Decides.NOTHING,
        option="host_budget",
        kind=size_in_bytes,
        words="half of the memory that is free",
    )
    nvme_path: str = setting(
        "",
        "folder on a local disk for activations that the host's memory does not hold",
        Decides.NOTHING,
        option="nvme_path",
        words="none",
    )
    nvme_budget_bytes: int | None = setting(
        None,
        "room for activations on that disk, such as 500GiB",
        Decides.NOTHING,
        option="nvme_budget",
        kind=size_in_bytes,
        words="half of what is free there",
    )
    bn_population: str = setting(
        "stack",
        "what BatchNorm in training averages over: all tiles of a call (stack), or each bag of it",
        Decides.RESOLVED,
        resolved="norm_training",
    )
    compile: bool = setting(False, "run the body of a chunk under torch.compile", Decides.NOTHING)
    keep_plans: bool = setting(
        True,
        "keep plans in the user's cache folder, and take a plan from there that was made of the same",
        Decides.NOTHING,
        option="keep_plans",
        kind=SWITCH,
    )
    check: bool = setting(
        True,
        "compare the partitioned encoder with the encoder alone at the first call",
        Decides.NOTHING,
        option="partition_check",
        kind=SWITCH,
    )

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
        from ds_wsi.runtime.memory import free_disk_bytes  # here, because help pages need no torch

        return self.nvme_budget_bytes or free_disk_bytes(self.nvme_path)
