"""Simulates the CUDA device in every Python process that `simulated_cuda.lane` starts, and in those that they start."""

import os
import sys
import traceback


def _simulate() -> None:
    from simulated_cuda import device, ranks, sanitizer

    device.enter()
    ranks.put_gloo_in_place_of_nccl()
    if os.environ.get("SIMULATED_CUDA_SANITIZER") == "1":
        sanitizer.enable()  # after the device, so that it sees the device's tensors


# The helper of multiprocessing computes nothing.
if os.environ.get("SIMULATED_CUDA") == "1" and "resource_tracker" not in " ".join(sys.orig_argv):
    try:
        _simulate()
    except Exception:  # Python would print it and go on, on the CPU
        traceback.print_exc()
        raise SystemExit(1) from None
