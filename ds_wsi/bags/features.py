"""Features on disk as bags: CLAM's and TRIDENT's h5, CLAM's .pt, our safetensors; and the collator that stacks them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ds_wsi.bags.feature_memory import FeatureMemory
from ds_wsi.bags.tile_side import side_of
from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.h5_files import member, number_attributes, numbers, opened_h5
from ds_wsi.runtime.tensor_file import write_tensors
from ds_wsi.runtime.tensor_seal import opened, sealed
from ds_wsi.runtime.torch_files import load_tensors, require_in_memory
from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags

SUFFIXES = (".h5", ".pt", ".safetensors")
BELOW = ("h5_files", "pt_files", "features")  # where CLAM and others put them below the folder that they name
FORMAT, VERSION = "ds_wsi.features", "1"


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


@dataclass(frozen=True)
class FeatureFile:
    """One slide's bag on disk: in a cohort of features what a TileGrid is in one of slides.

    Attributes:
        slide_id: the slide's name.
        path: where the file is.
        n_rows, width: N and D of the features [N, D].
        n_bytes, modified_ns: the file's size and time, when it was examined.
        checksum: CRC-32 of the float32 features; None where they were not read.
        memory: what keeps the features of the cohort's files; None: nothing does.
    """

    slide_id: str
    path: Path
    n_rows: int
    width: int
    n_bytes: int
    modified_ns: int
    checksum: int | None = None
    memory: FeatureMemory | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return self.n_rows


def find_features(directory: str | Path, slide_id: str) -> Path:
    """The one file `<slide_id>.h5`, `.pt` or `.safetensors` of a folder.

    Raises:
        FeatureFileError: there is none, or several.
    """
    paths = [path for path in (Path(directory) / f"{slide_id}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(paths) == 1:
        return paths[0]
    names = ", ".join(path.name for path in paths) or "none"
    below = [] if paths else [folder for folder in BELOW if _holds(Path(directory) / folder, slide_id)]
    hint = f". HINT: it is in {below[0]} there: --features_dir {Path(directory) / below[0]}." if below else ""
    raise FeatureFileError(
        f"slide {slide_id} must have one file of features, {', '.join(SUFFIXES)}, got {names} ({directory}){hint}"
    )


def _holds(directory: Path, slide_id: str) -> bool:
    return any((directory / f"{slide_id}{suffix}").is_file() for suffix in SUFFIXES)


def read_features(path: str | Path) -> FeatureBag:
    """Read a slide's features, without running anything that a file could hold.

    `.h5`: datasets `features` ([N, D], or TRIDENT's [1, N, D]) and perhaps `coords`; `.pt`: a tensor, or a dict with
    `features`, by `torch.load(weights_only=True)`; `.safetensors`: tensors of these names.

    Raises:
        FeatureFileError: missing, torn, of another kind, empty, or not finite; names the file and what is wrong.
    """
    path = _checked(path)
    readers = {".h5": _read_h5, ".pt": _read_pt, ".safetensors": _read_safetensors}
    with _named_errors(path):
        features, coords = readers[path.suffix](path)
    features = features.reshape(_bag_shape(features.shape, path)).float()
    if broken := rows_not_finite(features):
        raise FeatureFileError(f"features must be finite, got {broken} rows that are not, of {len(features)} ({path})")
    if coords is not None:
        coords = coords.reshape(-1, 2).long()
        if len(coords) != len(features):
            raise FeatureFileError(f"coords must have a row per feature, {len(features)}, got {len(coords)} ({path})")
    return FeatureBag(features, coords)


def rows_not_finite(features: Tensor) -> int:
    """How many rows of features [N, D] hold infinity or no number."""
    return int((~features.isfinite().all(1)).sum())


def read_shape(path: str | Path) -> tuple[int, int]:
    """The shape [N, D] of a slide's features from the file's head; a `.pt` of the old format alone is read whole.

    Raises:
        FeatureFileError: as `read_features`, but for values that are not finite, which are not looked at.
    """
    path = _checked(path)
    with _named_errors(path):
        if path.suffix == ".h5":
            with opened_h5(path) as file:
                shape = _h5_features(file, path).shape
        elif path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                _require_features(file, path)
                shape = file.get_slice("features").get_shape()
        else:
            shape = _pt_tensors(path, mmap=True)[0].shape
    return _bag_shape(shape, path)


def read_places(path: str | Path) -> tuple[np.ndarray, float] | None:
    """Where a file's tiles lie: coords int64 [N, 2] and a tile's side, both level-0 px; None where it does not tell.

    The side is the file's own (ours, TRIDENT's `patch_size_level0`); where it has none, as CLAM's, it is that of tiles
    which lie side by side. Scattered tiles do not tell it.

    Raises:
        FeatureFileError: as `read_features`.
    """
    path = _checked(path)
    side: Any = None
    with _named_errors(path):
        if path.suffix == ".h5":
            with opened_h5(path) as file:
                dataset = member(file, "coords")
                coords = None if dataset is None else numbers(dataset)
                name = "patch_size_level0"
                side = None if dataset is None else number_attributes(dataset, (name,)).get(name)
        elif path.suffix == ".safetensors":
            with safe_open(str(path), framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                side = opened(file.metadata() or {}, tensors).get("tile_size_level0_px")
                coords = tensors.get("coords")
        else:
            places = _pt_tensors(path, mmap=False)[1]
            coords = None if places is None else places.numpy()
        side = None if side is None else float(side)
    if coords is None:
        return None
    coords = coords.reshape(-1, 2).astype(np.int64)
    side = side or side_of(coords)
    return None if side is None else (coords, side)


def write_features(
    path: str | Path, features: Tensor, coords: Tensor, tile_size_level0_px: float, about: Mapping[str, str]
) -> None:
    """Write a slide's features as safetensors, atomically.

    Args:
        path: ends in `.safetensors`.
        features: float32 [N, D].
        coords: int64 [N, 2], level-0 px.
        tile_size_level0_px: side of a tile.
        about: what they were made with, for `read_about`.
    """
    metadata = {"format": FORMAT, "version": VERSION, "tile_size_level0_px": repr(float(tile_size_level0_px)), **about}
    tensors = {"features": features.contiguous(), "coords": coords.contiguous()}
    metadata = sealed(metadata, {name: value.numpy() for name, value in tensors.items()})
    with atomic_path(path, sum(value.nbytes for value in tensors.values())) as temporary:
        write_tensors(temporary, tensors, metadata)


def read_about(path: str | Path) -> dict[str, str]:
    """What `write_features` was told of a `.safetensors` file; empty where another program wrote it.

    Raises:
        FeatureFileError: the file is torn.
    """
    path = _checked(path)
    with _named_errors(path), safe_open(str(path), framework="pt") as file:
        metadata = opened(file.metadata() or {})
    if (metadata.pop("format", None), metadata.pop("version", None)) != (FORMAT, VERSION):
        return {}
    metadata.pop("tile_size_level0_px", None)
    return metadata


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FeatureFileError(f"features must be a file, got {path} (missing)")
    if path.suffix not in SUFFIXES:
        raise FeatureFileError(f"features must be one of {', '.join(SUFFIXES)}, got {path.name!r} ({path})")
    return path


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what the formats' readers raise into errors that name the file."""
    try:
        yield
    except FeatureFileError:
        raise
    except Exception as error:  # of a damaged file the readers raise whatever comes to hand, KeyError and TypeError too
        if type(error).__module__ not in ("pickle", "_pickle"):
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise FeatureFileError(
                f"features must be readable, got {reason} ({path}). HINT: extract them again."
            ) from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {named[1]}" if named else str(error).splitlines()[0]
        raise FeatureFileError(
            f"features in .pt must be tensors alone, got {what} ({path}). "
            "HINT: save them as a tensor; files that run code when they are read are refused."
        ) from error


def _bag_shape(shape: Sequence[int], path: Path) -> tuple[int, int]:
    sizes = tuple(shape)
    if len(sizes) == 3 and sizes[0] == 1:
        sizes = sizes[1:]
    if len(sizes) != 2 or 0 in sizes:
        raise FeatureFileError(f"features must be [N, D] with N >= 1, got {list(sizes)} ({path})")
    return sizes[0], sizes[1]


def _no_features(content: Mapping[Any, Any], path: Path) -> FeatureFileError:
    """What is in a file in the place of `features`, and what would make it readable."""
    entries = [f"{name!r} {_kind(value)}" for name, value in sorted(content.items(), key=lambda item: str(item[0]))]
    like = [name for name, value in content.items() if len(_shape(value)) in (2, 3) and 0 not in _shape(value)]
    likely = [name for name in like if str(name) not in ("coords", "coordinates")]
    write = {
        ".h5": "file.move({0!r}, 'features') with h5py.File(path, 'a')",
        ".pt": "torch.save({{**found, 'features': found[{0!r}]}}, path)",
        ".safetensors": "save_file({{'features': found.pop({0!r}), **found}}, path)",
    }[path.suffix]
    remedy = (
        f"if {likely[0]!r} holds them, name it so: {write.format(likely[0])}"
        if likely
        else "write them as a dataset, or a tensor, of that name [N, D]"
    )
    return FeatureFileError(
        f"a file of features must hold 'features', a tensor [N, D], got {', '.join(entries) or 'nothing'} ({path}). "
        f"HINT: {remedy}."
    )


def _shape(value: Any) -> tuple[int, ...]:
    shape = getattr(value, "shape", ())
    return tuple(shape) if shape is not None else ()


def _kind(value: Any) -> str:
    return str(list(_shape(value))) if hasattr(value, "shape") else type(value).__name__


def _h5_features(file: h5py.File, path: Path) -> Any:
    dataset = member(file, "features")
    if not isinstance(dataset, h5py.Dataset):
        links = {name: file.get(name, getlink=True) for name in file}
        raise _no_features(
            {name: file[name] if isinstance(link, h5py.HardLink) else link for name, link in links.items()}, path
        )
    return dataset


def _read_h5(path: Path) -> tuple[Tensor, Tensor | None]:
    with opened_h5(path) as file:
        dataset = member(file, "coords")
        coords = None if dataset is None else torch.from_numpy(numbers(dataset).astype(np.int64))
        return torch.from_numpy(numbers(_h5_features(file, path)).astype(np.float32)), coords


def _read_pt(path: Path) -> tuple[Tensor, Tensor | None]:
    return _pt_tensors(path, mmap=False)


def _pt_tensors(path: Path, mmap: bool) -> tuple[Tensor, Tensor | None]:
    content = load_tensors(path, mmap=mmap)
    if isinstance(content, Mapping):
        features, coords = content.get("features"), content.get("coords")
        if not isinstance(features, Tensor):
            raise _no_features(content, path)
    else:
        features, coords = content, None
    if not isinstance(features, Tensor):
        items = (
            f" of {len(content)} {type(content[0]).__name__}" if isinstance(content, list | tuple) and content else ""
        )
        raise FeatureFileError(
            f"features in .pt must be a tensor, or a dict with 'features', got {type(content).__name__}{items} "
            f"({path}). HINT: torch.save(features, path), of one tensor [N, D]."
        )
    require_in_memory(features, "features")
    if isinstance(coords, Tensor):
        require_in_memory(coords, "coords")
    # Saved without no_grad they still ask for a gradient, of a graph that is gone.
    return features.detach(), coords.detach() if isinstance(coords, Tensor) else None


def _require_features(file: Any, path: Path) -> None:
    """Refuse an open safetensors file without features."""
    if "features" not in set(file.keys()):
        raise _no_features({name: _Head(tuple(file.get_slice(name).get_shape())) for name in file.keys()}, path)  # noqa: SIM118


class _Head(NamedTuple):
    """What is known of a tensor that is not read."""

    shape: tuple[int, ...]


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        _require_features(file, path)
        tensors = {name: file.get_tensor(name) for name in ("features", "coords") if name in names}
        metadata = file.metadata() or {}
    if metadata.get("format") == FORMAT:
        opened(metadata, {name: value.numpy() for name, value in tensors.items()})
    return tensors["features"], tensors.get("coords")


class FeatureDataset(Dataset[tuple[Tensor, int, str]]):
    """Feature bags of a folder: (features float32 [N, D], label, slide_id).

    Args:
        folder: a folder with one file `<slide_id>.h5`, `.pt` or `.safetensors` per slide.
        labels: (slide_id, label) in order.

    Raises:
        FeatureFileError: lists every slide that has not one file, at once.
    """

    def __init__(self, folder: str | Path, labels: Sequence[tuple[str, int]]) -> None:
        self.items: list[tuple[Path, int, str]] = []
        problems = []
        for slide_id, label in labels:
            try:
                self.items.append((find_features(folder, slide_id), int(label), slide_id))
            except FeatureFileError as error:
                problems.append(str(error))
        if problems:
            raise FeatureFileError("\n".join(problems))

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
