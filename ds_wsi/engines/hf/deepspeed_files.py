"""DeepSpeed's own checkpoint files, which the HF Trainer saves and loads, read without running what is in them."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_wsi.runtime.seams import check_seams


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Inside, DeepSpeed's engines load tensors, plain values and DeepSpeed's own records; its loader takes any pickle.

    Raises:
        ValueError: a file that holds something else; names it.
    """
    check_seams("deepspeed", "files")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(records):
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                # Torch's own message advises weights_only=False, which would run code from the file.
                raise ValueError(
                    f"a checkpoint of DeepSpeed must hold tensors and DeepSpeed's records alone, got something else "
                    f"({path}). HINT: a file that runs code when it is read is refused; take another checkpoint."
                ) from error

    native = TorchCheckpointEngine.load
    TorchCheckpointEngine.load = load
    try:
        yield
    finally:
        TorchCheckpointEngine.load = native
