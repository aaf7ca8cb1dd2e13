"""What a forked process mends of torch."""

import torch

from ds_wsi.runtime.processes import is_forked


def make_pool_anew() -> None:
    """Have torch's pool of threads whole again in a forked process, before its first backward.

    [Note: the pool in a fork] torch makes the pool anew when a thread first asks for it, and is not safe there: a
    second thread that asks at that moment gets none, and the process is aborted ("Invalid thread pool!", seen in
    2.14.1). Autograd starts eight threads that ask at once where shapes were computed with (`FakeTensorMode`), as
    planning does. Here one thread asks alone.
    """
    if is_forked():
        torch.set_num_threads(torch.get_num_threads())
