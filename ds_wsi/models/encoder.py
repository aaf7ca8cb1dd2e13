"""Tile encoders: any timm model by name, with weights from timm's hub or a local file."""

from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ds_wsi.models.features import set_features
from ds_wsi.models.hf_weights import load_hf_weights
from ds_wsi.models.hub import build_from_hub, is_own_encoder, layers_by_name, require_timm_name
from ds_wsi.models.known_encoders import HF
from ds_wsi.models.own_parts import build_own_encoder
from ds_wsi.models.weights import first_patches, load_encoder_weights
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
        name: a timm model's name, such as `resnet18` or `vit_tiny_patch16_224`; or `module:callable` of your own, or
            what an installed package calls its encoder (entry points `ds_wsi.encoders`).
        weights: a local `.safetensors` file or timm checkpoint; None starts from random weights.
        source: what timm downloads pretrained weights by, in place of `weights`: a model's name, `hf-hub:ORG/NAME`,
            `local-dir:PATH`, `hf:ORG/NAME`.
        features: what leaves the encoder, one of `FEATURES`.
        tile_size_px: S, on which the width of flattened features depends; by default the option `img_size`, or 224.
        options: passed to `timm.create_model`, or to the callable.

    Raises:
        ValueError: timm has no model of this name, the weights do not fit it or cannot be had, or the model has no such
            features or takes no tiles of this size.
    """
    if is_own_encoder(name):
        return build_own_encoder(name, weights, features, tile_size_px or 224, options)
    require_timm_name(name)
    if features != "pooled":
        options["global_pool"] = ""
    if source is not None and weights is None and not source.startswith(HF):
        encoder = build_from_hub(source, **options)
    else:
        encoder = timm.create_model(name, pretrained=False, num_classes=0, **layers_by_name(options))
    if source is not None and weights is None and source.startswith(HF):
        load_hf_weights(encoder, source)
    size_px = tile_size_px or options.get("img_size") or 224
    set_features(encoder, features, size_px)
    if tile_size_px or "img_size" in options:  # else nobody has said what tiles it will get
        warn_of_unseen_edges(encoder, size_px)
    if weights is not None:
        load_encoder_weights(encoder, weights)
    return encoder


def warn_of_unseen_edges(encoder: nn.Module, tile_size_px: int) -> None:
    """Log where an encoder cuts tiles into patches that do not fill them: it sees nothing of the rest."""
    patch_px = first_patches(encoder)
    padded = getattr(getattr(encoder, "patch_embed", None), "dynamic_img_pad", False)
    if patch_px is None or padded or tile_size_px % patch_px == 0:
        return
    seen = tile_size_px // patch_px * patch_px
    logger.warning(
        "%s cuts tiles of %d px into patches of %d px and does not see the last %d px of each row and column. "
        "HINT: --tile_size_px %d or %d, multiples of the patch.",
        *(type(encoder).__name__, tile_size_px, patch_px, tile_size_px - seen),
        *(seen or patch_px, seen + patch_px if seen else 2 * patch_px),
    )


class NoEncoder(nn.Module):
    """What stands in an encoder's place in a model of features: nothing to train, and nothing but features passes.

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
