"""A simulated CUDA device, and what the project does on it: wrong results, races, memory and device mismatches.

`cuda_runtime.cpp` is a CUDA runtime on host memory, preloaded under torch's CUDA build; `device.py` runs every
operation by the CPU's kernel. All else is torch's: its caching allocator with its statistics, streams, events,
generators, autocast, autograd's device threads. `lane.py` builds the runtime and starts processes on it, under three
schedules:

- late_copies: copies beside the computing happen when they are waited for, and not before;
- late_writes: the computing stream's results reach memory several kernels late, copies beside it at once;
- sanitizer: torch's CUDA sanitizer watches which streams have waited for which.

It cannot show speed, a kernel's own behaviour (but for those of `kernels.py`), NCCL, or cuDNN's workspace.
"""
