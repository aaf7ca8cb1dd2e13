"""Features on disk: every format, every way a file can be wrong, and the loader that stacks them."""

import pickle

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ds_wsi import build_aggregator
from ds_wsi.bags.features import (
    FeatureDataset,
    FeatureFileError,
    collate_bags,
    find_features,
    read_about,
    read_features,
    read_places,
    read_shape,
    write_features,
)

FEATURES = torch.arange(12.0).reshape(4, 3)
COORDS = torch.arange(8).reshape(4, 2)


def write(path, features=FEATURES, coords=COORDS, kind=None):
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"] = np.asarray(features)
            if coords is not None:
                file["coords"] = np.asarray(coords)
    elif path.suffix == ".safetensors":
        save_file({"features": features} | ({} if coords is None else {"coords": coords}), path)
    else:
        torch.save(features if coords is None else {"features": features, "coords": coords}, path)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".safetensors"])
def test_every_format_is_read_with_and_without_coords(tmp_path, suffix):
    for coords in (COORDS, None):
        bag = read_features(write(tmp_path / f"slide{suffix}", coords=coords))
        assert torch.equal(bag.features, FEATURES)
        assert bag.coords is None if coords is None else torch.equal(bag.coords, COORDS)
    half = read_features(write(tmp_path / f"half{suffix}", features=FEATURES.half(), coords=None))
    assert half.features.dtype == torch.float32


def test_tridents_leading_dimension_is_taken_off(tmp_path):
    assert read_features(write(tmp_path / "a.h5", features=FEATURES[None])).features.shape == (4, 3)


def test_what_is_wrong_is_said(tmp_path):
    (tmp_path / "torn.h5").write_bytes(write(tmp_path / "whole.h5").read_bytes()[:300])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10" * 20)
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(pytest.raises))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["coords"] = np.zeros((2, 2))
    broken = FEATURES.clone()
    broken[1, 2] = torch.nan
    torch.save(["a"], tmp_path / "list.pt")
    for path, words in (
        (tmp_path / "gone.h5", "must be a file, got .*gone.h5 .missing."),
        (tmp_path / "a.npy", "must be a file"),
        (tmp_path / "torn.h5", r"must be readable.*torn.h5.*HINT: extract"),
        (tmp_path / "torn.safetensors", r"must be readable.*torn.safetensors"),
        (tmp_path / "torn.pt", r"must be readable.*torn.pt"),
        (tmp_path / "code.pt", r"must be tensors alone.*code.pt.*HINT: save them as a tensor"),
        (tmp_path / "list.pt", "must be a tensor, or a dict with 'features', got list"),
        (tmp_path / "other.h5", r"must hold 'features', .* got 'coords' \[2, 2\]"),
        (write(tmp_path / "nan.h5", features=broken), "must be finite, got 1 rows that are not, of 4"),
        (write(tmp_path / "flat.h5", features=FEATURES[0]), r"must be \[N, D\] with N >= 1, got \[3\]"),
        (write(tmp_path / "short.h5", coords=COORDS[:2]), "coords must have a row per feature, 4, got 2"),
    ):
        with pytest.raises(FeatureFileError, match=words):
            read_features(path)
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(FeatureFileError, match=r"must be one of .h5, .pt, .safetensors, got 'a.npy'"):
        read_features(tmp_path / "a.npy")


def test_a_loader_makes_stacks_that_train(tmp_path):
    for name, suffix, count in (("a", ".h5", 4), ("b", ".pt", 2), ("c", ".safetensors", 3)):
        write(tmp_path / f"{name}{suffix}", features=FEATURES[:count], coords=None)
    dataset = FeatureDataset(tmp_path, [("a", 0), ("b", 1), ("c", 0)])
    (stack, labels, names), (last, *_) = list(DataLoader(dataset, batch_size=2, collate_fn=collate_bags))
    assert stack.lengths.tolist() == [4, 2]
    assert labels.tolist() == [0, 1]
    assert names == ["a", "b"]
    assert last.n_bags == 1
    build_aggregator("abmil", 3, 2)(stack).logits.sum().backward()
    write(tmp_path / "a.pt")
    with pytest.raises(FeatureFileError, match=r"(?s)slide x must have .*got none.*slide a must .*got a.h5, a.pt"):
        FeatureDataset(tmp_path, [("x", 0), ("b", 1), ("a", 0)])


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".safetensors"])
def test_a_shape_is_read_without_the_values(tmp_path, suffix):
    for features in (FEATURES, FEATURES[None], FEATURES.half(), FEATURES * torch.nan):
        assert read_shape(write(tmp_path / f"a{suffix}", features=features)) == (4, 3)
    with pytest.raises(FeatureFileError, match=r"must be \[N, D\] with N >= 1, got \[0, 3\]"):
        read_shape(write(tmp_path / f"b{suffix}", features=FEATURES[:0], coords=None))


def test_a_pt_of_the_old_format_has_a_shape_too(tmp_path):
    torch.save(FEATURES, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert read_shape(tmp_path / "a.pt") == (4, 3)


def grid_of(columns, rows, side, start=(0, 0)):
    return [(start[0] + side * x, start[1] + side * y) for y in range(rows) for x in range(columns)]


@pytest.mark.parametrize(
    ("coords", "side"),
    [
        (grid_of(6, 5, 256), 256),
        (grid_of(6, 5, 1024), 1024),
        (grid_of(4, 4, 256) + grid_of(5, 3, 256, (5003, 77)), 256),  # contours of CLAM's: each its own grid
        ([corner for index, corner in enumerate(grid_of(12, 12, 256)) if index % 5], 256),  # holes
        (grid_of(7, 1, 224), 224),  # a core's one row
        (grid_of(1, 7, 224), 224),
        ([(0, 0), (2560, 0), (0, 5120), (2560, 5120)], None),  # none beside another
        (grid_of(3, 3, 2560), None),  # larger than tiles are
        ([(0, 0), (2560, 0), (5120, 0)], None),
        ([(0, 0), (768, 0), (256, 2560), (2048, 2560), (9984, 5120)], None),
        ([(0, 0), (256, 0)], None),
        ([(256 * (37 * i % 101), 256 * (53 * i % 97)) for i in range(60)], None),
    ],
)
def test_the_side_of_tiles_is_told_by_tiles_side_by_side_or_not_at_all(tmp_path, coords, side):
    places = torch.tensor(coords)
    answer = read_places(write(tmp_path / "a.h5", torch.ones(len(places), 3), places))
    assert (None if answer is None else answer[1]) == side


def test_places_have_the_files_side_or_the_commonest_step(tmp_path):
    # A row of three, a tile below, and one of another contour, 5 px off the grid.
    coords = torch.tensor([[0, 0], [256, 0], [512, 0], [256, 256], [517, 256]])
    features = torch.ones(5, 3)
    for suffix in (".h5", ".pt", ".safetensors"):
        positions, side = read_places(write(tmp_path / f"a{suffix}", features, coords))
        assert positions.tolist() == coords.tolist()
        assert side == 256
        assert read_places(write(tmp_path / f"b{suffix}", features, None)) is None
        assert read_places(write(tmp_path / f"c{suffix}", features[:1], coords[:1])) is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["coords"].attrs["patch_size_level0"] = 512
    assert read_places(tmp_path / "a.h5")[1] == 512
    write_features(tmp_path / "d.safetensors", features, coords, 200.5, {"encoder": "x"})
    assert read_places(tmp_path / "d.safetensors")[1] == 200.5
    assert read_about(tmp_path / "d.safetensors") == {"encoder": "x"}
    assert read_about(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("suffix", [".pt", ".h5", ".safetensors"])
def test_features_of_another_name_are_named_with_the_remedy(tmp_path, suffix):
    path, value = tmp_path / f"a{suffix}", torch.randn(5, 8)
    content = {"tile_embeds": value, "coords": torch.zeros(5, 2)}
    if suffix == ".pt":
        torch.save({**content, "label": 3}, path)
    elif suffix == ".safetensors":
        save_file(content, path)
    else:
        with h5py.File(path, "w") as file:
            for name, tensor in content.items():
                file[name] = tensor.numpy()
    for read in (read_features, read_shape):
        words = r"'coords' \[5, 2\].*'tile_embeds' \[5, 8\].*HINT: if 'tile_embeds'"
        with pytest.raises(FeatureFileError, match=words) as error:
            read(path)
    remedy = str(error.value).split("name it so: ")[1].rstrip(".")
    names = {"path": path, "found": content, "torch": torch, "save_file": save_file, "h5py": h5py}
    if suffix == ".h5":
        call, _, opened = remedy.partition(" with ")
        with h5py.File(path, "a") as file:
            eval(call, {"file": file})
        assert opened == "h5py.File(path, 'a')"
    else:
        eval(remedy, names)  # the remedy works
    assert torch.equal(read_features(path).features, value)


def test_features_that_ask_for_a_gradient_are_numbers_like_others(tmp_path):
    value = torch.randn(5, 8, requires_grad=True) * 1.0
    torch.save(value, tmp_path / "a.pt")
    torch.save({"features": torch.nn.Parameter(value.detach()), "coords": torch.zeros(5, 2)}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        bag = read_features(tmp_path / name)
        assert not bag.features.requires_grad
        assert torch.equal(bag.features, value.detach())
        assert len(bag.features.numpy().data) == 5
        assert read_shape(tmp_path / name) == (5, 8)
    batch = torch.utils.data.DataLoader(FeatureDataset(tmp_path, [("a", 0), ("b", 1)]), 2, collate_fn=collate_bags)
    stack, *_ = next(iter(batch))
    assert not stack.values.requires_grad


def test_a_folder_of_clams_names_the_folder_within(tmp_path):
    (tmp_path / "h5_files").mkdir()
    torch.save(torch.zeros(1, 2), tmp_path / "h5_files" / "a.pt")
    with pytest.raises(FeatureFileError, match=r"got none .*HINT: it is in h5_files there: --features_dir .*h5_files"):
        find_features(tmp_path, "a")


def test_an_object_in_a_pt_is_named(tmp_path):
    torch.save({"features": torch.zeros(1, 2), "label": np.float64(1.0)}, tmp_path / "a.pt")
    with pytest.raises(FeatureFileError, match=r"got an object of numpy\S+ \(.*HINT: save them as a tensor"):
        read_features(tmp_path / "a.pt")
