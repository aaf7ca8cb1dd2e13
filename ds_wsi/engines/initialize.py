"""`ds_wsi.initialize`: `deepspeed.initialize` with "auto" filled and the "ds_wsi" section followed."""

import base64
import copy
import json
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch.distributed as dist

from ds_wsi.config import SECTION
from ds_wsi.engines.comm_hooks.register import attach
from ds_wsi.engines.deepspeed_json.auto import fill_for_model
from ds_wsi.engines.deepspeed_json.config import read_config, suit_machine
from ds_wsi.engines.machine import cpu
from ds_wsi.engines.machine.timeouts import following_world
from ds_wsi.engines.policies.section import apply_default_norms, apply_section

# Set where DeepSpeed finds the ranks itself: by MPI's launchers, and on two clouds.
_FOUND_BY_DEEPSPEED = (
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE"),
    *("AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV"),
)


def initialize(*arguments: Any, **keywords: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with what the "ds_wsi" section of its config says.

    "auto" is filled by the rules of `ds_wsi.engines.deepspeed_json.auto`; the section's norm, partition and
    stacking.pack_bytes are applied to the model, in place, and its hook to the engine, as `engine.comm_handle`
    (`attach`). The norms of a SlideModel of which nobody has said anything are decided, section or not. On one process
    nothing is exchanged. Process groups made here have the timeout that the script gave the world's group. On a machine
    without a GPU, or without a compiler, no op of DeepSpeed is compiled.

    Args:
        arguments, keywords: what the installed `deepspeed.initialize` takes, by place or by name: args, model,
            optimizer, model_parameters, training_data, lr_scheduler, distributed_port, mpu, dist_init_required,
            collate_fn, config, mesh_param, config_params.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler), DeepSpeed's.

    Raises:
        TypeError: an argument that `deepspeed.initialize` does not have.
        ValueError: no model or config, or two configs; an "auto" without a rule; a key of the section that cannot be
            followed here.
    """
    import deepspeed

    given = signature(deepspeed.initialize).bind(*arguments, **keywords).arguments
    model = given.get("model")
    if model is None:
        raise ValueError("model must be given, got none. HINT: ds_wsi.initialize(model=model, config=...)")
    config = _take_config(given)
    optimizer = given.get("optimizer")
    filled = fill_for_model(config, model, optimizer)
    cpu.skip_shm_op()
    if not dist.is_initialized() and not any(name in os.environ for name in _FOUND_BY_DEEPSPEED):
        cpu.set_single_process_variables()
    suit_machine(filled)
    section = filled.get(SECTION)
    _connect(given)  # norms that the ranks share need a group of theirs, and all groups the timeout of the world's
    with following_world():
        if section is not None:
            apply_section(section, model, filled)
        else:
            apply_default_norms(model, filled)
        given["config"] = filled
        engine, *rest = deepspeed.initialize(**given)
        engine.comm_handle = None if section is None else attach(engine)
    return (engine, *rest)


def _take_config(given: dict[str, Any]) -> dict[str, Any]:
    """The one config among the arguments, which it leaves without: of `config`, `config_params` or `args`."""
    configs = {name: given.pop(name) for name in ("config", "config_params") if given.get(name) is not None}
    args = given.get("args")
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(args, name, None) is not None:
            configs[f"args.{name}"] = getattr(args, name)
            given["args"] = args = copy.copy(args)
            setattr(args, name, None)
    if len(configs) != 1:
        raise ValueError(
            f"one DeepSpeed config must be given, got {', '.join(configs) or 'none'}. "
            'HINT: config="ds_configs/dmgc.json", or a dictionary.'
        )
    config = next(iter(configs.values()))
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str):
        try:  # the JSON itself, as DeepSpeed's launcher hands it over
            return dict(json.loads(base64.urlsafe_b64decode(config)))
        except ValueError:
            pass  # a path, of which read_config says what is wrong
    return read_config(config)


def _connect(given: Mapping[str, Any]) -> None:
    import deepspeed

    deepspeed.init_distributed(
        **{name: given[name] for name in ("distributed_port", "dist_init_required") if name in given}
    )
