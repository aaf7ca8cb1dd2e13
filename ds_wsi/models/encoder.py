"""Tile encoders: any timm model by name, with weights from timm's hub or a local file."""

import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_wsi.models.features import set_features
from ds_wsi.models.hub import build_from_hub, layers_by_name, require_timm_name
from ds_wsi.runtime.log import logger

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build_encoder(
    name: str,
    weights: str | Path | None = None,
    *,
    source: str | None = None,
    features: str = "pooled",
    tile_size_px: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a timm model without its classifier: tiles [N, 3, S, S] -> features [N, num_features].

    Args:
        name: a timm model's name, such as `resnet18` or `vit_tiny_patch16_224`.
        weights: a local `.safetensors` file or timm checkpoint; None starts from random weights.
        source: what timm downloads pretrained weights by, in place of `weights`: a model's name, `hf-hub:ORG/NAME`,
            `local-dir:PATH`.
        features: what leaves the encoder, one of `FEATURES`.
        tile_size_px: S, on which the width of flattened features depends; by default the option `img_size`, or 224.
        options: passed to `timm.create_model`.

    Raises:
        ValueError: timm has no model of this name, the weights do not fit it or cannot be had, or the model has no such
            features or takes no tiles of this size.
    """
    require_timm_name(name)
    if features != "pooled":
        options["global_pool"] = ""
    if source is not None and weights is None:
        encoder = build_from_hub(source, **options)
    else:
        encoder = timm.create_model(name, pretrained=False, num_classes=0, **layers_by_name(options))
    set_features(encoder, features, tile_size_px or options.get("img_size") or 224)
    if weights is not None:
        load_encoder_weights(encoder, weights)
    return encoder


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load a local file's tensors into `encoder`, in place; what the file holds beyond the encoder is logged.

    Raises:
        ValueError: the file is missing, lacks parameters of the encoder, or holds them in other shapes.
    """
    path = Path(path)
    require_weights_file(path)
    state = _read_state(path)
    wanted = encoder.state_dict()
    missing = [key for key in wanted if key not in state]
    misfits = [
        f"{key} {list(state[key].shape)} for {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or misfits:
        raise ValueError(
            f"encoder weights must fit the encoder, got {path} with {len(missing)} of {len(wanted)} tensors missing "
            f"({', '.join(missing[:3])}) and {len(misfits)} of another shape ({', '.join(misfits[:3])}). "
            "HINT: --encoder must name the architecture that the file was saved from."
        )
    unused = [key for key in state if key not in wanted]
    if unused:
        logger.info("%s: %d tensors are not the encoder's and were left out (%s)", path, len(unused), unused[:3])
    encoder.load_state_dict({key: state[key] for key in wanted})


def require_weights_file(path: str | Path) -> None:
    """Raise ValueError where there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"encoder weights must be a file, got {path} (missing). HINT: check --encoder_weights.")


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Torch's own message advises weights_only=False, which would run code from the file.
        reason = str(error).splitlines()[0] if isinstance(error, SafetensorError) else type(error).__name__
        raise ValueError(
            f"encoder weights must be a whole file of tensors and nothing else, got {reason} ({path}). "
            "HINT: save them again as .safetensors."
        ) from error
    for wrapper in ("state_dict", "model"):  # the names timm and most training scripts nest weights under
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"encoder weights must be a dictionary of tensors, got {type(state).__name__} ({path})")
    # A SlideModel's own export serves as well.
    prefix = "encoder."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return own or state


class NoEncoder(nn.Module):
    """In an encoder's place in a model of features: nothing to train, and nothing but features passes.

    Args:
        in_dim: the width of the features.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.num_features = in_dim

    def forward(self, features: Tensor) -> Tensor:
        """Return features [N, in_dim] as they are.

        Raises:
            ValueError: tiles, or features of another width.
        """
        if features.dim() != 2 or features.shape[1] != self.num_features:
            kind = "features" if features.dim() == 2 else "tiles"
            raise ValueError(
                f"a model of features must be given features [N, {self.num_features}], got {kind} "
                f"{list(features.shape)}. HINT: `ds-wsi features` extracts them."
            )
        return features
