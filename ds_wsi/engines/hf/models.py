"""SlideModels as Transformers models: a configuration, `save_pretrained`, a loss that the Trainer scales, a collator.

[Note: two folders] Both kinds hold a config.json and a model.safetensors, and are told apart by config.json:

    a run's         "format": "ds_wsi.SlideModel"          keys encoder.*, aggregator.*        `ds_wsi.load_model`
    Transformers'   "model_type": "ds_wsi_slide_model"     the same behind slide_model.        `from_pretrained`

`from_run` and `export_run` convert; neither writes into a folder of the other kind.

[Note: loss] The forward returns the sum of its bags' losses over `num_items_in_batch`. The Trainer (5.23) makes that
the number of labels other than -100, bags here, of all micro-steps of the optimizer step and of all ranks, and
multiplies the loss by the ranks, because DDP and DeepSpeed take the mean over them; nothing is divided by the
micro-steps (Accelerate is told of one, DeepSpeed `scale_wrt_gas=False`). The step's gradient is then
(1 / B) sum_b grad l_b over its B bags, however they lie. It takes `average_tokens_across_devices=True`, the default:
without, each rank divides by its own bags, and the mean of means is another gradient.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ds_wsi.bags.features import collate_bags
from ds_wsi.engines.sharded.zero import full_state_dict
from ds_wsi.models import ModelConfig, SlideModel, build_model, load_model, save_model
from ds_wsi.models.loss import IGNORED_LABEL, stack_loss
from ds_wsi.runtime.files import read_object
from ds_wsi.stacking import StackedBags, stack_bags


class SlideModelConfig(PretrainedConfig):
    """A `ModelConfig` as Transformers keeps it.

    Args:
        slide_model: the values of a `ModelConfig`.
        keywords: arguments of PretrainedConfig; `id2label` and `label2id` are the classes.
    """

    model_type = "ds_wsi_slide_model"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["attention"]  # [sum N]: nothing that ranks could gather

    def __init__(self, slide_model: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        # Transformers builds one without arguments, to compare with.
        self.slide_model = json.loads(json.dumps(dict(slide_model or {})))
        names = dict(enumerate(self.slide_model.get("classes", ())))
        if names:
            keywords |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        super().__init__(**keywords)

    @classmethod
    def of(cls, config: ModelConfig) -> "SlideModelConfig":
        """The Transformers configuration that holds ours."""
        return cls(slide_model=asdict(config))

    @property
    def model_config(self) -> ModelConfig:
        """Our configuration.

        Raises:
            ValueError: of another model, or keys are missing.
        """
        return ModelConfig.from_values(self.slide_model, f"slide_model of {self.name_or_path or 'the configuration'}")


@dataclass
class SlideClassifierOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: scalar, see [Note: loss]; None without labels.
        logits: [B, C].
        attention: [sum N] or [sum N, M]; None where the aggregator has none.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attention: Tensor | None = None


class SlideModelForSlideClassification(PreTrainedModel):
    """A SlideModel that `transformers.Trainer` trains, and that saves and loads itself; no remote code.

    Args:
        config: rebuilds the model.
        slide_model: what it describes, where it is built already.
        allow_code: modules of own code that the config may have imported, see `ds_wsi.load_model`.

    Attributes:
        slide_model: the SlideModel, plain: freeze its encoder, load an encoder's weights, partition its layers.
    """

    config_class = SlideModelConfig
    base_model_prefix = "slide_model"
    main_input_name = "values"
    # Read by the Trainer: `num_items_in_batch` is counted and given to forward.
    accepts_loss_kwargs = True

    def __init__(
        self, config: SlideModelConfig, slide_model: SlideModel | None = None, *, allow_code: Collection[str] = ()
    ) -> None:
        super().__init__(config)
        if slide_model is None:
            slide_model = build_model(config.model_config, allow_code=allow_code)
        self.slide_model = slide_model
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: encoders and aggregators are initialised where they are built, each in its own way."""

    def forward(
        self,
        values: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SlideClassifierOutput:
        """Predict, and with labels compute the loss ([Note: loss]).

        Args:
            values: [sum N, ...], tiles or features of a `StackedBags`.
            cu_seqlens: int64 [B + 1], its bounds.
            labels: int64 [B]; a bag of -100 counts in nothing; int64 [0] for a rank that has no bag of this micro-step:
                its one bag takes part in the collectives, in evaluation mode, and changes nothing.
            num_items_in_batch: bags of the optimizer step; None: those of this stack.

        Raises:
            ValueError: labels that are not the stack's.
        """
        bags = StackedBags(values, cu_seqlens)
        if labels is None:
            output = self.slide_model(bags)
            return SlideClassifierOutput(None, output.logits, output.attention)
        if labels.numel() == 0:
            return self._idle(bags)
        if labels.shape != (bags.n_bags,):
            raise ValueError(
                f"labels must be one per bag, int64 [{bags.n_bags}], got shape {list(labels.shape)}. HINT: a stack "
                'must not be cut by rows: accelerator_config={"dispatch_batches": False, "split_batches": False}, and '
                "one process per GPU (torchrun), not nn.DataParallel"
            )
        output = self.slide_model(bags, labels.clamp(min=0))
        counted: Any = num_items_in_batch
        if counted is None:
            counted = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return SlideClassifierOutput(stack_loss(output, labels) / counted, output.logits, output.attention)

    def _idle(self, bags: StackedBags) -> SlideClassifierOutput:
        label = torch.zeros(bags.n_bags, dtype=torch.int64, device=bags.values.device)
        with self.slide_model.idling():
            output = self.slide_model(bags, label)
        return SlideClassifierOutput(stack_loss(output, label) * 0.0, output.logits[:0])

    def _note_fixed_norms(self) -> None:
        """Have the configuration say which norms kept their statistics in training."""
        self.config.slide_model["fixed_norms"] = list(self.slide_model.fixed_norms)

    @classmethod
    def from_run(cls, directory: str | Path, *, allow_code: Collection[str] = ()) -> "SlideModelForSlideClassification":
        """The model that `ds-wsi train` exported (`ds_wsi.load_model`); see [Note: two folders]."""
        slide_model, config = load_model(directory, allow_code=allow_code)
        if config.task:
            raise ValueError(
                f"a run's task must be classification for Transformers, got {config.task['kind']} ({directory}). HINT: "
                "ds_wsi.load_model(directory) has the model itself."
            )
        return cls(SlideModelConfig.of(config), slide_model).eval()

    def export_run(self, directory: str | Path) -> None:
        """Write what `ds-wsi evaluate`, `ds-wsi heatmap` and `ds_wsi.load_model` read; see [Note: two folders].

        Collective under ZeRO-3, as every rank gathers; otherwise one process calls it.
        """
        _require_kind(directory, "format", "export_run")
        self._note_fixed_norms()
        save_model(directory, self.config.model_config, full_state_dict(self.slide_model))

    def save_pretrained(self, save_directory: Any, *args: Any, **keywords: Any) -> Any:
        """Write config.json and model.safetensors as Transformers does; refuses the folder of a run."""
        _require_kind(save_directory, "model_type", "save_pretrained")
        self._note_fixed_norms()
        return super().save_pretrained(save_directory, *args, **keywords)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **keywords: Any) -> Any:
        """Load as Transformers does, but refuse a weight that is missing, left over or of another shape.

        Own code is imported where the caller's `allow_code` has its module; `trust_remote_code` is not asked.

        Raises:
            ValueError: it is a run's folder, or the weights are not this model's.
        """
        if isinstance(pretrained_model_name_or_path, str | Path):
            _require_kind(pretrained_model_name_or_path, "model_type", "from_pretrained")
        wants_info = keywords.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **keywords
        )
        model, info = loaded
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            words = ", ".join(f"{len(keys)} {kind} {keys[:3]}" for kind, keys in wrong.items() if keys)
            raise ValueError(f"model.safetensors must hold this model's weights, got {words} ({model.name_or_path})")
        # Transformers leaves buffers that are not saved without values (a window's mask, the channels' mean).
        allowed = keywords.get("allow_code", ())
        fresh = dict(build_model(model.config.model_config, allow_code=allowed).named_buffers())
        saved = model.slide_model.state_dict()
        for name, buffer in model.slide_model.named_buffers():
            if name not in saved:
                buffer.data.copy_(fresh[name])
        model.slide_model.norms_from = "config.json"
        return (model, info) if wants_info else model


def _require_kind(directory: str | Path, key: str, method: str) -> None:
    """Refuse a folder whose config.json is of the other kind; one without is anybody's."""
    path = Path(directory) / "config.json"
    if not path.is_file() or key in read_object(path, "config.json"):
        return
    other = "a run of ds_wsi" if key == "model_type" else "Transformers"
    hint = {
        "save_pretrained": "another folder",
        "export_run": "another folder",
        "from_pretrained": "SlideModelForSlideClassification.from_run",
    }[method]
    raise ValueError(
        f"{method}'s folder must hold its own kind of config.json, got that of {other} ({path}). HINT: {hint}"
    )


class SlideCollator:
    """A batch for the model: {"labels": int64 [B], "cu_seqlens": int64 [B + 1], "values": [sum N, ...]}.

    Items are {"tiles": uint8 or normalised floating [N, 3, S, S]} or {"features": floating [N, D]}, tensors, arrays or
    nested lists, with a "labels" (or "label") int or without; or those of `FeatureDataset`. Nothing is padded or cut.
    """

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Stack the items.

        Raises:
            ValueError: an item without a bag, or tiles that are no pixels; names the item.
        """
        if not isinstance(items[0], Mapping):
            stack, labels, _ = collate_bags(items)
            return _batch(stack, labels)
        stack = stack_bags([_bag(item, index) for index, item in enumerate(items)])
        item_labels = [item.get("labels", item.get("label")) for item in items]
        if all(label is None for label in item_labels):
            return _batch(stack, None)
        if any(label is None for label in item_labels):
            raise ValueError(f"items must have a label each, or none of them, got {item_labels}")
        return _batch(stack, torch.tensor([int(label) for label in item_labels], dtype=torch.int64))


def _batch(stack: StackedBags, labels: Tensor | None) -> dict[str, Tensor]:
    # Labels first: the Trainer takes the first tensor's length for the number of examples.
    batch = {} if labels is None else {"labels": labels}
    # Not a StackedBags in one piece: the Trainer rebuilds tuples without their names.
    return {**batch, "cu_seqlens": stack.cu_seqlens, "values": stack.values}


def _bag(item: Mapping[str, Any], index: int) -> Tensor:
    kinds = [kind for kind in ("tiles", "features") if kind in item]
    if len(kinds) != 1:
        raise ValueError(f"item {index} must hold either tiles or features, got {sorted(item)}")
    value = item[kinds[0]]
    bag = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if kinds[0] == "features":
        return bag.float() if bag.dtype == torch.float64 and not isinstance(value, Tensor) else bag
    if bag.dtype == torch.uint8 or bag.is_floating_point():
        return bag
    # `datasets` gives whole numbers as int64, whatever the column's type.
    if bag.numel() and (int(bag.min()) < 0 or int(bag.max()) > 255):
        raise ValueError(
            f"tiles must be 0 to 255 where they are whole numbers, got {bag.min()} to {bag.max()} (item {index})"
        )
    return bag.to(torch.uint8)
