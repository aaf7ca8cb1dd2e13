"""One step at a time under any engine, with its gradients and weights to look at: for measurements, not training."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.local_sgd import LocalSGD
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare
from ds_wsi.engines.accelerator.scope import forget_engine
from ds_wsi.engines.sharded.fsdp import whole
from ds_wsi.engines.sharded.zero import full_state_dict
from ds_wsi.runtime.choices import OPTIMIZERS

ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


class Stepper:
    """A model under an engine. Collective throughout.

    Args:
        engine: one of `ENGINES`.
        model: a model on its device; float64 under DDP and FSDP2 alone (DeepSpeed refuses such gradients).
        optimizer: "sgd" or "adam", plain.
        learning_rate: the optimizer's learning rate.

    Attributes:
        model: the wrapped model.
    """

    def __init__(self, engine: str, model: nn.Module, optimizer: str, learning_rate: float) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.engine, self.module = engine, model
        self.model: Any = model
        self.optimizer: Any
        if engine == "fsdp2":
            mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
            for part in model.children():
                fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
            kind = getattr(torch.optim, OPTIMIZERS[optimizer])
            self.optimizer = kind(model.parameters(), lr=learning_rate, weight_decay=0.0)
            return
        forget_engine()  # before this one
        settings = EngineSettings(learning_rate, 0.0, 0.0, optimizer, 1, 1)
        config = None if engine == "ddp" else _config(int(engine[-1]), optimizer)
        self._accelerator = build_accelerator(settings, Path("unused"), config)
        self.model, self.optimizer = prepare(self._accelerator, model, settings)

    def backward(self, loss: Tensor) -> None:
        """Backward and the engine's reduction, the mean over the ranks."""
        self.model.backward(loss) if self.engine.startswith("zero") else loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Whole reduced gradients by parameter name, on every rank; between `backward` and `step`."""
        gradients = {}
        for name, parameter in self.module.named_parameters():
            grad = parameter.grad
            if self.engine in ("zero1", "zero2", "zero3"):
                from deepspeed.utils import safe_get_full_grad

                grad = safe_get_full_grad(parameter)
            if grad is not None:
                gradients[name] = whole(grad).clone()
        return gradients

    def step(self) -> None:
        """The optimizer's step."""
        if self.engine.startswith("zero"):
            self.model.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def local_sgd(self, steps: int) -> LocalSGD:
        """Accelerate's LocalSGD of `steps` steps a round, begun: the gradients stay a rank's own. Of "ddp" alone."""
        local = LocalSGD(self._accelerator, self.model, steps)
        local.__enter__()
        return local

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name, on every rank."""
        if self.engine == "zero3":
            state = full_state_dict(self.module)
            return {name: state[name] for name, _ in self.module.named_parameters()}
        return {name: whole(parameter).clone() for name, parameter in self.module.named_parameters()}


def _config(stage: int, optimizer: str) -> dict[str, Any]:
    params = {"lr": "auto", "weight_decay": "auto"} | ({"torch_adam": True} if optimizer == "adam" else {})
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": {"sgd": "SGD", "adam": "Adam"}[optimizer], "params": params},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
