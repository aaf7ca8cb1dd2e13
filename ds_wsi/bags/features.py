"""Features on disk as bags: CLAM's and TRIDENT's h5, CLAM's .pt, our safetensors; and the collator that stacks them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags

SUFFIXES = (".h5", ".pt", ".safetensors")


class FeatureBag(NamedTuple):
    """One slide's features.

    Attributes:
        features: float32 [N, D].
        coords: int64 [N, 2], level-0 px, or None where the file has none.
    """

    features: Tensor
    coords: Tensor | None


class FeatureFileError(ValueError):
    """A file that holds no bag of features."""


def read_features(path: str | Path) -> FeatureBag:
    """Read a slide's features, without running anything that a file could hold.

    `.h5`: datasets `features` ([N, D], or TRIDENT's [1, N, D]) and perhaps `coords`; `.pt`: a tensor, or a dict with
    `features`, by `torch.load(weights_only=True)`; `.safetensors`: tensors of these names.

    Raises:
        FeatureFileError: missing, torn, of another kind, empty, or not finite; names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatureFileError(f"features must be a file, got {path} (missing)")
    readers = {".h5": _read_h5, ".pt": _read_pt, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise FeatureFileError(f"features must be one of {', '.join(SUFFIXES)}, got {path.name!r} ({path})")
    try:
        features, coords = readers[path.suffix](path)
    except FeatureFileError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise FeatureFileError(
            f"features must be readable, got {reason} ({path}). HINT: extract them again."
        ) from error
    except Exception as error:  # torch's unpickler of weights raises errors of many kinds
        if type(error).__module__ not in ("pickle", "_pickle"):
            raise
        raise FeatureFileError(
            f"features in .pt must be tensors alone, got {str(error).splitlines()[0]} ({path}). "
            "HINT: save them as a tensor; files that run code when they are read are refused."
        ) from error
    if features.dim() == 3 and features.shape[0] == 1:
        features = features[0]
    if features.dim() != 2 or 0 in features.shape:
        raise FeatureFileError(f"features must be [N, D] with N >= 1, got {list(features.shape)} ({path})")
    features = features.float()
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise FeatureFileError(f"features must be finite, got {broken} rows that are not, of {len(features)} ({path})")
    if coords is not None:
        coords = coords.reshape(-1, 2).long()
        if len(coords) != len(features):
            raise FeatureFileError(f"coords must have a row a feature, {len(features)}, got {len(coords)} ({path})")
    return FeatureBag(features, coords)


def _read_h5(path: Path) -> tuple[Tensor, Tensor | None]:
    with h5py.File(path, "r") as file:
        if "features" not in file:
            raise FeatureFileError(f"features must be a dataset of the file, got {sorted(file)} ({path})")
        coords = torch.from_numpy(np.asarray(file["coords"]).astype(np.int64)) if "coords" in file else None
        return torch.from_numpy(np.asarray(file["features"]).astype(np.float32)), coords


def _read_pt(path: Path) -> tuple[Tensor, Tensor | None]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict):
        features, coords = found.get("features"), found.get("coords")
    else:
        features, coords = found, None
    if not isinstance(features, Tensor):
        raise FeatureFileError(
            f"features in .pt must be a tensor, or a dict with one, got {type(found).__name__} ({path})"
        )
    return features, coords if isinstance(coords, Tensor) else None


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if "features" not in names:
            raise FeatureFileError(f"features must be a tensor of the file, got {sorted(names)} ({path})")
        return file.get_tensor("features"), file.get_tensor("coords") if "coords" in names else None


class FeatureDataset(Dataset[tuple[Tensor, int, str]]):
    """Feature bags of a folder: (features float32 [N, D], label, slide_id).

    Args:
        folder: with a file `<slide_id>.h5`, `.pt` or `.safetensors` a slide.
        labels: (slide_id, label) in order.

    Raises:
        FeatureFileError: lists every slide without a file, at once.
    """

    def __init__(self, folder: str | Path, labels: Sequence[tuple[str, int]]) -> None:
        self.items: list[tuple[Path, int, str]] = []
        missing = []
        for slide_id, label in labels:
            found = [path for path in (Path(folder) / f"{slide_id}{suffix}" for suffix in SUFFIXES) if path.is_file()]
            if found:
                self.items.append((found[0], int(label), slide_id))
            else:
                missing.append(slide_id)
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise FeatureFileError(
                f"every slide must have features, {len(missing)} of {len(labels)} have none: {shown} ({folder})"
            )

    def __len__(self) -> int:
        """Slides."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """One slide's bag."""
        path, label, slide_id = self.items[index]
        return read_features(path).features, label, slide_id


def collate_bags(items: Sequence[tuple[Tensor, int, str]]) -> tuple[StackedBags, Tensor, list[str]]:
    """The `collate_fn` of a loader of bags: (StackedBags, labels int64 [B], slide ids); nothing is padded or cut."""
    features, labels, names = zip(*items, strict=True)
    return stack_bags(features), torch.tensor(labels), list(names)
