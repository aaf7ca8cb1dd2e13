"""When the device does what it is told, as seen by code that forgets to wait."""

from typing import Any

import torch

from simulated_cuda.cases import report

SIZE = 4096


def seen(happened: torch.Tensor) -> str:
    """Whether a value is there."""
    return "at once" if bool(happened.all()) else "late"


def main() -> None:
    """Measure."""
    side = torch.cuda.Stream()
    on_device, on_host = torch.zeros(SIZE, device="cuda"), torch.zeros(SIZE).pin_memory()
    torch.cuda.synchronize()
    results: dict[str, Any] = {}

    with torch.cuda.stream(side):
        on_host.copy_(on_device + 1, non_blocking=True)
    results["copy out"] = seen(on_host == 1)
    side.synchronize()
    waited = [seen(on_host == 1) == "at once"]

    # Kernels of the side stream see its copies, so another stream looks, which does not wait.
    with torch.cuda.stream(side):
        on_device.copy_(on_host, non_blocking=True)
    results["copy back"] = seen((on_device + 0).cpu() == 1)
    torch.cuda.synchronize()
    waited.append(seen(on_device.cpu() == 1) == "at once")

    result = on_device + 1
    with torch.cuda.stream(side):
        on_host.copy_(result, non_blocking=True)
    side.synchronize()
    results["kernel"] = seen(on_host == 2)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_host.copy_(result, non_blocking=True)
    side.synchronize()
    waited.append(seen(on_host == 2) == "at once")

    report({**results, "waited for": all(waited)})


if __name__ == "__main__":
    main()
