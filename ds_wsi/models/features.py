"""What leaves an encoder: pooled features, the whole feature map, or the class token with the mean of the others."""

from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.models.choices import FEATURES
from ds_wsi.runtime.seams import FakeTensorMode, is_zero3_part, whole_shape


class ClassAndMean(nn.Module):
    """Tokens [N, T, D] -> [N, 2 D]: the class token beside the mean of the patch tokens.

    Args:
        n_prefix: tokens before the patches': the class token and registers, which only the first of leaves.
    """

    def __init__(self, n_prefix: int) -> None:
        super().__init__()
        self.n_prefix = n_prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return torch.cat([tokens[:, 0], tokens[:, self.n_prefix :].mean(1)], dim=-1)


def set_features(encoder: nn.Module, features: str, tile_size_px: int) -> None:
    """Let a timm model return `features` [N, num_features], in place; its forward and its weights' names stay.

    Args:
        encoder: built by timm without a classifier, and without pooling unless `features` is "pooled".
        features: one of `FEATURES`.
        tile_size_px: side of the tiles, for the pass on shapes alone by which `num_features` is known.

    Raises:
        ValueError: the model has no such features, or takes no tiles of this size.
    """
    kind = type(encoder).__name__
    if features not in FEATURES:
        raise ValueError(f"encoder_features must be one of {', '.join(FEATURES)}, got {features!r}")
    if features == "flattened":
        shape = features_shape(encoder, tile_size_px)
        if len(shape) != 4:
            raise ValueError(
                f"encoder_features must be pooled or cls_mean for {kind}, which has no feature map (it returns "
                f"{list(shape)}), got flattened"
            )
        _replace_classifier(encoder, nn.Flatten(1))
    elif features == "cls_mean":
        shape, n_prefix = features_shape(encoder, tile_size_px), getattr(encoder, "num_prefix_tokens", 0)
        if len(shape) != 3 or not getattr(encoder, "has_class_token", n_prefix > 0):
            raise ValueError(
                f"encoder_features must be pooled or flattened for {kind}, which has no class token (it returns "
                f"{list(shape)}), got cls_mean"
            )
        _replace_classifier(encoder, ClassAndMean(int(n_prefix)))
    shape = features_shape(encoder, tile_size_px)
    if len(shape) != 2:
        raise ValueError(
            f"an encoder must return features [N, D], got {list(shape)} of {kind} for one tile. "
            "HINT: --encoder_features cls_mean where it returns tokens, flattened where it returns a map."
        )
    encoder.num_features = shape[1]  # type: ignore[assignment]


def features_shape(encoder: nn.Module, tile_size_px: int) -> tuple[int, ...]:
    """The shape of what `encoder` returns for one tile; nothing is computed, no state or generator changes.

    Raises:
        ValueError: it takes no tiles of this size.
    """
    flags = [(part, part.training) for part in encoder.modules()]
    like = next(encoder.parameters(), torch.empty(0))  # one of one's own can be without
    encoder.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            tile = torch.empty(1, 3, tile_size_px, tile_size_px, device=like.device, dtype=like.dtype)
            # Built at ZeRO stage 3, its parameters are this rank's parts.
            parts = {name: part for name, part in encoder.named_parameters() if is_zero3_part(part)}
            whole = {
                name: torch.empty(whole_shape(part), device=part.device, dtype=part.dtype)
                for name, part in parts.items()
            }
            # Transformers 4 builds a model that it loads with parameters on "meta", and its buffers on the CPU.
            away = {name: part for name, part in encoder.named_buffers() if part.device != like.device}
            whole |= {name: torch.empty_like(part, device=like.device) for name, part in away.items()}
            out = torch.func.functional_call(encoder, whole, (tile,))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{type(encoder).__name__} must take tiles of {tile_size_px} px, got: {reason[0]} "
            "HINT: another --tile_size_px; vision transformers take multiples of their patches' side."
        ) from error
    finally:
        for part, training in flags:
            part.training = training
    if not isinstance(out, Tensor):
        raise ValueError(f"{type(encoder).__name__} must return a tensor for tiles, got {type(out).__name__}")
    return tuple(out.shape)


def _replace_classifier(encoder: nn.Module, last: nn.Module) -> None:
    """Put `last` in the place of the classifier that was left out: the last operation of timm's models."""
    get: Any = getattr(encoder, "get_classifier", None)
    classifier = None if get is None else get()
    paths = [name for name, part in encoder.named_modules() if part is classifier]
    if not isinstance(classifier, nn.Identity) or len(paths) != 1:
        raise ValueError(
            f"encoder_features must be pooled for {type(encoder).__name__}, whose end has no place for another. "
            "HINT: choose another encoder."
        )
    parent, _, leaf = paths[0].rpartition(".")
    setattr(encoder.get_submodule(parent), leaf, last)
