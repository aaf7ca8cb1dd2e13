"""The HF Trainer with our policies: bags dealt without repeats, partitioned layers, communication hooks, resume.

[Note: plain Trainer] `transformers.Trainer` itself trains a `SlideModelForSlideClassification`, with `SlideCollator`,
`remove_unused_columns=False`, `apply_policies` before it is made and a `CommHookCallback` added. Its loss is scaled
right; but where the bags of an epoch do not fill its last round, Accelerate fills up with bags from the epoch's start,
whose gradients then count in that step. `SlideTrainer` deals every bag once, and does the rest by itself.

[Note: evaluation] is the Trainer's: logits and labels of every bag once, in order. `eval_loss` weighs the batches of
several ranks by their size, the repeats that fill the last one included; metrics of `compute_metrics` do not see them.

Dropout draws from torch's generators here, by rank and place, and is not keyed by bag as in `ds-wsi train`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import seed_worker

from ds_wsi.config import SECTION, DsWsiConfig, read_section
from ds_wsi.engines.accelerator.engine import attach_hook, average_buffers
from ds_wsi.engines.comm_hooks.register import CommHandle
from ds_wsi.engines.deepspeed_json.config import suit_machine
from ds_wsi.engines.hf.deepspeed_files import tensors_alone
from ds_wsi.engines.hf.models import SlideCollator, SlideModelForSlideClassification
from ds_wsi.engines.hf.step_batches import OrIdle, StepBatches, bag_lengths
from ds_wsi.engines.machine.nvme import NvmeSpill
from ds_wsi.engines.policies.loops import Calls, Norms, decide_norms, require_whole_norms
from ds_wsi.engines.policies.norms import apply_training, partition_of
from ds_wsi.engines.sharded.zero import gather_as_one
from ds_wsi.norms import NormPolicy, batch_norms
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams
from ds_wsi.stacking.packs import PackedForward, pack_bags


def read_policies(args: TrainingArguments) -> DsWsiConfig:
    """The "ds_wsi" section of the DeepSpeed JSON of the arguments, or of `accelerate launch`; defaults without one.

    Raises:
        ValueError: names the key that is wrong, or that says "auto".
    """
    section = _deepspeed_config(args).get(SECTION, {})
    for key, value in _leaves(section, SECTION):
        if value == "auto":
            raise ValueError(
                f'{key} must not be "auto" under the HF Trainer, Accelerate looks for a value of its own wherever it '
                "reads the word. HINT: leave partition.mode out (auto is its default), name the hook of compression"
            )
    return read_section(section)


def _deepspeed_config(args: TrainingArguments) -> dict[str, Any]:
    plugin = getattr(args, "deepspeed_plugin", None)
    return {} if plugin is None else dict(plugin.deepspeed_config)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def apply_policies(
    model: SlideModelForSlideClassification, args: TrainingArguments, norm: NormPolicy | None = None
) -> DsWsiConfig:
    """Apply the "ds_wsi" section's norm, partition and stacking to the model, in place, before a Trainer wraps it.

    `norm` takes the place of the section's, because there is none without a DeepSpeed JSON.

    Layers that are partitioned already stay so. At ZeRO-3 the encoder is gathered once for a stack of any length. The
    DeepSpeed config of the arguments takes the Adam that this machine can build (`suit_machine`).

    Returns:
        The policies; `compression` is `CommHookCallback`'s.

    Raises:
        ValueError: a policy that the HF Trainer cannot follow.
    """
    policies, norms = _apply_policies(model, args, norm)
    _evaluate(model, norms)
    return policies


def _apply_policies(
    model: SlideModelForSlideClassification, args: TrainingArguments, norm: NormPolicy | None
) -> tuple[DsWsiConfig, Norms]:
    """What `apply_policies` does, but for the evaluation."""
    policies, slide_model = read_policies(args), model.slide_model
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        suit_machine(plugin.deepspeed_config)
    policies = policies if norm is None else replace(policies, norm=norm)
    if policies.tile_parallel.size != 1:
        raise ValueError(
            f"{SECTION}.tile_parallel.size must be 1 under the HF Trainer, which gives each rank bags of its own, got "
            f"{policies.tile_parallel.size}. HINT: launch/train.py shares bags between ranks"
        )
    if policies.stacking.framework not in ("dpgs", "classic"):
        raise ValueError(
            f"{SECTION}.stacking.framework must be dpgs or classic under the HF Trainer, got "
            f"{policies.stacking.framework}. HINT: launch/train.py has the others, to compare with"
        )
    unused = [name for name in ("tiling", "reading", "augment") if name in _deepspeed_config(args).get(SECTION, {})]
    if unused:
        logger.warning("%s of %s: of no effect, the HF Trainer's data set reads the bags", ", ".join(unused), SECTION)
    norms = _apply_norms(policies, model, args)
    zero3 = _deepspeed_config(args).get("zero_optimization", {}).get("stage") == 3
    partition: Any = partition_of(policies.partition, slide_model.norm_training, 1)
    if not isinstance(slide_model.encoder.__dict__.get("forward"), PartitionedForward):
        if partition.mode != "native":
            partition_layers(slide_model.encoder, partition, spill=NvmeSpill.of(partition))
        elif zero3 and any(True for _ in slide_model.encoder.parameters()):
            # ZeRO-3 gathers a module at each call, on all ranks together; ranks have more and fewer bags.
            partition_layers(slide_model.encoder, PartitionPolicy(mode="native", bn_population="bag"))
    if policies.stacking.pack_bytes and not isinstance(slide_model.aggregator.__dict__.get("forward"), PackedForward):
        pack_bags(slide_model.aggregator, policies.stacking.pack_bytes)
    if zero3:
        gather_as_one(slide_model)
    return policies, norms


def _apply_norms(policies: DsWsiConfig, model: SlideModelForSlideClassification, args: TrainingArguments) -> Norms:
    """What the encoder's BatchNorm averages over in training; the evaluation that goes with it is left to `_evaluate`.

    A step's micro-steps are calls of the Trainer's own: "step" is of one of them, and "auto" then takes the bags of a
    micro-step of one process.

    Raises:
        ValueError: norms over a step of several micro-steps, or a DDP that would copy rank 0's statistics.
    """
    if args.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers must not be True: DDP would copy rank 0's running statistics over every other "
            "rank's at each forward. HINT: leave it out"
        )
    args.ddp_broadcast_buffers = False
    slide_model = model.slide_model
    if not batch_norms(slide_model.encoder):
        return Norms(slide_model.norm_training, slide_model.norm_evaluation)
    calls = Calls(
        bags=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        place="under the HF Trainer",
        more_bags="per_device_train_batch_size=8",
    )
    norms = decide_norms(policies, slide_model, calls)
    apply_training(norms.training, policies.norm, slide_model)
    return norms


def _evaluate(model: SlideModelForSlideClassification, norms: Norms) -> None:
    """Let the model be evaluated as it is trained from now on, and its configuration say so."""
    model.slide_model.set_norms(evaluation=norms.evaluation)
    model.slide_model.norms_from = "config.json"
    model.config.slide_model |= {"norm_training": norms.training, "norm_evaluation": norms.evaluation}


class CommHookCallback(TrainerCallback):
    """The hook of "ds_wsi": {"compression": ...} while a Trainer trains, its state in the Trainer's checkpoints.

    Args:
        trainer: the Trainer, whose wrapped model gets the hook: `trainer.add_callback(CommHookCallback(trainer))`.
        resume_from: the checkpoint, where `train` resumes from one outside of `output_dir`.

    Attributes:
        handle: the handle of the present or the last training; None where there is no hook, or one rank.
    """

    def __init__(self, trainer: Trainer, resume_from: str | Path | None = None) -> None:
        self.trainer, self.resume_from = trainer, resume_from
        self.handle: CommHandle | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **keywords: Any) -> None:
        """Register, and go on from the checkpoint where the training does. Collective."""
        policy = read_policies(args).compression
        self.handle = attach_hook(self.trainer.accelerator, self.trainer.model_wrapped, policy)
        if self.handle is not None and state.global_step:
            self.handle.load(self.resume_from or _checkpoint(args, state))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **keywords: Any) -> None:
        """Save one file per rank, beside the engine's."""
        if self.handle is not None:
            self.handle.save(_checkpoint(args, state))

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **keywords: Any) -> None:
        """Give the reductions back; `handle.metrics()` stays."""
        if self.handle is not None:
            self.handle.remove()


def _checkpoint(args: TrainingArguments, state: Any) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class SlideTrainer(Trainer):
    """`transformers.Trainer` whose steps are the exact mean over their bags, and which follows the "ds_wsi" section.

    Each epoch deals every bag once (`StepBatches`, keyed by `data_seed` or `seed`); ranks may have more and fewer bags,
    or none. The section's partition, stacking and compression are applied; BatchNorm's running statistics are averaged
    over the ranks before they are saved or used to evaluate. All else is the Trainer's: options, callbacks,
    checkpoints, `resume_from_checkpoint`, DeepSpeed at ZeRO 0 to 3, DDP.

    Args:
        model: a `SlideModelForSlideClassification`.
        args: `remove_unused_columns` becomes False: columns are turned into inputs by the collator.
        data_collator: None takes `SlideCollator()`.
        norm: what the encoder's BatchNorm averages over, in the place of the section's.
        keywords: the Trainer's other arguments.

    Attributes:
        policies: the section's policies.
        comm: the callback with the hook.

    Raises:
        ValueError: what this cannot follow, with the reason.
    """

    def __init__(
        self,
        model: SlideModelForSlideClassification,
        args: TrainingArguments,
        data_collator: Callable[..., Any] | None = None,
        norm: NormPolicy | None = None,
        **keywords: Any,
    ) -> None:
        if not isinstance(model, SlideModelForSlideClassification):
            raise ValueError(
                f"model must be a SlideModelForSlideClassification, got {type(model).__name__}. "
                "HINT: SlideModelForSlideClassification(SlideModelConfig.of(config), slide_model), with config of "
                'ModelConfig(encoder, "abmil", classes, tiling), or of features ModelConfig(None, "abmil", classes, '
                "in_dim=512)"
            )
        check_seams("transformers", "trainer")
        _require_arguments(args, keywords)
        if config := _deepspeed_config(args):
            require_whole_norms(model, config, [kind for kind in ("bf16", "fp16") if getattr(args, kind)])
        is_of_run = model.slide_model.norms_from == "config.json"
        self.policies, self._norms = _apply_policies(model, args, norm)
        # Before it is trained a run's model is evaluated, and exported, as its config.json says.
        if not is_of_run or self.policies.norm.evaluation != "auto":
            _evaluate(model, self._norms)
        args.remove_unused_columns = False
        super().__init__(model=model, args=args, data_collator=data_collator or SlideCollator(), **keywords)
        self.comm = CommHookCallback(self)
        self.add_callback(self.comm)

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **keywords: Any) -> Any:
        """Train as the Trainer does; no file of a checkpoint can run code when it is read."""
        model: Any = self.model
        _evaluate(model, self._norms)
        given = isinstance(resume_from_checkpoint, str | Path)
        self.comm.resume_from = resume_from_checkpoint if given else None
        with tensors_alone() if self.is_deepspeed_enabled else nullcontext():
            return super().train(resume_from_checkpoint, *arguments, **keywords)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-steps.

        Raises:
            ValueError: no data set, or one without a length.
        """
        dataset: Any = self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"train_dataset must have a length and rows, to deal them out, got {type(dataset).__name__}. HINT: "
                'transformers.Trainer takes iterable ones, with accelerator_config={"dispatch_batches": False}'
            )
        args, stacking = self.args, self.policies.stacking
        collate: Any = self.data_collator
        counts = (stacking.virtual_workers, args.gradient_accumulation_steps)
        if counts[0] not in (None, counts[1]):
            raise ValueError(
                f"{SECTION}.stacking.virtual_workers must be gradient_accumulation_steps, {counts[1]}, got {counts[0]}"
            )
        batches = StepBatches(
            len(dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
            bags_per_rank=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            drop_last=args.dataloader_drop_last,
            stacking=stacking if stacking.deals else None,
            lengths=bag_lengths(dataset, args.length_column_name) if stacking.deals else (),
        )
        workers = args.dataloader_num_workers
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=OrIdle(collate, dataset),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            # Not torch's own generator: a resumed run must go on with the numbers of the uninterrupted one.
            generator=torch.Generator().manual_seed(args.seed),
        )
        # Dealt already: to Accelerate each rank is alone.
        return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)

    @property
    def _module(self) -> nn.Module:
        module: Any = self.model
        return module

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does, with averaged running statistics. Collective."""
        average_buffers(self.accelerator, self._module)
        super().save_model(output_dir, _internal_call)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Evaluate as the Trainer does, with averaged running statistics. Collective."""
        average_buffers(self.accelerator, self._module)
        return super().evaluation_loop(*arguments, **keywords)

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log as the Trainer does, with the hook's bytes."""
        if self.is_in_train and self.comm.handle is not None:
            logs |= self.comm.handle.metrics()
        super().log(logs, *arguments, **keywords)


def _require_arguments(args: TrainingArguments, keywords: Mapping[str, Any]) -> None:
    def require(met: Any, words: str, hint: str) -> None:
        if not met:
            raise ValueError(f"{words}. HINT: {hint}")

    require(
        # In one process the versions of Transformers 4 turn it off by themselves: its bags are all there are.
        args.average_tokens_across_devices or args.world_size == 1,
        "average_tokens_across_devices must be True, got False: each rank would divide by its own bags",
        "leave it out, True is its default",
    )
    require(
        args.n_gpu <= 1,
        f"a process must have one GPU, got {args.n_gpu}: nn.DataParallel cuts batches by rows",
        "torchrun --nproc_per_node, or CUDA_VISIBLE_DEVICES=0",
    )
    require(
        args.label_smoothing_factor == 0,
        f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the Trainer's smoother takes the labels "
        "from the model, whose aggregator may need them",
        "a loss of your own in a subclass of the model",
    )
    require(
        not args.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true",
        "fsdp must be off, got it on: PyTorch unpickles what lies in its checkpoints, and a stranger's code would run",
        "DeepSpeed's ZeRO 3; or launch/train.py, whose checkpoints are tensors alone, with --fsdp",
    )
    config = _deepspeed_config(args)
    require(
        not config.get("checkpoint", {}).get("load_universal"),
        "checkpoint.load_universal of the DeepSpeed config must be off, got it on: DeepSpeed unpickles what lies in "
        "such a checkpoint, and a stranger's code would run",
        "leave it out",
    )
    trainers = getattr(args, "hf_deepspeed_config", None)
    require(
        trainers is None or trainers.dtype() != torch.float16 or trainers.is_true("fp16.enabled"),
        "fp16 of the DeepSpeed config must be there, got none: the Trainer of Transformers 4 would halve its inputs",
        '"fp16": {"enabled": false}',
    )
    require(
        not config or "gradient_clipping" in config or args.max_grad_norm == 1,
        "gradient_clipping of the DeepSpeed config must be there where max_grad_norm is not 1, got none: Accelerate "
        "would clip at 1",
        '"gradient_clipping": "auto"',
    )
    accelerator = args.accelerator_config
    require(
        not getattr(accelerator, "split_batches", False) and not getattr(accelerator, "dispatch_batches", None),
        "accelerator_config must not say split_batches or dispatch_batches: they cut batches by rows",
        "leave them out",
    )
    for name in ("compute_loss_func", "model_init"):
        require(keywords.get(name) is None, f"{name} must be None, got one", "subclass the model instead")
