"""A small model and its training under each engine, with a communication hook or without."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

STEPS = 2
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
ZERO = ("zero0", "zero1", "zero2", "zero3")
KEEP = 0.1
HOOKS = {engine: "topk" if engine == "zero0" else "dmgc" for engine in ENGINES}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.LayerNorm(33), nn.Linear(33, 5, bias=False), nn.Linear(5, 3))


def batch_of(number, rank):
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randn(4, 7, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def zero_config(stage, *, accumulation=1, optimizer="SGD", **more):
    zero = {"stage": stage, "reduce_bucket_size": 300, **more.pop("zero", {})}  # several buckets a step
    params = {"lr": 0.1, "weight_decay": 0.0} | ({"torch_adam": True} if optimizer != "SGD" else {})
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": optimizer, "params": params},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


class Trainer:
    """Plain SGD (or Adam) steps under an engine, `accumulation` micro-steps each."""

    def __init__(self, engine, *, accumulation=1, autocast=False, optimizer="SGD", coalesced=False, **config):
        self.engine, self.accumulation, self.autocast = engine, accumulation, autocast
        self.module = make_model()
        self.number, self.coalesced = 0, coalesced
        make = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[optimizer]
        if engine in ZERO:
            import deepspeed

            if autocast:
                config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            settings = zero_config(int(engine[-1]), accumulation=accumulation, optimizer=optimizer, **config)
            self.model, *_ = deepspeed.initialize(
                model=self.module, model_parameters=list(self.module.parameters()), config=settings
            )
            return
        if engine == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.module)
        elif engine == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in self.module.children():
                if list(part.parameters()):
                    fully_shard(part, mesh=mesh)
            self.model = fully_shard(self.module, mesh=mesh)
        self.optimizer = make(self.model.parameters(), lr=0.1)

    def step(self):
        """One optimizer step on the next batches."""
        if self.coalesced:
            with self.model.coalesce_grad_reduction():
                for _ in range(self.accumulation):
                    x, y = batch_of(self.number, dist.get_rank())
                    self.number += 1
                    self.model.backward(F.cross_entropy(self.model(x).float(), y))
            self.model.set_gradient_accumulation_boundary(True)
            self.model.step()
            return
        for micro in range(self.accumulation):
            x, y = batch_of(self.number, dist.get_rank())
            self.number += 1
            last = micro == self.accumulation - 1
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and self.engine not in ZERO):
                if self.engine in ZERO:
                    given = x.to(next(self.module.parameters()).dtype)
                    self.model.backward(F.cross_entropy(self.model(given).float(), y))
                    self.model.step()
                    continue
                if self.engine == "fsdp2":
                    self.model.set_requires_gradient_sync(last)
                else:
                    self.model.require_backward_grad_sync = last
                (F.cross_entropy(self.model(x).float(), y) / self.accumulation).backward()
        if self.engine not in ZERO:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self):
        """Whole weights, flat."""
        from ds_wsi.engines.sharded.zero import full_state_dict

        if self.engine == "fsdp2":
            return torch.cat([p.full_tensor().detach().flatten() for p in self.module.parameters()])
        state = full_state_dict(self.module)
        return torch.cat([state[name].flatten() for name, _ in self.module.named_parameters()])


def register(trainer, hook, keep=1.0, **more):
    from ds_wsi.compression.comm import CommPolicy
    from ds_wsi.engines.comm_hooks.register import attach

    return attach(trainer.model, CommPolicy(hook=hook, keep=keep, **more))


def trained(engine, hook, *, keep=1.0, steps=STEPS, **how):
    trainer = Trainer(engine, **how)
    handle = register(trainer, hook, keep) if hook else None
    for _ in range(steps):
        trainer.step()
    if handle:
        handle.state_dict()
    return trainer.weights(), handle


def first_error(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


class each:  # noqa: N801  (a function of a function, picklable)
    """`body(engine)` of each engine, in one launch."""

    def __init__(self, body):
        self.body = body

    def __call__(self, engines):
        return {engine: self.body(engine) for engine in engines}
