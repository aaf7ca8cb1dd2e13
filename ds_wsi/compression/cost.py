"""Whether compression pays: the time of a step's communication by hook, from a probed link and a measured encoder.

[Note: cost] d float32 values on W ranks; bandwidth B bytes per second out of each rank, latency L per message:

    none    2 (W-1) L + 2 (W-1)/W 4d / B             a ring's all-reduce
    bf16    the same of 2d bytes + c                  c for the casts, to 16 bits and back
    dmgc    2 W L + (W-1)/W (m + m') / B + t          sharded: m bytes to the owners, m' back, t for encode and decode
            2 W L + (W-1) (m + m') / B + t           server: the one owner's link carries all of it
            W L + (W-1) m / B + t                    all_gather: every rank sends its m bytes to all others

m and m' are what the cheapest encoding takes, of what is kept; a message's length is announced before it. Communication
hidden behind backward is not known and counts as if it were not hidden, for all alike. A hook must win a tenth: it
changes what is computed.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.compression.exchange import Ranks
from ds_wsi.compression.selection import kept, select, spans_of
from ds_wsi.compression.wire import Section, cheapest, decode, encode, section_bytes

PROBE_BYTES, PROBE_TIMES = 1 << 20, 3
ENCODE_AT_MOST = 1 << 22  # values that are encoded to measure; the time of more is in proportion
WIN = 0.9


@dataclass(frozen=True)
class Link:
    """A group's link.

    Attributes:
        bytes_per_s: out of each rank, in an all-to-all.
        latency_s: the time of a collective of a few bytes.
    """

    ranks: int
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Choice:
    """The fastest hook and the numbers behind it.

    Attributes:
        seconds: a step's communication, by hook.
    """

    hook: str
    seconds: dict[str, float]
    link: Link
    encode_s: float

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in self.seconds.items())
        verdict = "compression does not pay" if self.hook == "none" else f"{self.hook} pays"
        return (
            f"{verdict}: a step's communication takes {times} ({self.link.ranks} ranks, "
            f"{8e-6 * self.link.bytes_per_s:.0f} Mbps, {1e3 * self.link.latency_s:.2f} ms per message, "
            f"{1e3 * self.encode_s:.1f} ms to encode and decode)"
        )


def predict(policy: CommPolicy, numel: int, link: Link, encode_s: float, cast_s: float) -> dict[str, float]:
    """Seconds of a step's communication by hook ([Note: cost])."""
    others = link.ranks - 1
    ring = 2 * others / max(link.ranks, 1)
    push, pull = (
        section_bytes(cheapest(policy.values, numel, count), policy.values, numel, count)
        for count in (kept(numel, policy.keep), kept(numel, policy.pull_keep or policy.keep))
    )
    times, sent = {
        "sharded": (2 * link.ranks, ring * (push + pull) / 2),
        "server": (2 * link.ranks, others * (push + pull)),
        "all_gather": (link.ranks, others * push),
    }[policy.topology]
    return {
        "none": 2 * others * link.latency_s + ring * 4 * numel / link.bytes_per_s,
        "bf16": 2 * others * link.latency_s + ring * 2 * numel / link.bytes_per_s + cast_s,
        "dmgc": times * link.latency_s + sent / link.bytes_per_s + encode_s,
    }


def fastest(seconds: dict[str, float]) -> str:
    """The hook to take: none, unless another wins a tenth."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < WIN * seconds["none"] else "none"


def probe(device: torch.device, group: dist.ProcessGroup | None = None) -> Link:
    """Measure the link. Collective: eight small exchanges; the slowest rank's times, on every rank."""
    ranks = Ranks.of(group, torch.empty(0, device=device))
    if ranks.size == 1:
        return Link(1, float("inf"), 0.0)

    def seconds(size: int) -> float:
        parts = [torch.zeros(size, dtype=torch.uint8)] * ranks.size
        dist.barrier(group)
        start = time.perf_counter()
        ranks.all_to_all(parts, [size] * ranks.size)[0].cpu()  # on a GPU this waits
        return time.perf_counter() - start

    seconds(1)  # the first of a group connects
    small = min(seconds(1) for _ in range(PROBE_TIMES))
    large = min(seconds(PROBE_BYTES) for _ in range(PROBE_TIMES))
    worst = torch.tensor([small, large], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    small, large = worst.tolist()
    return Link(ranks.size, PROBE_BYTES * (ranks.size - 1) / max(large - small, 1e-9), small)


def encode_time(policy: CommPolicy, numel: int, ranks: int, device: torch.device) -> float:
    """Seconds that a rank takes to select, encode and decode a step's messages, from one try of a random gradient."""
    size = min(numel, ENCODE_AT_MOST)
    values = torch.randn(size, device=device)
    start = time.perf_counter()
    chosen = select(values, spans_of([size], 0), policy.keep)
    message = encode([Section(0, size, chosen.indices, chosen.values)], step=0, values=policy.values)
    encoded = time.perf_counter() - start
    start = time.perf_counter()
    decode(message)
    decoded = time.perf_counter() - start
    # sharded: a message out, a share of W in, and the same back. all_gather: one out, W in. server: the owner's.
    once = {
        "sharded": 2 * (encoded + decoded),
        "server": 2 * encoded + (ranks + 1) * decoded,
        "all_gather": encoded + ranks * decoded,
    }[policy.topology]
    return once * numel / size


def cast_time(numel: int, device: torch.device) -> float:
    """Seconds of a gradient's casts: out, in and summed for this rank's share, out and in for its mean."""
    values = torch.randn(min(numel, ENCODE_AT_MOST), device=device)
    start = time.perf_counter()
    values.to(torch.bfloat16).float().add_(values).to(torch.bfloat16).float()[-1:].cpu()
    return (time.perf_counter() - start) * numel / len(values)


def choose(policy: CommPolicy, numel: int, device: torch.device) -> Choice:
    """What "auto" does. Collective, and the same on every rank."""
    link = probe(device)
    times = encode_time(policy, max(numel, 1), link.ranks, device), cast_time(max(numel, 1), device)
    slowest = torch.tensor(times, dtype=torch.float64, device=Ranks.of(None, torch.empty(0, device=device)).device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    encode_s, cast_s = slowest.tolist()
    seconds = predict(policy, max(numel, 1), link, encode_s, cast_s)
    return Choice(fastest(seconds), seconds, link, encode_s)
