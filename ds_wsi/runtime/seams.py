"""Every private name of torch, DeepSpeed, Accelerate and transformers that ds_wsi uses: one table, checked by name.

A private name can go with any release. Each has a row here: what it is used for, and the versions that it was seen in.
`check_seams` runs where names are first needed and refuses a version without one of them by name; the alternative is an
AttributeError in the middle of a run. Rows say in which packages of ds_wsi a name may be written (`places`); everybody
else takes it from a function or a class of this module. A test compares the table with the source.

[Note: rows] `module:path` names what is imported and looked up. `module:*.name` is an attribute that the module gives
to instances, which no class tells: there the module's text must have the name. A row that is optional has an older way
beside it, at the place where it is used.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch._utils import ExceptionWrapper
    from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
    from torch.nn.modules.dropout import _DropoutNd as AnyDropout
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

__all__ = [
    "CLASSES",
    "SEAMS",
    "AnyBatchNorm",
    "AnyDropout",
    "ExceptionWrapper",
    "FakeTensor",
    "FakeTensorMode",
    "Seam",
    "SeamError",
    "TorchDispatchMode",
    "check_replaced",
    "check_seams",
    "tree_leaves",
]

# Package -> the oldest and the newest release whose source was looked at.
SEEN = {
    "torch": ("2.11.0", "2.14.1"),
    "deepspeed": ("0.18.0", "0.19.8"),
    "accelerate": ("1.10.0", "1.15.0"),
    "transformers": ("4.56.0", "5.24.0"),
}


class SeamError(ValueError):
    """An installed package lacks a private name that ds_wsi uses; names it, the versions and the remedy."""


class Seam(NamedTuple):
    """A private name.

    Attributes:
        name: [Note: rows].
        use: what needs it: `check_seams` checks the rows of a use together.
        purpose: what it is used for, in words.
        places: packages of ds_wsi that may write it.
        takes: names of its parameters, where ds_wsi calls or replaces it.
        optional: whether there is another way where it is missing.
        since: the oldest version that has it; empty: the oldest of `SEEN`.
    """

    name: str
    use: str
    purpose: str
    places: tuple[str, ...] = ()
    takes: tuple[str, ...] | None = None
    optional: bool = False
    since: str = ""

    @property
    def package(self) -> str:
        """The distribution."""
        return self.name.partition(":")[0].partition(".")[0]

    @property
    def leaf(self) -> str:
        """What is written in the source: the last part of the name."""
        return self.name.rpartition(":")[2].rpartition(".")[2]

    @property
    def dotted(self) -> str:
        """The name in words of an error."""
        return self.name.replace(":*.", " > ").replace(":", ".")


_PARTITION, _ENGINES, _TRAINING = ("partition",), ("engines",), ("training",)
_BOTH = _PARTITION + _ENGINES
_C10D = "torch.distributed.distributed_c10d"
_FSDP = "torch.distributed.fsdp._fully_shard"
_ENGINE, _ZERO12 = "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage_1_and_2"
_ZERO3, _PARAMETERS = "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.partition_parameters"
_STAGE3 = "DeepSpeedZeroOptimizer_Stage3"

SEAMS: tuple[Seam, ...] = (
    # --- torch: classes and functions of private modules ---
    Seam("torch.nn.modules.batchnorm:_BatchNorm", "class", "what all BatchNorms are", _BOTH),
    Seam("torch.nn.modules.batchnorm:_NormBase", "class", "what BatchNorm and InstanceNorm are", _PARTITION),
    Seam("torch.nn.modules.instancenorm:_InstanceNorm", "class", "what all InstanceNorms are", _PARTITION),
    Seam("torch.nn.modules.dropout:_DropoutNd", "class", "what all dropouts are", _PARTITION),
    Seam("torch.nn.utils.parametrizations:_SpectralNorm", "class", "a weight that forward changes", _PARTITION),
    Seam("torch._subclasses.fake_tensor:FakeTensor", "class", "tensors of shapes alone", _PARTITION),
    Seam("torch._subclasses.fake_tensor:FakeTensorMode", "class", "to compute on shapes alone", _PARTITION),
    Seam("torch._utils:ExceptionWrapper", "class", "a worker's error with its traceback"),
    Seam("torch.utils._python_dispatch:TorchDispatchMode", "class", "to see every operation", _PARTITION),
    Seam("torch.utils:_pytree", "class", "the tensors in nested outputs", _PARTITION),
    Seam("torch.utils._pytree:tree_leaves", "class", "the tensors in nested outputs", _PARTITION),
    Seam("torch.utils._pytree:tree_map", "partition", "to change the tensors in nested outputs", _PARTITION),
    # --- torch: operations and storages ---
    Seam("torch:UntypedStorage._cdata", "meter", "which storage a tensor has, a fake one too", _PARTITION),
    Seam("torch._ops:*._schema", "meter", "whether an operation writes to its inputs", _PARTITION),
    Seam("torch._ops:*._overloadpacket", "meter", "which operation an overload is of"),
    Seam("torch:Tensor._version", "partition", "whether a tensor was changed in place", _PARTITION),
    Seam(
        "torch.utils._python_dispatch:_disable_current_modes", "partition", "to compute beside a recording", _PARTITION
    ),
    Seam(
        "torch.utils._python_dispatch:_get_current_dispatch_mode_stack", "partition", "modes of the caller", _PARTITION
    ),
    # --- torch: modules ---
    *(
        Seam(f"torch.nn.modules.module:*.{name}", "partition", f"a module's {words}", _PARTITION)
        for name, words in {
            "_parameters": "parameters by name",
            "_buffers": "buffers by name",
            "_modules": "parts by name",
            "_forward_pre_hooks": "hooks before forward",
            "_forward_hooks": "hooks after forward",
            "_backward_pre_hooks": "hooks before backward",
            "_backward_hooks": "hooks after backward",
            "_compiled_call_impl": "compiled call",
        }.items()
    ),
    *(
        Seam(f"torch.nn.modules.module:_global{kind}_hooks", "partition", "hooks on all modules", _PARTITION)
        for kind in ("_forward_pre", "_forward", "_backward_pre", "_backward")
    ),
    Seam("torch.nn.modules.module:Module._call_impl", "partition", "a module's call, uncompiled", _PARTITION),
    Seam(
        "torch.nn.modules.module:*._non_persistent_buffers_set",
        *("buffers", "which buffers are not saved", _BOTH + _TRAINING),
    ),
    Seam("torch._dynamo.eval_frame:*._orig_mod", "partition", "what torch.compile was given", _PARTITION),
    Seam("torch._dynamo.eval_frame:*.OptimizedModule", "partition", "what torch.compile makes", _PARTITION),
    Seam("torch.nn.modules.conv:*._reversed_padding_repeated_twice", "partition", "a padding's sides", _PARTITION),
    # --- torch: what autograd is doing around a call ---
    Seam("torch:_C._are_functorch_transforms_active", "partition", "whether torch.func is at work", _PARTITION),
    Seam("torch:_C._functorch.is_functorch_wrapped_tensor", "partition", "tensors of torch.func", _PARTITION),
    Seam("torch:_C._functorch.is_legacy_batchedtensor", "partition", "several gradients at once", _PARTITION),
    Seam("torch:_C._functions.DelayedError", "partition", "to refuse a second derivative", _PARTITION),
    Seam("torch.autograd.forward_ad:_current_level", "partition", "whether forward mode is at work", _PARTITION),
    *(
        Seam(f"torch:_C._autograd._{verb}_saved_tensors_default_hooks", "partition", "hooks that save", _PARTITION)
        for verb in ("top", "pop", "push")
    ),
    Seam("torch:_C._current_graph_task_id", "partition", "whether a backward is running", _PARTITION),
    Seam("torch.utils.checkpoint:_checkpoint_hook", "partition", "whether a checkpoint is around", _PARTITION),
    Seam("torch.nn.utils.parametrize:_cache_enabled", "partition", "weights that are computed once", _PARTITION),
    # --- torch: processes ---
    Seam(f"{_C10D}:_get_default_store", "ranks", "where ranks leave word", takes=()),
    Seam(f"{_C10D}:_world", "timeouts", "all process groups", _ENGINES),
    Seam(f"{_C10D}:_set_pg_timeout", "timeouts", "a group's timeout", _ENGINES, ("timeout", "group"), optional=True),
    Seam(f"{_C10D}:default_pg_timeout", "timeouts", "the timeout of new groups", _ENGINES),
    Seam(f"{_C10D}:default_pg_nccl_timeout", "timeouts", "the timeout of new groups of GPUs", _ENGINES),
    Seam("torch.distributed:ProcessGroup._get_backend", "timeouts", "a group's backend", _ENGINES),
    Seam("torch._C._distributed_c10d:Backend.Options._timeout", "timeouts", "a backend's timeout", _ENGINES),
    Seam("torch.nn.parallel.distributed:*._comm_hooks", "hook ddp", "whether DDP has a hook already", _ENGINES),
    Seam("torch.distributed.fsdp:FSDPModule._get_fsdp_state", "hook fsdp2", "an FSDP2 unit's state", takes=()),
    # Before it has several groups of parameters a unit has one.
    Seam(f"{_FSDP}._fsdp_state:*._fsdp_param_groups", "hook fsdp2", "a unit's parameters", optional=True),
    Seam(f"{_FSDP}._fsdp_state:*._fsdp_param_group", "hook fsdp2", "a unit's parameters"),
    Seam(f"{_FSDP}._fsdp_param:*._orig_size", "hook fsdp2", "a parameter's whole shape", _ENGINES),
    Seam(f"{_FSDP}._fsdp_param:*._module_info", "hook fsdp2", "a parameter's module and name", _ENGINES),
    Seam(f"{_FSDP}._fsdp_param:*.sharded_param", "hook fsdp2", "a parameter's shard", _ENGINES),
    Seam(f"{_FSDP}._fsdp_param:*.fsdp_placement", "hook fsdp2", "how a parameter is sharded", _ENGINES),
    Seam(f"{_FSDP}._fsdp_param_group:*.fsdp_params", "hook fsdp2", "a group's parameters", _ENGINES),
    Seam(f"{_FSDP}._fsdp_param_group:*._reduce_scatter_comm", "hook fsdp2", "its reduction, to go back to", _ENGINES),
    Seam(f"{_FSDP}._fsdp_api:ReduceScatter", "hook fsdp2", "what a reduction is", _ENGINES),
    Seam(
        f"{_FSDP}._fsdp_api:ReduceScatter.__call__",
        *("hook fsdp2", "how a reduction is called", _ENGINES),
        takes=("output_tensor", "input_tensor", "group", "op", "async_op"),
    ),
    # --- Accelerate and transformers ---
    Seam(
        "accelerate.state:AcceleratorState._reset_state",
        *("engine", "another engine in the same process", _ENGINES, ("reset_partial_state",)),
    ),
    Seam("accelerate.state:GradientState._reset_state", "engine", "the same", _ENGINES, takes=()),
    Seam("accelerate.state:PartialState._shared_state", "engine", "FSDP2 on a CPU", _ENGINES),
    Seam("accelerate.accelerator:*.deepspeed_engine_wrapped", "engine", "DeepSpeed's engine", _ENGINES, optional=True),
    Seam("transformers.modeling_utils:PreTrainedModel._init_weights", "trainer", "the weights are ours", _ENGINES),
    Seam(
        "transformers.trainer:Trainer.save_model",
        *("trainer", "to save averaged buffers", _ENGINES, ("output_dir", "_internal_call")),
    ),
    # --- DeepSpeed: parameters under ZeRO 3 ---
    Seam(f"{_PARAMETERS}:*.ds_id", "zero3", "whether a parameter is partitioned", _BOTH),
    Seam(f"{_PARAMETERS}:*.ds_shape", "zero3", "a parameter's whole shape", _BOTH),
    Seam(f"{_PARAMETERS}:*.ds_numel", "zero3", "a parameter's whole size", _ENGINES + _TRAINING),
    Seam(f"{_PARAMETERS}:*.ds_tensor", "zero3", "this rank's part of a parameter", _ENGINES + _TRAINING),
    Seam(f"{_PARAMETERS}:*.ds_process_group", "zero3", "who shares a parameter", _ENGINES),
    Seam(f"{_PARAMETERS}:*.partition_numel", "zero3", "the size of a rank's part", _ENGINES),
    Seam("deepspeed.runtime.zero.parameter_offload:*.ds_z3_leaf_module", "zero3", "a leaf's parameters", _PARTITION),
    # --- DeepSpeed: where an engine hands over its gradients (replaced on an instance) ---
    Seam(
        f"{_ENGINE}:DeepSpeedEngine.allreduce_bucket",
        *("replaced zero0", "to reduce gradients", _ENGINES, ("bucket", "dp_group", "dp_world_size")),
    ),
    *(
        Seam(
            f"{_ZERO12}:DeepSpeedZeroOptimizer.gradient_reduction_w_predivide",
            *(f"replaced zero{stage}", "to reduce gradients", _ENGINES, ("tensor", "communication_data_type")),
        )
        for stage in (1, 2)
    ),
    *(
        Seam(
            f"{_ZERO3}:{_STAGE3}._{_STAGE3}__avg_scatter_{kind}",
            *("replaced zero3", "to reduce gradients", _ENGINES, (first, "communication_data_type")),
        )
        for kind, first in (("grads", "params_to_reduce"), ("contiguous_grads", "buffer_to_reduce"))
    ),
    Seam("deepspeed.runtime.base_optimizer:*.ipg_buckets", "hook zero", "a bucket's parameters", _ENGINES),
    Seam(f"{_ZERO12}:*.bit16_groups", "hook zero", "parameters by group", _ENGINES),
    Seam(f"{_ENGINE}:*.inside_no_sync_ctxt", "hook zero", "one reduction per step", _ENGINES),
    Seam(f"{_ENGINE}:*._is_gradient_accumulation_boundary", "hook zero", "one reduction per step", _ENGINES),
    Seam(f"{_ZERO3}:*.gradient_accumulation_dtype", "hook zero", "the dtype of kept gradients", _ENGINES),
    # Before 0.19 stages reduce in each micro-step; before 0.19.5 there is one group for all parameters.
    Seam(f"{_ENGINE}:*.coalesce_grad_reduction", "hook zero", "one reduction per step", _ENGINES, optional=True),
    Seam(f"{_ZERO3}:*._get_param_partition_group", "hook zero", "who shares a parameter", _ENGINES, optional=True),
    Seam(f"{_ENGINE}:*.torch_autocast_z0_gradscaler", "hook zero", "autocast's loss scale", _ENGINES, optional=True),
    Seam(f"{_ZERO12}:*.torch_autocast_gradscaler", "hook zero", "autocast's loss scale", _ENGINES, optional=True),
    Seam(f"{_ENGINE}:*.cur_scale", "hook zero", "fp16's loss scale"),
    Seam("deepspeed.runtime.fp16.fused_optimizer:*.loss_scale_config", "hook zero", "fp16's loss scale", optional=True),
    *(
        Seam(f"{module}:*.{name}", "hook zero", f"to refuse {words}", _ENGINES, optional=True)
        for module, name, words in (
            (_ENGINE, "has_moe_layers", "experts"),
            (_ENGINE, "is_deepcompile_enabled", "DeepCompile"),
            (_ENGINE, "zenflow", "ZenFlow"),
            (_ENGINE, "pipeline_parallelism", "a pipeline"),
            (_ENGINE, "gradient_average", "a sum"),
            (_ENGINE, "sequence_parallel_size", "sequence parallelism"),
            (_ZERO12, "contiguous_gradients", "buckets that are not contiguous"),
            (_ZERO3, "all2all_process_group", "quantized gradients"),
            (_ZERO12, "use_muon", "an optimizer that needs whole matrices"),
        )
    ),
    # --- DeepSpeed: flat groups of ZeRO 1 and 2, and what the optimizers keep ---
    Seam(f"{_ZERO12}:*.bit16_groups_flat", "zero12", "the flat weights", _ENGINES),
    Seam(f"{_ZERO12}:*.round_robin_bit16_groups", "zero12", "the parameters of a flat group", _ENGINES),
    Seam(f"{_ZERO12}:*.single_partition_of_fp32_groups", "zero12", "the weights that a rank steps", _ENGINES),
    Seam(f"{_ZERO12}:*.real_dp_process_group", "zero12", "who shares a flat group", _ENGINES),
    # Before there were offsets parameters lay one after the other.
    Seam(f"{_ZERO12}:*.round_robin_bit16_offsets", "zero12", "where parameters lie", _ENGINES, optional=True),
    Seam(f"{_ZERO12}:*._hp_optimizer_states_linked", "zero12", "accessors that look again", _ENGINES, optional=True),
    Seam(f"{_ZERO12}:*.round_robin_bit16_offsets", "pull", "where parameters lie", _ENGINES, since="0.19.8"),
    Seam(f"{_ZERO12}:*.partition_size", "pull", "the size of a rank's part", _ENGINES),
    Seam(
        f"{_ZERO12}:DeepSpeedZeroOptimizer._update_model_bit16_weights",
        *("pull", "the end of a step", _ENGINES, ("group_index",)),
    ),
    Seam(f"{_ZERO3}:*.fp16_groups", "state zero3", "the parameters of a group", _ENGINES),
    Seam(f"{_ZERO3}:*.fp32_partitioned_groups_flat", "state zero3", "the weights that a rank steps", _ENGINES),
    Seam(f"{_ZERO3}:*.sub_group_to_group_id", "state zero3", "which rate a group has", _ENGINES),
    Seam(f"{_ZERO3}:*.checkpoint_event_prologue", "state zero3", "to change partitioned weights", _ENGINES),
    Seam(f"{_ZERO3}:*.checkpoint_event_epilogue", "state zero3", "the same", _ENGINES),
    Seam(f"{_ZERO3}:*.swap_optimizer", "state zero3", "to refuse states on a disk", _ENGINES, optional=True),
    Seam("deepspeed.ops.adam.cpu_adam:*.adam_w_mode", "state zero3", "which Adam it is", _ENGINES, optional=True),
    # --- DeepSpeed: its process ---
    Seam("deepspeed.utils.groups:_WORLD_GROUP", "scope", "another engine in the same process", _ENGINES),
    Seam("deepspeed.ops:__compatible_ops__", "ops", "no collectives are compiled", _ENGINES),
    Seam("deepspeed.git_version_info:installed_ops", "ops", "which ops are compiled", _ENGINES),
    Seam("deepspeed.ops.op_builder.builder:assert_no_cuda_mismatch", "ops", "whether nvcc fits", _ENGINES),
    Seam(
        "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.load",
        *("files", "to read without running code", _ENGINES, ("path", "map_location")),
    ),
)

# What modules of ds_wsi import from here by a name of ours -> the row.
CLASSES = {
    "AnyBatchNorm": "torch.nn.modules.batchnorm:_BatchNorm",
    "AnyDropout": "torch.nn.modules.dropout:_DropoutNd",
    "ExceptionWrapper": "torch._utils:ExceptionWrapper",
    "FakeTensor": "torch._subclasses.fake_tensor:FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "TorchDispatchMode": "torch.utils._python_dispatch:TorchDispatchMode",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
}


def __getattr__(name: str) -> Any:
    """A class of `CLASSES`, looked up when it is imported.

    Raises:
        SeamError: the installed torch lacks it.
    """
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    (row,) = (row for row in SEAMS if row.name == CLASSES[name])
    problem = _problem(row)
    if problem:
        raise _error(row, problem)
    return _value(row)


# --- checks ---


@cache
def check_seams(package: str, *uses: str) -> None:
    """Check that an installed package has the private names of some uses; once per process.

    Args:
        package: a key of `SEEN`.
        uses: values of `Seam.use`; none: all of them.

    Raises:
        SeamError: a name is missing, or takes other arguments.
    """
    for row in missing_seams(package, *uses):
        raise _error(row, _problem(row) or "")


def missing_seams(package: str, *uses: str) -> Iterator[Seam]:
    """The rows, but for optional ones, that `check_seams` would refuse."""
    for row in SEAMS:
        if row.package == package and (not uses or row.use in uses) and not row.optional and _problem(row):
            yield row


def check_replaced(owner: Any, use: str) -> None:
    """Check that the methods of an instance that are to be replaced are there, with the parameters that are known.

    Args:
        owner: a DeepSpeed engine, or its optimizer.
        use: the use of the rows, "replaced zero0" to "replaced zero3".

    Raises:
        SeamError: one is missing, or takes other arguments.
    """
    for row in (row for row in SEAMS if row.use == use):
        takes = parameters_of(getattr(owner, row.leaf, None))
        if takes != row.takes:
            raise _error(row, f"{takes}" if takes is not None else "none")


def lacking(owner: Any, *uses: str) -> str | None:
    """The first attribute of some uses that an instance has not, as another kind of optimizer; None: it has all."""
    rows = (row for row in SEAMS if row.use in uses and not row.optional)
    return next((row.leaf for row in rows if not hasattr(owner, row.leaf)), None)


def parameters_of(method: Any) -> tuple[str, ...] | None:
    """The names of a bound method's parameters; None: no method."""
    if not callable(method):
        return None
    names = tuple(inspect.signature(method).parameters)
    if names == ("args", "kwargs"):  # DeepSpeed's profiling wrapper does not say what it wraps
        cells = getattr(method, "__closure__", None) or ()
        wrapped = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
        if wrapped:
            return tuple(inspect.signature(wrapped[0]).parameters)[1:]
    return names


def _problem(row: Seam) -> str | None:
    """What there is in a name's place; None where it is as it was seen."""
    module, _, path = row.name.partition(":")
    if path.startswith("*."):
        text = _text_of(module)
        return None if text is not None and re.search(rf"\b{row.leaf}\b", text) else "none"
    try:
        value = _value(row)
    except (ImportError, AttributeError) as error:
        return f"none ({error})"
    if row.takes is None:
        return None
    names = parameters_of(value)
    names = names[1:] if names and names[0] == "self" else names
    return None if names == row.takes else f"{names}"


def _value(row: Seam) -> Any:
    module, _, path = row.name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@cache
def _text_of(module: str) -> str | None:
    """A module's source, which is not imported for it; None where there is no such module."""
    root, *parts = module.split(".")
    if module in sys.modules and getattr(sys.modules[module], "__file__", None):
        return Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    spec = find_spec(root)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for path in (Path(folder, *parts).with_suffix(".py"), Path(folder, *parts, "__init__.py")):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


def _error(row: Seam, got: str) -> SeamError:
    oldest, newest = SEEN[row.package]
    oldest = row.since or oldest
    what = "have it" if row.takes is None else f"take {row.takes}"
    return SeamError(
        f"{row.dotted} ({row.purpose}) must {what}, as in {row.package} {oldest} to {newest}, got {got} in "
        f'{row.package} {version(row.package)}. HINT: pip install "{row.package}=={newest}".'
    )


# --- torch ---


def storage_key(tensor: "Tensor") -> int:
    """What two tensors have in common that share a storage; of fake ones too, which have no address."""
    return int(tensor.untyped_storage()._cdata)


def operation_of(overload: Any) -> Any:
    """The operation (torch.ops.aten.add) of an overload (torch.ops.aten.add.Tensor)."""
    return overload._overloadpacket


def writes_to_inputs(overload: Any) -> bool:
    """Whether an operation changes an input in place."""
    return bool(overload._schema.is_mutable)


def default_store() -> Any:
    """The store that the world's process group was made with."""
    from torch.distributed import distributed_c10d

    check_seams("torch", "ranks")
    return distributed_c10d._get_default_store()


def fsdp_param_groups(unit: Any) -> list[Any]:
    """The groups of parameters of an FSDP2 unit; none of one without parameters."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


# --- DeepSpeed ---


def is_zero3_part(parameter: Any) -> bool:
    """Whether a parameter is this rank's part of one that ZeRO-3 partitions."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape, that of the whole one under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fp16_scale_of(optimizer: Any) -> Callable[[], float]:
    """The loss scale of DeepSpeed's fp16, which its optimizers keep in one of two places."""
    return lambda: float(getattr(optimizer, "loss_scale_config", optimizer).cur_scale)
