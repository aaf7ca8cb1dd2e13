"""What is kept is known by what it was made of: features and packed tiles."""

import csv
import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_wsi.bags.features import read_features
from ds_wsi.cli import main
from ds_wsi.runtime.tensor_seal import OF_HEAD, OF_TENSORS
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.tile_store import StoredSlide

CHECKSUMS = (OF_HEAD, OF_TENSORS)  # earlier versions wrote none


def picture(seed, left=0):
    image = np.full((256, 256, 3), 243, dtype=np.uint8)
    noise = np.random.default_rng(seed).integers(-8, 8, (224, 128, 1))
    image[32:, left : left + 128] = np.array([200, 110, 160]) + noise
    return image


@pytest.fixture
def cohort(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        write_pyramid(tmp_path / f"{name}.tiff", picture(seed), mpp=0.5)
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", "path", "label"), ("one", "one.tiff", "a"), ("two", "two.tiff", "b")])
    return tmp_path


def features(folder, *more, output="f"):
    options = ("--manifest", str(folder / "m.csv"), "--tile_size_px", "64", "--output_dir", str(folder / output))
    return main(["features", "--encoder", "resnet10t", "--device", "cpu", *options, *more])


def tile(folder, *more):
    options = ("--manifest", str(folder / "m.csv"), "--tile_size_px", "64", "--output_dir", str(folder / "t"))
    return main(["tile", *options, "--store", str(folder / "store"), *more])


def replace_slide(folder, name="one"):
    (folder / f"{name}.tiff").unlink()
    write_pyramid(folder / f"{name}.tiff", picture(9, left=96), mpp=0.5)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_features_are_kept_for_the_same_bytes_and_refused_for_another_slide(cohort, capsys):
    assert features(cohort) == 0
    before = contents(cohort / "f")
    copied = (cohort / "one.tiff").read_bytes()
    (cohort / "one.tiff").unlink()
    (cohort / "one.tiff").write_bytes(copied)
    os.utime(cohort / "two.tiff", (1, 1))
    assert features(cohort) == 0
    assert contents(cohort / "f") == before
    assert capsys.readouterr().out.count("\tkept\t") == 2
    replace_slide(cohort)
    assert features(cohort) == 2
    assert re.search(r"got 1 other file[\s\S]*one\.safetensors[\s\S]*HINT", capsys.readouterr().err)
    assert contents(cohort / "f") == before


def test_features_of_a_tile_store_and_of_the_slides_are_not_mixed(cohort, capsys):
    assert tile(cohort, "--jpeg_quality", "80") == 0
    assert features(cohort, "--tile_store", str(cohort / "store")) == 0
    assert features(cohort, "--tile_store", str(cohort / "store")) == 0
    assert features(cohort) == 2
    assert "pixels must be of the slide, got of a tile store, JPEG quality 80" in capsys.readouterr().err


def without(path, *keys):
    """Write a file as an earlier version wrote it."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    left_out = (*keys, *CHECKSUMS)
    save_file(tensors, path, {name: value for name, value in metadata.items() if name not in left_out})


def test_features_of_an_earlier_version_are_kept_with_one_line_but_not_another_encoders(cohort, capsys):
    assert features(cohort) == 0
    for name in ("one", "two"):
        without(cohort / "f" / f"{name}.safetensors", "slide", "pixels")
    before = contents(cohort / "f")
    capsys.readouterr()
    assert features(cohort) == 0
    printed = capsys.readouterr()
    assert printed.err.count("recorded no fingerprint") == 1
    assert "2 of the features files" in printed.err
    assert features(cohort, "--tile_size_px", "32") == 2
    without(cohort / "f" / "one.safetensors", "slide")  # of one new key alone: no version wrote that
    without(cohort / "f" / "two.safetensors", "tiles")
    assert features(cohort) == 2
    assert contents(cohort / "f").keys() == before.keys()


def test_features_of_the_tissue_rule_by_its_earlier_name_are_kept(cohort, capsys):
    assert features(cohort, "--tissue", "otsu") == 0
    for name in ("one", "two"):
        path = cohort / "f" / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tiles, _, policy = metadata["tiles"].partition(", {")
        then = {
            key: value for key, value in json.loads("{" + policy).items() if not key.startswith(("tissue", "shrink"))
        }
        metadata["tiles"] = f"{tiles}, {json.dumps(then | {'use_saturation': True}, sort_keys=True)}"
        save_file(tensors, path, {name: value for name, value in metadata.items() if name not in CHECKSUMS})
    before = contents(cohort / "f")
    assert features(cohort, "--tissue", "otsu") == 0
    assert contents(cohort / "f") == before
    assert features(cohort, "--tissue", "grey") == 2
    capsys.readouterr()
    assert features(cohort, "--tissue", "otsu", "--shrink", "dct") == 2  # of box tiles they are
    printed = capsys.readouterr().err
    assert '"shrink": "dct"' in printed
    assert '"shrink": "box"' in printed


@pytest.mark.parametrize("content", [b"", b"theirs", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".h5"])
def test_a_users_file_of_a_slides_name_is_not_written_over(cohort, suffix, content):
    (cohort / "f").mkdir()
    path = cohort / "f" / f"one{suffix}"
    path.write_bytes(content)
    assert features(cohort) == 2
    assert contents(cohort / "f") == {path.name: content}


def test_torn_features_of_ours_are_written_anew(cohort):
    assert features(cohort) == 0
    path = cohort / "f" / "one.safetensors"
    before = read_features(path)
    path.write_bytes(path.read_bytes()[:-7])
    assert features(cohort) == 0
    assert all(torch.equal(*pair) for pair in zip(before, read_features(path), strict=True))


def test_a_packed_slide_is_known_by_its_content(cohort, capsys):
    assert tile(cohort) == 0
    before = contents(cohort / "store")
    os.utime(cohort / "one.tiff", (1, 1))
    assert tile(cohort) == 0
    assert contents(cohort / "store") == before
    # another picture of the same grid and size in bytes: only the content tells
    data = bytearray((cohort / "two.tiff").read_bytes())
    with StoredSlide(cohort / "store" / "two.arrow") as stored:
        header = dict(stored.header)
    data += b"\0"
    (cohort / "two.tiff").write_bytes(data)
    capsys.readouterr()
    assert tile(cohort) == 0
    assert "1 slides packed now" in capsys.readouterr().out
    with StoredSlide(cohort / "store" / "two.arrow") as stored:
        assert stored.header["slide_sha256"] != header["slide_sha256"]
    assert (cohort / "store" / "one.arrow").read_bytes() == before["one.arrow"]


def test_a_store_of_an_earlier_version_is_kept_with_one_line(cohort, monkeypatch, capsys):
    from ds_wsi.slides import tile_store

    with monkeypatch.context() as patch:
        header = tile_store._header
        patch.setattr(
            tile_store, "_header", lambda *a: {k: v for k, v in header(*a).items() if k != tile_store.FINGERPRINT}
        )
        assert tile(cohort) == 0
    before = contents(cohort / "store")
    capsys.readouterr()
    assert tile(cohort) == 0
    assert contents(cohort / "store") == before
    assert capsys.readouterr().err.count("2 of 2 packed slides are of an earlier version") == 1


@pytest.mark.parametrize("content", [b"", b"ARROW1 of another program", json.dumps({"a": 1}).encode()])
def test_a_users_arrow_file_is_not_packed_over(cohort, content, capsys):
    (cohort / "store").mkdir()
    (cohort / "store" / "one.arrow").write_bytes(content)
    (cohort / "store" / ".one.two.tmp.arrow").write_bytes(b"theirs")
    assert tile(cohort) == 2
    assert "without files of other programs" in capsys.readouterr().err
    assert (cohort / "store" / "one.arrow").read_bytes() == content
    assert (cohort / "store" / ".one.two.tmp.arrow").read_bytes() == b"theirs"
