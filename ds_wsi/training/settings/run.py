"""Where and how a run is computed, kept and tested."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_wsi.evaluation.task_metrics.table import CHOOSING, MEAN
from ds_wsi.runtime.bounds import LONGEST_TIMEOUT_S, require_at_most, require_seed
from ds_wsi.runtime.choices import MEMORY_FORMATS, PRECISIONS, TF32
from ds_wsi.runtime.setting import SWITCH, Decides, setting, tiles_or_all

if TYPE_CHECKING:
    from ds_wsi.evaluation.protocol import EvaluationProtocol


def _metric(text: str) -> str:
    """A metric's name, or that of one of several targets' behind the target's."""
    target, dot, metric = text.rpartition(".")
    if metric.lower() in CHOOSING or text.lower() == MEAN:
        return f"{target}{dot}{metric.lower()}"
    raise argparse.ArgumentTypeError(f"must be one of {', '.join((*CHOOSING, MEAN))}, or TARGET.METRIC, got {text!r}")


@dataclass(frozen=True)
class RunSettings:
    """Where and how it runs."""

    output_dir: str | None = setting(
        None,
        "folder of the run: new, empty, or the run's own with --resume_from_checkpoint",
        Decides.NOTHING,
        option="output_dir",
        words="a new one below runs/, named by the time",
    )
    seed: int = setting(
        0,
        "seed of the weights, the order of the slides and every draw but that of the splits",
        Decides.RESULT,
        option="seed",
        column=True,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "go on with a run: a checkpoint's folder, or without a path the newest whole one of --output_dir",
        Decides.NOTHING,
        option="resume_from_checkpoint",
        kind=str,
        bare="latest",
        metavar="PATH",
        words="a new run",
    )
    save_steps: int = setting(
        0,
        "number of optimizer steps between checkpoints within an epoch; 0 leaves them to --save_minutes",
        Decides.NOTHING,
        option="save_steps",
    )
    save_minutes: float = setting(
        15.0,
        "minutes after which a checkpoint is written within an epoch too; 0 saves at the ends of epochs only",
        Decides.NOTHING,
        option="save_minutes",
    )
    max_minutes: float = setting(
        0.0,
        "minutes after which the run stops with a checkpoint and exit status 75; the same command goes on; 0: never",
        Decides.NOTHING,
        option="max_minutes",
    )
    save_total_limit: int = setting(
        2, "number of checkpoints that are kept, the newest", Decides.NOTHING, option="save_total_limit"
    )
    save_beside: bool = setting(
        True,
        "write checkpoints while the training goes on, from a copy in host memory",
        Decides.NOTHING,
        option="save_beside",
        kind=SWITCH,
    )
    metric_for_best_model: str = setting(
        "auc",
        "validation metric whose best epoch is exported; of several targets mean, or TARGET.METRIC",
        Decides.RESULT,
        option="metric_for_best_model",
        kind=_metric,
        words="auc; of another --task its first; of several targets mean",
        group="validation and test",
    )
    validate_beside: bool = setting(
        False,
        "validate each epoch in a process of its own while the next one trains",
        Decides.RESOLVED,
        resolved="early_stopping",
        option="validate_beside",
        group="validation and test",
    )
    validation_device: str | None = setting(
        None,
        "device of --validate_beside, such as cuda:1",
        Decides.NOTHING,
        option="validation_device",
        words="the main process's",
        group="validation and test",
    )
    early_stopping_patience: int = setting(
        0,
        "number of epochs without a better --metric_for_best_model that end the run; 0 goes on",
        Decides.RESULT,
        option="early_stopping_patience",
        group="validation and test",
    )
    deepspeed: str | None = setting(
        None,
        'DeepSpeed JSON, whose section "ds_wsi" sets the policies; options override it',
        Decides.RESOLVED,
        resolved="optimizer",
        option="deepspeed",
        words="none",
        group="processes and GPUs",
    )
    fsdp: bool = setting(
        False,
        "shard the model over the processes with FSDP2",
        Decides.NOTHING,
        option="fsdp",
        group="processes and GPUs",
    )
    ddp_timeout: int = setting(
        1800,
        "seconds that a process waits for the others before it gives up",
        Decides.NOTHING,
        option="ddp_timeout",
        group="processes and GPUs",
    )
    eval_tiles: int | None = setting(
        None,
        "number of random tiles of each test slide, such as 256, or all",
        Decides.TEST,
        option="eval_tiles",
        kind=tiles_or_all,
        words="all",
        group="validation and test",
        column=True,
    )
    eval_runs: int = setting(
        1,
        "number of draws of --eval_tiles, over which the test metrics are averaged",
        Decides.TEST,
        option="eval_runs",
        group="validation and test",
        column=True,
    )
    eval_seed: int = setting(
        0,
        "seed of the draws of --eval_tiles",
        Decides.TEST,
        option="eval_seed",
        group="validation and test",
        column=True,
    )
    eval_precision: str = setting(
        "no",
        "precision in which the encoder computes validation and test; no is float32",
        Decides.RESULT,
        option="eval_precision",
        kind=PRECISIONS,
        group="validation and test",
    )
    tf32: str = setting(
        "torch",
        "whether a GPU rounds factors of float32 products to TF32; torch leaves torch's setting",
        Decides.RESULT,
        option="tf32",
        kind=TF32,
        group="memory",
    )
    memory_format: str = setting(
        "auto",
        "memory layout of the encoder's convolutions; auto takes the faster one by a trial on a GPU",
        Decides.NOTHING,
        option="memory_format",
        kind=MEMORY_FORMATS,
        group="memory",
    )
    heatmaps: int | None = setting(
        None,
        "number of test slides that get a heat map, the first ones; 0 draws none",
        Decides.NOTHING,
        option="heatmaps",
        kind=int,
        words="all",
        group="validation and test",
    )
    disable_tqdm: bool = setting(
        False, "show neither bars nor lines of progress", Decides.NOTHING, option="disable_tqdm"
    )

    def __post_init__(self) -> None:
        """Refuse a limit under which a torn checkpoint would lose the run, and a protocol that tests nothing."""
        _ = self.evaluation
        if self.save_total_limit < 2:
            raise ValueError(
                f"--save_total_limit must be at least 2, got {self.save_total_limit}. "
                "HINT: a torn checkpoint is passed over for the one before it."
            )
        if self.save_steps < 0:
            raise ValueError(f"--save_steps must be at least 0, got {self.save_steps}")
        if not 0 <= self.save_minutes < float("inf"):
            raise ValueError(f"--save_minutes must be at least 0, got {self.save_minutes}. HINT: 0 turns it off.")
        if not 0 <= self.max_minutes < float("inf"):
            raise ValueError(f"--max_minutes must be at least 0, got {self.max_minutes}. HINT: 0 goes on to the end.")
        if self.early_stopping_patience < 0:
            raise ValueError(
                f"--early_stopping_patience must be at least 0, got {self.early_stopping_patience}. "
                "HINT: 0 turns it off."
            )
        if self.validation_device and not self.validate_beside:
            raise ValueError(
                f"--validation_device must be given with --validate_beside, got {self.validation_device} alone"
            )
        if self.fsdp and self.deepspeed:
            raise ValueError(
                f"--fsdp must not be given with --deepspeed, got {self.deepspeed}. HINT: choose one; ZeRO-3 shards too."
            )
        if self.heatmaps is not None and self.heatmaps < 0:
            raise ValueError(f"--heatmaps must be at least 0, got {self.heatmaps}. HINT: 0 draws none.")
        if self.ddp_timeout < 1:
            raise ValueError(f"--ddp_timeout must be at least 1 second, got {self.ddp_timeout}")
        require_at_most("--ddp_timeout", self.ddp_timeout, LONGEST_TIMEOUT_S)
        require_seed("--seed", self.seed)

    @property
    def evaluation(self) -> "EvaluationProtocol":
        """The tiles of the test slides that the model is tested on."""
        from ds_wsi.evaluation.protocol import EvaluationProtocol  # here, because help pages need no torch

        return EvaluationProtocol(self.eval_tiles, self.eval_runs, self.eval_seed)
