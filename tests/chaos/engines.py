"""Engines: what a run is given for each, and what its launcher sets."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Engine:
    """One way to train.

    Args:
        options: words for `ds-wsi train`.
        variables: the environment's, beside those of torchrun.
        zero: the stage of the JSON that is written for it, or None.
        launched: whether a launcher starts the ranks and tells each its number.
    """

    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    zero: int | None = None
    launched: bool = True


_LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
ENGINES = {
    "plain": Engine(launched=False),
    "beside": Engine(("--validate_beside",), launched=False),
    "ddp": Engine(),  # torchrun
    **{f"zero{stage}": Engine(zero=stage) for stage in range(4)},  # deepspeed
    "fsdp2": Engine(("--fsdp",)),
    # What `accelerate launch` sets: alone, and with --use_deepspeed --zero_stage 2.
    "accelerate": Engine(variables={**_LAUNCHED, "ACCELERATE_USE_CPU": "true"}, launched=False),
    "accelerate_zero2": Engine(
        variables={
            **_LAUNCHED,
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
        }
    ),
}
PARALLEL = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2", "accelerate_zero2")


def options_of(name: str, folder: Path) -> list[str]:
    """An engine's options; its JSON is written to the folder."""
    engine = ENGINES[name]
    if engine.zero is None:
        return list(engine.options)
    path = folder / f"zero{engine.zero}.json"
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 1000000,
        "zero_allow_untested_optimizer": True,
        # Small, so that the tiny model is cut in several.
        "zero_optimization": {
            "stage": engine.zero,
            "reduce_bucket_size": 3000,
            "stage3_param_persistence_threshold": 40,
        },
    }
    path.write_text(json.dumps(config))
    return [*engine.options, "--deepspeed", str(path)]


def variables_of(name: str, rank: int, ranks: int, port: int) -> dict[str, str]:
    """What the launcher sets for a rank."""
    variables = ENGINES[name].variables
    if not ENGINES[name].launched:
        return variables
    local = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return {**local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **variables}
