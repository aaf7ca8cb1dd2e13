"""An encoder's weights from a file: which of its tensors they are, under whatever names a training script gave them.

[Note: prefixes] Scripts nest weights (`state_dict`, `model_state_dict`, `teacher`) and put words before their names
(`module.` of DDP, `_orig_mod.` of torch.compile, `backbone.`, `encoder.`). Both are read as one: a nested dictionary is
flattened, so that its key is one more word. A prefix is whatever stands before the encoder's own names. The one that
serves the most of them is taken, and said.

[Note: left over] What a file holds beyond the encoder is left out and said: a classifier, a projection head, another
network. A tensor within the encoder's own parts that it has not (a third block of `layer1`, the `ls1.gamma` of layer
scale) is no such thing: the file is of another architecture, whose features these would not be.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_wsi.models.weights_file import WeightsFileError, require_finite
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.torch_files import TorchFileError, load_tensors
from ds_wsi.runtime.words import some

# Of two networks in one file the first is taken: the one that is meant to be used further.
RIVALS = (
    ("teacher", "student"),
    ("state_dict", "state_dict_ema"),
    ("model", "model_ema"),
    ("encoder_q", "encoder_k"),
    ("online_encoder", "target_encoder"),
)
# Counters that torch fills in itself, and tables that timm computes from sizes: no weights.
COUNTER = "num_batches_tracked"
TABLES = ("relative_position_index", "relative_coords_table", "attn_mask", COUNTER)
_SHOWN = 5


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load a local file's tensors into `encoder`, in place; what is taken of the file and what is left is logged.

    Names may have prefixes and be nested ([Note: prefixes]). BatchNorm's counters, which older files lack, stay.

    Raises:
        ValueError: the file is missing or holds other things than tensors, lacks parameters of the encoder, holds them
            in other shapes, holds parts of a larger encoder ([Note: left over]), or several networks that fit.
    """
    path = Path(path)
    require_weights_file(path)
    state, expected = read_tensors(path), encoder.state_dict()
    prefix = _prefix(state, expected, path)
    tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _require_fit(tensors, expected, encoder, path)
    taken = {key: tensors.get(key, value) for key, value in expected.items()}
    encoder.load_state_dict(taken)
    try:
        require_finite(encoder)
    except WeightsFileError as error:
        raise ValueError(f"encoder weights must be finite, got {error} ({path}). HINT: another file.") from error
    _log_taken(state, expected, prefix, path)


def require_weights_file(path: str | Path) -> None:
    """Raise ValueError where there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"encoder weights must be a file, got {path} (missing). HINT: check --encoder_weights.")


def _log_taken(state: Mapping[str, Tensor], expected: Collection[str], prefix: str, path: Path) -> None:
    n_taken = sum(prefix + key in state for key in expected)
    left = [key for key in state if not (key.startswith(prefix) and key.removeprefix(prefix) in expected)]
    words = f"{n_taken} tensors are the encoder's" + (f", whose names begin with {prefix!r}" if prefix else "")
    if left:
        words += f"; {len(left)} tensors are not the encoder's and were left out ({some(left, _SHOWN)})"
    logger.info("%s: %s", path, words)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or a torch file by name, nested ones by their names joined with dots.

    Raises:
        ValueError: it is torn, or holds what is no tensor or number.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except Exception as error:  # of a damaged file torch raises whatever comes to hand, KeyError and IndexError too
        # Torch's own message advises weights_only=False, which would run code from the file.
        told = isinstance(error, SafetensorError | TorchFileError)
        reason = str(error).splitlines()[0] if told else type(error).__name__
        remedy = "copy or download it again; or save the weights again as .safetensors"
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            reason += f" at an object of {named[1]}"
            remedy = (
                "of a file that you trust, and whose classes are installed, save the tensors alone: "
                'torch.save(torch.load(PATH, "cpu", weights_only=False)["state_dict"], FILE)'
            )
        raise ValueError(
            f"encoder weights must be a whole file of tensors and nothing else, got {reason} ({path}). HINT: {remedy}."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"encoder weights must be a dictionary of tensors, got {type(content).__name__} ({path}). "
            "HINT: torch.save(encoder.state_dict(), FILE)."
        )
    return dict(_flat(content, ""))


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterable[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the encoder's names in the file ([Note: prefixes])."""
    counts: Counter[str] = Counter()
    for key, value in state.items():
        words = key.split(".")
        for start in range(len(words)):
            name = ".".join(words[start:])
            if name in expected:
                # Names tell networks apart better than shapes, but of two with the same names shapes decide.
                counts[".".join([*words[:start], ""]) if start else ""] += 2 + (value.shape == expected[name].shape)
    if not counts:
        raise ValueError(
            f"encoder weights must be named as the encoder's ({some(expected, _SHOWN)}), got none of its "
            f"{len(expected)} names among {len(state)} tensors ({some(state, _SHOWN)}; {path}). "
            "HINT: --encoder must name the architecture that the file was saved from; a file of another library must "
            "be written again under timm's names."
        )
    best = max(counts.values())
    rivals = [prefix for prefix, count in counts.items() if count == best]
    chosen = [prefix for prefix in rivals if not any(other in rivals for other in _better(prefix))]
    first = chosen[0]
    different = [
        other for other in chosen[1:] if any(not _same(state, first + name, other + name) for name in expected)
    ]
    if different:
        raise ValueError(
            f"encoder weights must be of one network, got {len(different) + 1} that fit, under "
            f"{', '.join(repr(prefix) for prefix in [first, *different])} ({path}). "
            "HINT: save the one that is meant in a file of its own."
        )
    return first


def _better(prefix: str) -> Iterable[str]:
    """The prefixes that are taken before this one ([RIVALS])."""
    words = prefix.split(".")
    for taken, left in RIVALS:
        if left in words:
            yield ".".join(taken if word == left else word for word in words)


def _same(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    if one not in state or other not in state:
        return one not in state and other not in state
    return state[one].shape == state[other].shape and torch.equal(state[one], state[other])


def _require_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], encoder: nn.Module, path: Path) -> None:
    missing = [key for key in expected if key not in tensors and not key.endswith(COUNTER)]
    misfits = {
        key: (tensors[key], value)
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    }
    if missing or misfits:
        shapes = [f"{key} {list(given.shape)} for {list(value.shape)}" for key, (given, value) in misfits.items()]
        raise ValueError(
            f"encoder weights must fit the encoder, got {path} with {len(missing)} of {len(expected)} tensors missing "
            f"({some(missing, _SHOWN)}) and {len(misfits)} of another shape ({some(shapes, _SHOWN)}). "
            f"HINT: {_remedy(missing, misfits, encoder)}"
        )
    more = [key for key in tensors if key not in expected and _is_inside(key, expected, encoder)]
    if more:
        raise ValueError(
            f"encoder weights must be of the encoder's architecture, got {path} with {len(more)} tensors in parts of "
            f"it that it has not ({some((f'{key} {list(tensors[key].shape)}' for key in more), _SHOWN)}). "
            "HINT: --encoder must name the architecture that the file was saved from, with its options (layer scale is "
            "init_values=1e-5 of `build_encoder`); hf-hub: and local-dir: names bring them along."
        )


def _remedy(missing: Collection[str], misfits: Mapping[str, tuple[Tensor, Tensor]], encoder: nn.Module) -> str:
    if not missing and set(misfits) == {"pos_embed"}:
        given, value = misfits["pos_embed"]
        n_prefix = int(getattr(encoder, "num_prefix_tokens", 1))
        stem = first_patches(encoder)
        for n_tokens in (given.shape[1] - n_prefix, given.shape[1]):
            side = int(max(n_tokens, 0) ** 0.5)
            if stem and side and side * side == n_tokens and given.shape[2:] == value.shape[2:]:
                return f"its positions are of tiles of {side * stem} px: --tile_size_px {side * stem}."
    stem_weights = [
        key for key, (given, value) in misfits.items() if given.dim() == 4 and given.shape[1] != value.shape[1]
    ]
    if not missing and stem_weights and len(misfits) == 1:
        return f"its images have {misfits[stem_weights[0]][0].shape[1]} channels and tiles have 3: take another file."
    return "--encoder must name the architecture that the file was saved from, with its options."


def _is_inside(key: str, expected: Collection[str], encoder: nn.Module) -> bool:
    """Whether a tensor belongs to a part that the encoder has, and is no classifier's ([Note: left over])."""
    if key.split(".")[-1] in TABLES:
        return False
    heads = (getattr(encoder, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    if any(key.startswith(f"{head}.") for head in heads):
        return False
    first, dot, _ = key.partition(".")
    return bool(dot) and any(name.startswith(f"{first}.") for name in expected)


def first_patches(encoder: nn.Module) -> int | None:
    """The side of the patches that an encoder cuts a tile into at first; None where its first layer overlaps."""
    first = next((part for part in encoder.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or isinstance(first.padding, str) or any(first.padding):
        return None
    side, step = first.kernel_size[0], first.stride[0]
    return step if side <= step and step > 1 else None
