"""What is kept, rebuilt or moved in each segment, and what that costs: a pure decision, printed and stored as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from ds_wsi.partition.graph.segments import SegmentSpec


@dataclass(frozen=True)
class SegmentPlan:
    """One segment of a plan.

    Args:
        last: the segment's last operation; "" for the module's output.
        mode: one of `MODES`.
        chunk_size: tiles per chunk, or rows of the segment's output.
        host_input: whether its input waits in host memory for backward.
        device_bytes: bytes kept on the device from forward to backward.
        host_bytes: bytes kept in host memory, or on the disk beyond it.
        peak_bytes: bytes on the device at most while this segment is worked on, all segments' bytes included.
        seconds: predicted, forward and backward.
    """

    last: str
    mode: str
    chunk_size: int
    host_input: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0

    @property
    def spec(self) -> SegmentSpec:
        """What the runner needs to know."""
        return SegmentSpec(self.last, self.mode, self.chunk_size, self.host_input)


@dataclass(frozen=True)
class PartitionPlan:
    """A partition of one module.

    Args:
        segments: the segments in order; none where the module runs as it is ("native"), or layer by layer ("paper").
        axis, bn_population, compile: the policy's.
        input_shape: the shape that it was made for; another number of tiles is fine.
        mode: "partitioned", "native" or "paper".
        chunk_size: the chunk size of mode "paper".
        peak_bytes, host_bytes, seconds: predicted for `input_shape`.
        native_peak_bytes, native_seconds: peak and time of the module as it is.
        gpu_budget_bytes, host_budget_bytes: the budgets that it fits.
        nvme_path, nvme_budget_bytes: the disk that takes what host memory does not hold.
        rates_measured: whether seconds rest on measured rates of the device, or on assumed ones.
        timeline: (name, bytes on the device at most) of each segment's forward and backward.
    """

    segments: tuple[SegmentPlan, ...]
    axis: str
    bn_population: str
    input_shape: tuple[int, ...]
    mode: str = "partitioned"
    chunk_size: int = 0
    compile: bool = False
    peak_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    native_peak_bytes: int = 0
    native_seconds: float = 0.0
    gpu_budget_bytes: int = 0
    host_budget_bytes: int = 0
    nvme_path: str = ""
    nvme_budget_bytes: int = 0
    rates_measured: bool = False
    timeline: tuple[tuple[str, int], ...] = ()

    @property
    def nvme_bytes(self) -> int:
        """Bytes on the disk at most: of `host_bytes`, what the host budget does not hold."""
        return max(0, self.host_bytes - self.host_budget_bytes) if self.nvme_budget_bytes else 0

    @property
    def summary(self) -> str:
        """The plan in one line."""
        return str(self).splitlines()[0]

    def __str__(self) -> str:
        """A table, one line per segment, under a line that sums it up."""
        rates = "measured" if self.rates_measured else "assumed"
        what = "x".join(map(str, self.input_shape))
        if self.mode == "paper":
            return f"partition of {what}: paper, layer by layer in chunks of {self.chunk_size}"
        native = f"native {gib(self.native_peak_bytes)} and {self.native_seconds:.3g} s"
        if self.mode == "native":
            return f"partition of {what}: native, it fits as it is ({native}; rates {rates})"
        beyond = f"{gib(self.nvme_bytes)} on the disk, " if self.nvme_budget_bytes else ""
        host = self.host_bytes - self.nvme_bytes
        head = (
            f"partition of {what} ({self.axis} axis): {gib(self.peak_bytes)} on the device at most, "
            f"{gib(host)} on the host, {beyond}{self.seconds:.3g} s ({native}; rates {rates})"
        )
        rows = [("segment up to", "mode", "input on", "chunk", "device", "host", "peak", "seconds")]
        for part in self.segments:
            rows.append(
                (
                    *(part.last or "output", part.mode, "host" if part.host_input else "device", str(part.chunk_size)),
                    *(gib(part.device_bytes), gib(part.host_bytes), gib(part.peak_bytes), f"{part.seconds:.3g}"),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, *lines])

    def to_section(self) -> dict[str, Any]:
        """The plan as JSON: `"ds_wsi": {"partition": {"plan": ...}}` takes it."""
        return asdict(self)

    @classmethod
    def from_section(cls, section: dict[str, Any]) -> "PartitionPlan":
        """The plan that `to_section` wrote."""
        values = dict(section)
        values["segments"] = tuple(SegmentPlan(**segment) for segment in values["segments"])
        values["input_shape"] = tuple(values["input_shape"])
        values["timeline"] = tuple((name, size) for name, size in values.get("timeline", ()))
        return cls(**values)


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
