"""A link of a given bandwidth between the processes of one machine: network namespaces and a token-bucket queue.

Each rank is in a namespace of its own, joined by a bridge in another; `tbf` limits both directions of each rank's
interface. It needs root, `ip` and `tc`; `LimitedLink.available` says whether they are there.
"""

import ctypes
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

_CLONE_NEWNET = 0x40000000
INTERFACE = "dswsi0"
_NAMESPACES = Path("/var/run/netns")
_NAME = re.compile(r"dswsi(\d+)(?:s|r\d+)")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} must succeed, got {done.returncode}: {done.stderr.strip()}")


class LimitedLink:
    """A context in which `ranks` namespaces exist, joined by a bridge.

    Attributes:
        enter: puts the calling process, as its rank, into its namespace; for `run_ranks`.
    """

    def __init__(self, ranks: int) -> None:
        self._prefix, self._ranks = f"dswsi{os.getpid()}", ranks
        self.enter = partial(enter_namespace, self._prefix)

    @staticmethod
    def available() -> bool:
        """Whether namespaces can be made here: tried, because containers may forbid it to root."""
        if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
            return False
        try:
            with LimitedLink(2) as link:
                link.limit(100)
        except RuntimeError:
            return False
        return True

    def __enter__(self) -> "LimitedLink":
        remove_left_behind()
        try:
            self._build()
        except BaseException:  # one that is asked to end leaves none behind either
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        switch = f"{self._prefix}s"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "name", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for rank in range(self._ranks):
            space, port = f"{self._prefix}r{rank}", f"p{rank}"
            _run("ip", "netns", "add", space)
            peer = ("peer", "name", INTERFACE, "netns", space)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", space, "link", "set", INTERFACE, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")

    def limit(self, mbps: float) -> None:
        """Set every rank's bandwidth, out and in."""
        # A bucket must hold what arrives between two ticks of the timer.
        burst = max(32_000, int(mbps * 1e6 / 8 / 100))
        shape = ("root", "tbf", "rate", f"{int(mbps * 1000)}kbit", "burst", str(burst), "latency", "200ms")
        for rank in range(self._ranks):
            for space, device in ((f"{self._prefix}r{rank}", INTERFACE), (f"{self._prefix}s", f"p{rank}")):
                _run("tc", "-n", space, "qdisc", "replace", "dev", device, *shape)

    def __exit__(self, *_: Any) -> None:
        for name in ("s", *(f"r{rank}" for rank in range(self._ranks))):
            subprocess.run(["ip", "netns", "del", self._prefix + name], capture_output=True, check=False)


def remove_left_behind() -> None:
    """Remove the namespaces of processes that were killed."""
    for name in (path.name for path in _NAMESPACES.glob("dswsi*")):
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter_namespace(prefix: str, rank: int) -> None:
    """Move this thread, and those that it starts, into a rank's namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / f"{prefix}r{rank}").open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE


def bytes_sent() -> int:
    """Bytes that left this rank's interface, by the kernel's count: payload, headers and acknowledgements.

    Outside of a namespace: through the loopback, those of all processes.
    """
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    counts = {line.split(":")[0].strip(): line.split(":")[1].split() for line in lines if ":" in line}
    return int(counts.get(INTERFACE, counts["lo"])[8])
