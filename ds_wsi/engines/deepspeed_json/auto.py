"""The word "auto" in a DeepSpeed JSON where no trainer fills it: by the rules below, or refused by name.

[Note: rules] DeepSpeed itself reads numbers alone. What Accelerate and the HF Trainer put in the word's place is put
here too, and every value that is chosen is logged:

    train_micro_batch_size_per_gpu, gradient_accumulation_steps, train_batch_size
                                    what the others leave to compute; where none is given 1 bag, 1 micro-step
    gradient_clipping               none
    optimizer.params.*              of the optimizer that is given; else lr and weight_decay as `ds-wsi train`
                                    has them by default, and for the rest the optimizer's own defaults
    scheduler.params.warmup_min_lr, warmup_max_lr       0 and the learning rate
    bf16.enabled, fp16.enabled      whether the model's parameters have that dtype
    zero_optimization.reduce_bucket_size                h^2 for the model's hidden size h, at least its largest
                                    parameter; without a model 5e7, as in ds_configs/
    zero_optimization.stage3_prefetch_bucket_size       0.9 h^2
    zero_optimization.stage3_param_persistence_threshold    10 h
    zero_optimization.offload_*.device                  none
    other keys of zero_optimization, fp16 and bf16      DeepSpeed's own defaults

h is `hidden_size`, or the largest of `hidden_sizes`, of the model's configuration (or of its `text_config`); else the
`num_features` of the model or of its encoder; else the widest input of its linear layers.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_wsi.runtime.choices import LEARNING_RATE, WEIGHT_DECAY
from ds_wsi.runtime.contracts import HasEncoder
from ds_wsi.runtime.log import logger

SECTION = "ds_wsi"  # its own words are modes of ours
AUTO = "auto"
BUCKET_SIZE = 50_000_000  # of ds_configs/
_BATCHES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
_LEFT_OUT = "DeepSpeed's default"


def fill_for_model(config: Mapping[str, Any], model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """The config with a value in the place of each "auto" ([Note: rules]); logs what it put there.

    Args:
        config: DeepSpeed's config, which stays as it is.
        model: the model that is wrapped.
        optimizer: the optimizer that was given beside it, or None.

    Raises:
        ValueError: an "auto" for which there is no rule; names the key and the remedy.
    """
    filler = _Filler(config)
    filler.batches()
    filler.drop("gradient_clipping", "none")
    filler.optimizer(optimizer)
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        filler.put(f"{kind}.enabled", any(p.dtype == dtype for p in model.parameters()))
    if any(key.startswith("zero_optimization.") for key in filler.autos()):
        filler.buckets(hidden_size(model), max((_numel(p) for p in model.parameters()), default=0))
    return filler.finish()


def fill_rest(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `fill_auto` has no setting for, before there is a model ([Note: rules]); logs what it put there.

    Raises:
        ValueError: as `fill_for_model`.
    """
    filler = _Filler(config)
    filler.optimizer(None)
    filler.put("zero_optimization.reduce_bucket_size", BUCKET_SIZE)
    return filler.finish()


def hidden_size(model: nn.Module) -> int | None:
    """The h of [Note: rules]; None of a model without linear layers."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        sizes = getattr(holder, "hidden_size", None) or getattr(holder, "hidden_sizes", None)
        if sizes:
            return int(sizes if isinstance(sizes, int) else max(sizes))
    for part in (model, model.encoder if isinstance(model, HasEncoder) else None):
        width = getattr(part, "num_features", None)
        if isinstance(width, int):
            return width
    return max((part.in_features for part in model.modules() if isinstance(part, nn.Linear)), default=None)


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # built at ZeRO-3, it is this rank's part


class _Filler:
    """A copy of a config, its words replaced one after another."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        section = config.get(SECTION)
        self.config: dict[str, Any] = json.loads(json.dumps({k: v for k, v in config.items() if k != SECTION}))
        self._ours = {} if section is None else {SECTION: section}
        self._words: list[str] = []

    def autos(self) -> list[str]:
        """The dotted keys that still say it."""
        return [key for key, value in _leaves(self.config, "") if value == AUTO]

    def put(self, key: str, value: Any) -> None:
        """Replace the word at a key, where it is there; None takes the key away."""
        *parents, leaf = key.split(".")
        section: Any = self.config
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or section.get(leaf) != AUTO:
            return
        if value is None:
            del section[leaf]
        else:
            section[leaf] = value
            self._words.append(f"{key} = {value}")

    def drop(self, key: str, words: str = _LEFT_OUT) -> None:
        """Take the word away, where it is there, and leave its value to others."""
        if key in self.autos():
            self.put(key, None)
            self._words.append(f"{key}: {words}")

    def batches(self) -> None:
        """What none of the three says DeepSpeed computes from the others."""
        for key in _BATCHES:
            self.put(key, None)
        if "train_micro_batch_size_per_gpu" not in self.config and "train_batch_size" not in self.config:
            self.config["train_micro_batch_size_per_gpu"] = 1
            self._words.append("train_micro_batch_size_per_gpu = 1")

    def optimizer(self, given: Any) -> None:
        """The learning rates of the optimizer and of the schedule, and the optimizer's other options."""
        values: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
        if given is not None:
            values = dict(getattr(given, "defaults", None) or {})
        for key in [key for key in self.autos() if key.startswith("optimizer.params.")]:
            value = values.get(key.split(".")[2])
            if value is None:
                self.drop(key, "the optimizer's default")
            else:
                self.put(key, list(value) if isinstance(value, tuple) else value)
        rate = (self.config.get("optimizer") or {}).get("params", {}).get("lr", values.get("lr"))
        self.put("scheduler.params.warmup_min_lr", 0)
        if rate is not None:
            self.put("scheduler.params.warmup_max_lr", rate)

    def buckets(self, width: int | None, largest: int) -> None:
        """Sizes that follow from the model's."""
        if width is None:
            self.put("zero_optimization.reduce_bucket_size", max(BUCKET_SIZE, largest))
            return
        self.put("zero_optimization.reduce_bucket_size", max(width * width, largest))
        self.put("zero_optimization.stage3_prefetch_bucket_size", int(0.9 * width * width))
        self.put("zero_optimization.stage3_param_persistence_threshold", 10 * width)

    def finish(self) -> dict[str, Any]:
        """The config; words that are left are DeepSpeed's defaults, or refused."""
        for key in self.autos():
            section, _, leaf = key.partition(".")
            if leaf.endswith(".device") and leaf.startswith("offload_"):
                self.put(key, "none")
            elif section in ("zero_optimization", "fp16", "bf16") and leaf not in ("stage", "enabled"):
                self.drop(key)
        for key in self.autos():
            raise ValueError(
                f'{key} of the DeepSpeed config must be a value, got "auto", for which there is no rule here. '
                f"HINT: {_remedy(key)}"
            )
        if self._words:
            logger.info('"auto" of the DeepSpeed config: %s', ", ".join(self._words))
        return {**self.config, **self._ours}


def _remedy(key: str) -> str:
    if key.startswith("scheduler."):
        return "write the number of steps; or leave scheduler out and give lr_scheduler to ds_wsi.initialize."
    return "write the value, or leave the key out for DeepSpeed's default."


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
