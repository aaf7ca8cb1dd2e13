"""Trainings by the HF Trainer, and by a plain loop, for test_trainer.py."""

import gc
import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.models import ModelConfig, NoEncoder, SlideModel, build_aggregator
from ds_wsi.norms import NormPolicy
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.slides import TilingPolicy
from ds_wsi.stacking import stack_bags

RATE, SEED = 0.1, 5
# The oracle's: each bag by itself. What the Trainer decides by itself has tests of its own.
NORM = NormPolicy(training="bag", evaluation="running")
CONFIG = ModelConfig("test_resnet", "gated_abmil", ("a", "b"), asdict(TilingPolicy(tile_size_px=32)))


class Bags(list):
    @property
    def lengths(self):
        return [len(bag.get("features", bag.get("tiles"))) for bag in self]


def make_bags(kind, n_bags):
    """Bags of two to six features of width 8, or tiles of 16 px."""
    generator = torch.Generator().manual_seed(1)
    bags = Bags()
    for index in range(n_bags):
        length = 2 + (index * 3) % 5
        if kind == "features":
            bags.append({"features": torch.randn(length, 8, generator=generator), "labels": index % 2})
        else:
            tiles = torch.randint(0, 256, (length, 3, 16, 16), dtype=torch.uint8, generator=generator)
            bags.append({"tiles": tiles, "labels": index % 2})
    return bags


def make_slide_model(kind, dropout=0.0):
    torch.manual_seed(0)
    if kind == "features":  # with an auxiliary loss that needs the labels
        return SlideModel(NoEncoder(8), build_aggregator("clam_sb", 8, 2, embed_dim=16, dropout=dropout)).float()
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    encoder.append(nn.Flatten())
    return SlideModel(encoder, build_aggregator("gated_abmil", 6, 2, dropout=dropout)).float()


def plain_loop(steps, bags, kind, wrong=None):
    """SGD bag by bag, each step the mean over its bags; `wrong`: the mean of the means of its two halves."""
    model = make_slide_model(kind).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in steps:
        cut = len(step) // 3 + 1
        for position, index in enumerate(step):
            value = bags[index].get("features", bags[index].get("tiles"))
            label = torch.tensor([bags[index]["labels"]])
            out = model(stack_bags([value]), label)
            loss = F.cross_entropy(out.logits, label)
            if out.auxiliary_loss is not None:
                loss = loss + out.auxiliary_loss.sum()
            rank_bags = cut if position < cut else len(step) - cut
            (loss / (2 * rank_bags if wrong and len(step) > 1 else len(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def steps_of(n_bags, world, accumulation, *, plain=False):
    """The bags of each step of one epoch; a plain Trainer's in their order."""
    size = world * 2 * accumulation
    if plain:
        return [list(range(n_bags))[start : start + size] for start in range(0, n_bags, size)]
    plan = plan_epoch(n_bags, StepLayout(world, 2, accumulation), seed=SEED, epoch=0)
    return [[bag for ranks in step.micro_steps for bags in ranks for bag in bags] for step in plan]


def forget():
    """Make Accelerate and Transformers forget the engine before this one."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def make_trainer(engine, bags, kind, accumulation=1, *, plain=False, dropout=0.0, section=None, model=None, **options):
    """A Trainer, or a SlideTrainer, with two bags per rank and micro-step."""
    from transformers import Trainer, TrainingArguments

    from ds_wsi.engines.hf.models import SlideCollator, SlideModelConfig, SlideModelForSlideClassification
    from ds_wsi.engines.hf.trainer import CommHookCallback, SlideTrainer, apply_policies
    from ds_wsi.engines.machine import cpu

    class InOrder(Trainer):
        """What `train_sampling_strategy="sequential"` says in Transformers 5."""

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(bags)

    takes_strategy = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    forget()
    config = None
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",  # left out, Accelerate clips at 1
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "fp16": {"enabled": False},  # left out, Transformers 4 halves inputs
            **({} if section is None else {"ds_wsi": section}),
        }
    arguments = {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "seed": SEED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        **cpu.trainer_arguments(deepspeed=config is not None),
        **({"train_sampling_strategy": "sequential"} if plain and takes_strategy else {}),
        **options,
    }
    arguments = TrainingArguments(deepspeed=config, **arguments)
    if model is None:
        model = SlideModelForSlideClassification(SlideModelConfig.of(CONFIG), make_slide_model(kind, dropout))
    data = {"data_collator": SlideCollator(), "train_dataset": bags, "eval_dataset": bags}
    if not plain:
        return SlideTrainer(model, arguments, norm=NORM, **data)
    apply_policies(model, arguments, NORM)
    trainer = (Trainer if takes_strategy else InOrder)(model, arguments, **data)
    trainer.comm = CommHookCallback(trainer)
    trainer.add_callback(trainer.comm)
    return trainer


def weights(trainer):
    from ds_wsi.engines.sharded.zero import full_state_dict

    whole = full_state_dict(trainer.model.slide_model)
    # How many bags a rank's BatchNorm saw is its own affair, and decides nothing here.
    return {name: value.clone() for name, value in whole.items() if not name.endswith("num_batches_tracked")}


# The encoder in chunks of two tiles, computed again in backward; bags dealt by their lengths, as many a step.
SECTION = {
    "partition": {"mode": "recompute", "chunk_size": 2, "bn_population": "bag"},
    "stacking": {"bags_per_step": 12, "pack_bytes": 100},
}


def train_cases(cases):
    """Train each case on one rank; a case is (engine, kind, accumulation, bags, plain)."""
    trained = []
    for engine, kind, accumulation, n_bags, plain in cases:
        section = SECTION if (engine, kind) == ("zero2", "tiles") else None
        if plain and engine == "zero2":
            section = {"compression": {"hook": "allreduce"}}
        bags = make_bags(kind, n_bags)
        trainer = make_trainer(engine, bags, kind, accumulation, plain=plain, section=section)
        trainer.train()
        assert wrapped_as(trainer) == engine
        if section is SECTION:
            assert isinstance(trainer.model.slide_model.encoder.forward, PartitionedForward)
        assert (trainer.comm.handle is not None) == (section is not None and "compression" in section)
        trained.append(weights(trainer))
    forget()
    return trained


def wrapped_as(trainer):
    """The engine that trained, so that no case passes under another one."""
    wrapped = trainer.model_wrapped
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    return "ddp" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "one"


def resume_case(engine, folder, section=None):
    """The weights of an uninterrupted training, and of one that stopped in the middle of an epoch and went on."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **keywords):
            control.should_training_stop = state.global_step == 3

    states, kept = [], []
    for name, stop, resume in (("whole", False, None), ("cut", True, None), ("cut", False, True)):
        options = {"output_dir": str(Path(folder) / name), "num_train_epochs": 2, "optim": "adamw_torch"}
        options |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "learning_rate": 0.01}
        # Dropout: the generators' states must come back too; BatchNorm's statistics are of each rank.
        trainer = make_trainer(engine, make_bags("tiles", 13), "tiles", 2, dropout=0.3, section=section, **options)
        if stop:
            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        states.append(weights(trainer))
        kept.append(trainer.comm.handle)
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = json.loads((Path(folder) / "cut" / "checkpoint-3" / "trainer_state.json").read_text())
    forget()
    return {
        "whole": states[0],
        "stopped": states[1],
        "resumed": states[2],
        "stopped_at": state["global_step"],
        "wire_bytes": 0 if kept[2] is None else kept[2].count.push.wire_bytes,
        "own_state": len(list((Path(folder) / "cut" / "checkpoint-3").glob(f"comm_hook-{rank:05}-of-*"))),
    }


def evaluate_case(engine):
    """Labels and logits of seven bags over the ranks, after no training."""
    trainer = make_trainer(engine, make_bags("tiles", 7), "tiles")
    prediction = trainer.predict(trainer.eval_dataset)
    forget()
    return {"labels": torch.tensor(prediction.label_ids), "logits": torch.tensor(prediction.predictions)}


def load_case(folder):
    """from_pretrained while ZeRO-3 is on: parameters are born in shards."""
    from ds_wsi.engines.hf.models import SlideModelForSlideClassification
    from ds_wsi.engines.sharded.zero import full_state_dict

    trainer = make_trainer("zero3", make_bags("tiles", 4), "tiles")
    model = SlideModelForSlideClassification.from_pretrained(folder)
    partitioned = all(hasattr(p, "ds_id") for p in model.parameters())
    state = full_state_dict(model)
    state["slide_model.mean"] = model.slide_model.mean.clone()
    del trainer
    forget()
    return {"partitioned": partitioned, "state": state}


@contextmanager
def quick_collections():
    """The Trainer collects garbage at each start: half a second over all that is imported, unless that is left out."""
    import deepspeed  # noqa: F401

    import ds_wsi.engines.hf.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@quick_collections()
def on_rank(cases, folder, pretrained):
    """Everything that two ranks are asked for, in one launch."""
    return {
        "trained": train_cases(cases),
        "predicted": [evaluate_case("ddp"), evaluate_case("zero3")],
        "resumed": resume_case("zero2", folder, {"compression": {"hook": "topk", "keep": 0.2}}),
        "loaded": load_case(pretrained),
    }
