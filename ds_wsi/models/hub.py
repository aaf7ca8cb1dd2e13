"""Encoders with weights from elsewhere: timm's names, `hf-hub:ORG/NAME`, `local-dir:PATH`, transformers' `hf:ORG/NAME`.

Only timm loads: safetensors where the repository has them, tensors alone otherwise, and no code of the repository.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import EntryNotFoundError
from timm.data import resolve_data_config
from timm.models import load_model_config_from_hf
from torch import nn

from ds_wsi.models.hf_weights import hf_source
from ds_wsi.models.known_encoders import FOLDER, HF, HUB, IMAGENET, KNOWN, EncoderSource
from ds_wsi.models.own import ENCODER, channels_of, check_options, find_own, installed, is_code
from ds_wsi.runtime.contracts import SaysWeights
from ds_wsi.runtime.files import read_object

# Arguments of `timm.create_model` that name files or addresses of weights. Options may be a stranger's, of a model's
# config.json: they say how an encoder is built, and never what is opened.
OF_WEIGHTS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def is_own_encoder(name: str) -> bool:
    """Whether a name is of own code, see `ds_wsi.models.own`: those of timm and of a place of weights go before."""
    if name.startswith(HF):
        return False
    if is_code(name):
        return True
    return not (name.startswith((HUB, FOLDER, HF)) or timm.is_model(name)) and name in installed(ENCODER)


def says_weights(name: str) -> bool:
    """Whether an encoder's name brings weights with it; own code says so by the callable's `has_weights`."""
    if is_own_encoder(name):
        build = find_own(name, ENCODER)
        return isinstance(build, SaysWeights) and bool(build.has_weights)
    return name.startswith((HUB, FOLDER, HF))


def resolve_encoder(name: str, options: Mapping[str, Any] | None = None) -> EncoderSource:
    """What `name` stands for: a timm model's name, `hf-hub:ORG/NAME`, `local-dir:PATH`, or own code.

    A hub's model that is not in `KNOWN` has its config.json downloaded; own code's module is imported.

    Args:
        name: see above.
        options: keyword arguments of own code; others have none.

    Raises:
        ValueError: it cannot be downloaded, imported or read, or names no model; options that it does not take.
    """
    if is_own_encoder(name):
        return _own_source(name, dict(options or {}))
    if options:
        raise ValueError(
            f"--encoder_options must be given with an encoder of your own, MODULE:CALLABLE, got {dict(options)} for "
            f"{name}. HINT: leave it out."
        )
    source = KNOWN.get(name.lower())
    if source is not None:
        return source
    if name.startswith(HF):
        return hf_source(name)
    if not name.startswith((HUB, FOLDER)):
        require_timm_name(name)
        cfg_of_timm = timm.get_pretrained_cfg(name, allow_unregistered=True)
        return _source(name, name, cfg_of_timm.to_dict() if cfg_of_timm is not None else {}, {})
    try:
        if name.startswith(HUB):
            cfg, architecture, options = load_model_config_from_hf(name.removeprefix(HUB))
        else:
            whole = read_object(Path(name.removeprefix(FOLDER)) / "config.json", "config.json of an encoder")
            architecture, cfg, options = (
                whole["architecture"],
                whole.get("pretrained_cfg", whole),
                whole.get("model_args"),
            )
        # No classifier, and the features decide on no pooling.
        arguments = {key: value for key, value in (options or {}).items() if key != "num_classes" and value != ""}
        layers_by_name(arguments)
        return _source(name, architecture, cfg, arguments)
    # No JSON, no name of a repository, or no configuration of a model.
    except (OSError, EntryNotFoundError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _not_loaded(name, error) from error


def require_timm_name(name: str) -> None:
    """Raise ValueError where timm has no model of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(
            f"encoder must be a timm model's name, or begin with hf-hub:, local-dir: or hf:, or be MODULE:CALLABLE of "
            f"your own{_named_by_packages()}, got {name!r}. "
            f"HINT: {'did you mean ' + ', '.join(near) + '?' if near else 'timm.list_models() lists them.'}"
        )


def _named_by_packages() -> str:
    names = sorted(installed(ENCODER))
    return f", or of installed packages {', '.join(names)}" if names else ""


def _own_source(name: str, options: dict[str, Any]) -> EncoderSource:
    """What own code says of itself before it is built, by the callable's attributes."""
    build = find_own(name, ENCODER)
    check_options(name, build, options, ("tile_size_px",))
    usual_mean, usual_std = IMAGENET
    mean: Any = channels_of(build, name, "mean", usual_mean)
    std: Any = channels_of(build, name, "std", usual_std)
    return EncoderSource(name, name, mean, std, options=options, is_own=True)


def _source(name: str, architecture: str, cfg: Mapping[str, Any], options: dict[str, Any]) -> EncoderSource:
    data = resolve_data_config(pretrained_cfg=dict(cfg))
    size = cfg.get("input_size") if name.startswith((HUB, FOLDER)) else None
    return EncoderSource(
        name,
        architecture,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        options=options,
        tile_size_px=None if size is None else int(size[-1]),
    )


def build_from_hub(source: str, **options: object) -> nn.Module:
    """Build a timm model with its pretrained weights and without its classifier.

    Raises:
        ValueError: the weights cannot be downloaded or read, or are not of the model.
    """
    arguments = layers_by_name(options)
    try:
        with _tensors_alone():
            return timm.create_model(source, pretrained=True, num_classes=0, **arguments)
    except Exception as error:  # of a damaged file timm and torch raise whatever comes to hand
        raise _not_loaded(source, error) from error


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Inside, `torch.load` runs nothing: earlier timm (1.0.16) has it take any pickle of a folder."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def layers_by_name(options: Mapping[str, object]) -> dict[str, object]:
    """Options of `timm.create_model` from JSON's: a layer by its name in `timm.layers`.

    Raises:
        ValueError: timm has no such layer, or an option says where weights lie.
    """
    arguments = dict(options)
    named = sorted(set(arguments) & set(OF_WEIGHTS))
    if named:
        raise ValueError(
            f"options of an encoder must not say where its weights are, got {named[0]}={arguments[named[0]]!r}. HINT: "
            "--encoder_weights FILE, or the name of the encoder."
        )
    if "norm_eps" in arguments:
        arguments["norm_layer"] = partial(timm.layers.LayerNorm, eps=arguments.pop("norm_eps"))
    layer = arguments.get("mlp_layer")  # of an activation or a norm timm takes names itself
    if isinstance(layer, str):
        if not callable(getattr(timm.layers, layer, None)):
            raise ValueError(f"mlp_layer must be a layer of timm.layers, got {layer!r}")
        arguments["mlp_layer"] = getattr(timm.layers, layer)
    return arguments


def _not_loaded(name: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [""])[0]
    if "weights_only" in str(error) or "Weights only" in str(error):  # torch and timm advise to run what is in it
        reason = "a file that holds other things than tensors, which could run code when it is read."
    return ValueError(
        f"the weights of encoder {name!r} must be downloaded or lie in a folder, got {type(error).__name__}: {reason} "
        "HINT: --encoder_weights FILE takes them from a local file; a gated model needs `hf auth login` and its "
        "authors' consent."
    )
