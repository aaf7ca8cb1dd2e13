"""The table: every private name of torch, DeepSpeed, Accelerate and transformers that ds_wsi uses."""

from ds_wsi.runtime.seams.row import Seam

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
    Seam(
        "torch._subclasses.fake_tensor:in_kernel_invocation_manager",
        *("partition", "to make tensors of shapes alone", _PARTITION),
    ),
    Seam("torch._utils:ExceptionWrapper", "class", "a worker's error with its traceback"),
    Seam("torch.utils._python_dispatch:TorchDispatchMode", "class", "to see every operation", _PARTITION),
    Seam("torch.utils:_pytree", "class", "the tensors in nested outputs", _PARTITION),
    Seam("torch.utils._pytree:tree_leaves", "class", "the tensors in nested outputs", _PARTITION),
    # --- torch: operations and storages ---
    Seam("torch:UntypedStorage._cdata", "meter", "which storage a tensor has, a fake one too", _PARTITION),
    Seam("torch._ops:*._schema", "meter", "whether an operation writes to its inputs", _PARTITION),
    Seam("torch._ops:*._overloadpacket", "meter", "which operation an overload is of"),
    Seam("torch:_C._DisableTorchDispatch", "partition", "to make tensors that no mode sees", _PARTITION),
    Seam("torch:Tensor._version", "partition", "whether a tensor was changed in place", _PARTITION),
    Seam("torch:Tensor._version", "features", "whether features that are kept were changed in place", ("bags",)),
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
    Seam("torch.nn.modules.conv:Conv2d._conv_forward", "partition", "whether a class pads by itself", _PARTITION),
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
    Seam("torch:_C._set_grad_enabled", "partition", "where gradients are switched off within a forward", _PARTITION),
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
    Seam(f"{_PARAMETERS}:*.ds_process_group", "zero3", "who shares a parameter", _ENGINES + _TRAINING),
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
