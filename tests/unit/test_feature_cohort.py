"""Cohorts of features: what is listed, what is read, what is refused, what a model of features takes."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from logs import logged
from safetensors.torch import save_file

from ds_wsi import SlideModel, build_aggregator, stack_bags
from ds_wsi.bags.bag import BagPart, FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.feature_cohort import features_digest, load_feature_cohort
from ds_wsi.bags.features import FeatureFileError, read_features, read_places
from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.cli import main
from ds_wsi.evaluation.extract import build_extractor, extract_features
from ds_wsi.evaluation.predict import SlidePrediction, predict_slides
from ds_wsi.evaluation.slide_maps import draw_heatmaps
from ds_wsi.models import ModelConfig, NoEncoder, build_encoder, build_model
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training.features import check_feature_settings
from ds_wsi.training.settings import DataSettings, ModelSettings, TrainSettings
from ds_wsi.training.step import idle_loss

WIDTH = 4


def features_of(number, length):
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(number))


def write_cohort(folder, lengths, columns="slide_id,label,split"):
    (folder / "features").mkdir()
    lines = [columns]
    for number, length in enumerate(lengths):
        save_file({"features": features_of(number, length)}, folder / "features" / f"s{number}.safetensors")
        lines.append(f"s{number},{'ab'[number % 2]},{'train' if number < 2 else 'test'}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv", folder / "features"


@pytest.fixture
def messages():
    with logged() as texts:
        yield texts


def test_every_problem_is_listed_at_once(tmp_path):
    manifest, features = write_cohort(tmp_path, [3, 2, 4, 1, 5, 6])
    (features / "s0.safetensors").unlink()
    torn = features / "s1.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    save_file({"features": torch.ones(2, WIDTH + 1)}, features / "s2.safetensors")
    save_file({"features": torch.full((2, WIDTH), torch.inf)}, features / "s3.safetensors")
    torch.save(torch.ones(2, WIDTH), features / "s4.pt")
    torch.save(torch.ones(2, WIDTH), features / "s6.pt")
    table = manifest.read_text()
    manifest.write_text(f"{table}\ns6,,test\ns7/x,a,test")
    with pytest.raises(ManifestError) as caught:
        load_feature_cohort(manifest, features, classes=("a", "b"))
    expected = (
        "label must be one of a, b, got '' (slide s6, row 8)",
        "slide_id must be non-empty and fit for a file name, got 's7/x'",
    )
    for words in expected:
        assert words in str(caught.value), words
    assert len(caught.value.problems) == len(expected), "no file is read before the table is right"
    manifest.write_text(f"{table}\ns6,a,test")
    with pytest.raises(ManifestError) as caught:
        load_feature_cohort(manifest, features, record_dir=tmp_path / "record", workers=2)
    expected = (
        "slide s0 must have one file of features, .h5, .pt, .safetensors, got none",
        f"({torn}). HINT: extract them again",
        "features must be finite, got 2 rows that are not, of 2",
        "slide s4 must have one file of features, .h5, .pt, .safetensors, got s4.pt, s4.safetensors",
        f"features must be of width {WIDTH}, those of 2 of 3 slides, got {WIDTH + 1} (slide s2",
    )
    for words in expected:
        assert words in str(caught.value), words
    assert len(caught.value.problems) == len(expected), str(caught.value)
    with pytest.raises(ManifestError, match=r"--features_dir must be a folder, got .*none"):
        load_feature_cohort(manifest, tmp_path / "none")


def test_heads_tell_lengths_and_the_width_is_the_models(tmp_path):
    manifest, features = write_cohort(tmp_path, [3, 2, 4])
    save_file({"features": torch.full((7, WIDTH), torch.nan)}, features / "s2.safetensors")
    cohort = load_feature_cohort(manifest, features, check="shapes")
    assert cohort.lengths == (3, 2, 7)
    assert cohort.in_dim == WIDTH
    with pytest.raises(ManifestError, match=r"(?s)has 3 problem.*width 9, the model's, got 4") as caught:
        load_feature_cohort(manifest, features, in_dim=9, check="shapes")
    assert len(caught.value.problems) == 3
    with pytest.raises(ValueError, match=r"--check_features must be one of full, shapes, got 'some'"):
        load_feature_cohort(manifest, features, check="some")


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    manifest, features = write_cohort(tmp_path, [3, 2, 4])
    read = []

    def counted(path):
        read.append(Path(path).stem)
        return read_features(path)

    monkeypatch.setattr("ds_wsi.bags.feature_cohort.read_features", counted)
    first = load_feature_cohort(manifest, features, record_dir=tmp_path)
    assert sorted(read) == ["s0", "s1", "s2"]
    again = load_feature_cohort(manifest, features, record_dir=tmp_path)
    assert len(read) == 3
    assert again.grids == first.grids
    save_file({"features": features_of(9, 2)}, features / "s1.safetensors")
    changed = load_feature_cohort(manifest, features, record_dir=tmp_path)
    assert read[3:] == ["s1"]
    assert features_digest(changed, [0]) == features_digest(first, [0])
    assert features_digest(changed, [0, 1]) != features_digest(first, [0, 1])


@pytest.mark.parametrize("workers", [0, 1])
def test_bags_hold_the_rows_asked_for(tmp_path, workers):
    cohort = load_feature_cohort(*write_cohort(tmp_path, [6, 2, 4]))
    order = [2, BagPart(0, 1, 4), BagPart(0, 0, 2, (1, 5)), BagPart(1, 1, 1), 1]
    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    arguments = (cohort.manifest.slides, cohort.grids, order, ReadPolicy(workers=workers), failures)
    bags = list(read_bags(*arguments, may_be_empty=True))
    first = features_of(0, 6)
    expected = [features_of(2, 4), first[1:4], first[[1, 5]], torch.empty(0, WIDTH), features_of(1, 2)]
    assert [bag.slide for bag in bags] == [2, 0, 0, 1, 1]
    assert all(torch.equal(bag.tiles, tiles) for bag, tiles in zip(bags, expected, strict=True))
    assert all(bag.tiles.untyped_storage().nbytes() == 4 * bag.tiles.numel() for bag in bags), "no more is handed over"
    assert [bag.kept.tolist() for bag in bags] == [[0, 1, 2, 3], [1, 2, 3], [1, 5], [], [0, 1]]


def test_a_file_that_changes_under_a_run_is_named(tmp_path):
    cohort = load_feature_cohort(*write_cohort(tmp_path, [6, 2, 4]))
    failures = FailureLog(cohort.manifest.slides, cohort.grids, 0.0)
    save_file({"features": torch.ones(5, WIDTH)}, cohort.grids[0].path)
    with pytest.raises(FeatureFileError, match=r"as they were at the start, \[6, 4\], got \[5, 4\]"):
        list(read_bags(cohort.manifest.slides, cohort.grids, [0], ReadPolicy(workers=0), failures))


def test_a_model_of_features_takes_features_of_its_width_alone():
    model = SlideModel(NoEncoder(WIDTH), build_aggregator("clam_sb", WIDTH, 2)).train()
    assert model.encoder_is_frozen
    for values, words in (
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"features \[N, 4\], got tiles \[2, 3, 8, 8\].*HINT"),
        (torch.zeros(2, 5), r"features \[N, 4\], got features \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=words):
            model(stack_bags([values]))
    with pytest.raises(ValueError, match=r"must be given tiles .*got \[2, 512\]\. HINT: model\.aggregate"):
        build_model(ModelConfig("resnet10t", "mean", ("a", "b"), TilingPolicy(tile_size_px=64)))(
            stack_bags([torch.zeros(2, 512)])
        )
    # A rank without a bag: a zero gradient for every parameter that is trained.
    idle_loss(model, torch.zeros(1, WIDTH)).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert model.training
    for encoder, in_dim in ((None, None), ("resnet18", 4)):
        with pytest.raises(ValueError, match=r"either an encoder or in_dim, got encoder"):
            ModelConfig(encoder, "mean", ("a", "b"), {}, in_dim=in_dim)
    with pytest.raises(ValueError, match=r"tiling must be given with an encoder, got \{\}\. HINT: TilingPolicy"):
        ModelConfig("resnet18", "mean", ("a", "b"))
    with pytest.raises(ValueError, match=r"classes must be two or more.*HINT: build_aggregator\(.*num_classes=1"):
        ModelConfig(None, "mean", ("a",), in_dim=4)


def test_options_of_tiles_are_refused_or_named(messages):
    data = DataSettings(manifest="m.csv", features_dir="f", slide_mpp=0.5)
    settings = TrainSettings(data, ModelSettings(encoder="resnet50", encoder_weights="w", freeze_encoder=True))
    with pytest.raises(ValueError, match=r"--encoder, --encoder_weights, --freeze_encoder must not be given with"):
        check_feature_settings(settings)
    settings = TrainSettings(data, ModelSettings(aggregator="transmil", dropout=0.5))
    policies = replace(settings.policies, reading=ReadPolicy(tile_store="store"))
    with pytest.raises(ValueError, match=r"^--tile_store must not be given with"):
        check_feature_settings(replace(settings, policies=policies))
    stacking = StackingPolicy(framework="sampling")  # is for features too
    policies = replace(settings.policies, augment=AugmentPolicy(colour=0.3), stacking=stacking)
    check_feature_settings(replace(settings, policies=policies))
    assert messages == ["augment, slide_mpp: without effect on features"]


def test_heat_maps_need_coordinates_and_a_slide_and_say_so_once(demo_manifest, tmp_path, messages):
    policy = TilingPolicy(tile_size_px=64)
    slides = load_cohort(demo_manifest, policy, need_splits=False)
    (tmp_path / "features").mkdir()
    for number, grid in enumerate(slides.grids):
        coords = {"coords": torch.from_numpy(grid.coords) + (10**6 if number == 1 else 0)} if number < 2 else {}
        path = tmp_path / "features" / f"{grid.slide_id}.safetensors"
        save_file({"features": torch.ones(len(grid), WIDTH), **coords}, path)
    cohort = load_feature_cohort(demo_manifest, tmp_path / "features", need_splits=False)
    messages.clear()
    predictions = [
        SlidePrediction(row, torch.zeros(2), torch.arange(float(length)), torch.arange(length))
        for row, length in enumerate(cohort.lengths[:4])
    ]
    drawn = draw_heatmaps(tmp_path, cohort, predictions)
    first = cohort.manifest.slides[0].slide_id
    assert drawn == [(first, tmp_path / f"{first}.png")]
    assert len(messages) == 2
    assert "no heat map of 1 slide " in messages[0]
    assert "coordinates do not lie on the slide" in messages[0]
    assert "no heat map of 2 slides" in messages[1]
    assert "no coordinates" in messages[1]
    some = predictions[0]._replace(attention=torch.ones(2), kept=torch.tensor([1, 3]))  # of --eval_tiles 2
    assert draw_heatmaps(tmp_path, cohort, [some]) == drawn
    broken = predictions[0]._replace(attention=predictions[0].attention * torch.nan)
    with pytest.raises(ValueError, match=r"attention must be finite"):
        draw_heatmaps(tmp_path, cohort, [broken])
    gone = [replace(slide, path=tmp_path) for slide in cohort.manifest.slides]
    cohort = replace(cohort, manifest=replace(cohort.manifest, slides=tuple(gone)))
    assert draw_heatmaps(tmp_path, cohort, predictions) == []
    assert "names no slide file that is there" in messages[2]


def test_extraction_goes_on_where_it_was_and_keeps_to_its_own_files(demo_manifest, tmp_path):
    tiling = TilingPolicy(tile_size_px=64)
    cohort = load_cohort(demo_manifest, tiling, need_splits=False)
    config = ModelConfig("resnet10t", "mean", ("a", "b"), {"tile_size_px": 64})
    model = build_model(config)
    policy, failures = ReadPolicy(workers=0, chunk_tiles=5), FailureLog(cohort.manifest.slides, cohort.grids, 0.0)

    def extract(model):
        stream = extract_features(model, config, cohort, tmp_path, policy, failures)
        return {slide.slide_id: slide.written for slide in stream}

    ids = [slide.slide_id for slide in cohort.manifest.slides]
    assert extract(model) == dict.fromkeys(ids, True)
    file = tmp_path / f"{ids[0]}.safetensors"
    places = read_places(file)
    assert places[0].tolist() == cohort.grids[0].coords.tolist()
    assert places[1] == cohort.grids[0].tile_size_level0_px
    (prediction,) = predict_slides(model, cohort.manifest.slides, cohort.grids, [0], policy, failures)
    with torch.no_grad():
        logits = model.eval().aggregate(stack_bags([read_features(file).features])).logits[0]
    assert torch.equal(prediction.logits, logits)
    before = {name: (tmp_path / f"{name}.safetensors").stat().st_mtime_ns for name in ids}
    (tmp_path / f"{ids[2]}.safetensors").unlink()
    assert extract(model) == {name: name == ids[2] for name in ids}
    after = {name: (tmp_path / f"{name}.safetensors").stat().st_mtime_ns for name in ids}
    assert [name for name in ids if before[name] != after[name]] == [ids[2]]
    file.write_bytes(file.read_bytes()[:-3])
    assert extract(model) == {name: name == ids[0] for name in ids}, "a torn file is written anew"
    torch.save(torch.ones(2, 2), tmp_path / f"{ids[3]}.pt")
    with pytest.raises(ValueError, match=r"got 1 other file:\n  1. features must be a file that `ds-wsi fe"):
        extract(model)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with pytest.raises(
        ValueError, match=r"(?s)got 9 other files.* 8 times: encoder must be resnet10t with weights \w{8}, got .*HINT"
    ):
        extract(model)
    # The same weights, whose features are wider.
    config = replace(config, encoder_features="flattened")
    with pytest.raises(ValueError, match=r"encoder must be resnet10t flattened with weights \w{8}, got resnet10t with"):
        extract(model)


def test_features_are_extracted_with_the_encoder_that_training_takes(tmp_path, messages):
    model, config = build_extractor("vit_tiny_patch16_224", TilingPolicy(tile_size_px=32), features="cls_mean")
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    assert model.encoder.num_features == 2 * 192
    assert "vit_tiny_patch16_224 has random weights" in messages[-1]
    timm_file = {"architecture": "resnet10t", "num_features": 512, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(timm_file))
    save_file(build_encoder("resnet10t").state_dict(), tmp_path / "model.safetensors")
    del messages[:]
    _, config = build_extractor(f"local-dir:{tmp_path}", TilingPolicy(tile_size_px=64))
    assert (config.encoder, config.mean) == ("resnet10t", (0.1, 0.2, 0.3))
    assert not messages, "its weights are there"


def test_a_commands_contradictions_are_refused(tmp_path, messages):
    ModelConfig(None, "mean", ("a", "b"), {}, in_dim=3).write(tmp_path / "config.json")
    save_file(SlideModel(NoEncoder(3), build_aggregator("mean", 3, 2)).state_dict(), tmp_path / "model.safetensors")
    common = ["--model", str(tmp_path), "--manifest", "m.csv", "--output_dir", str(tmp_path / "out")]
    for command, more, words in (
        ("features", [], "--model must have an encoder, got"),
        ("features", ["--tile_size_px", "3"], "--tile_size_px must be given with --encoder alone"),
        ("evaluate", [], "--features_dir must be given for a model of features, got none"),
    ):
        assert main([command, *common, *more]) == 2
        assert words in messages[-1]


@pytest.mark.parametrize("check", ["full", "shapes"])
@pytest.mark.parametrize("how", ["link", "hard link", "copy"])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "train")])
def test_one_file_under_two_ids_is_named_and_refused_across_splits(tmp_path, caplog, check, how, splits):
    folder = tmp_path / "features"
    folder.mkdir()
    for number, name in enumerate("ac"):
        save_file({"features": torch.randn(5, 4) + number}, folder / f"{name}.safetensors")
    copy = {"link": os.symlink, "hard link": os.link, "copy": shutil.copy}[how]
    copy(folder / "a.safetensors", folder / "b.safetensors")
    rows = [("slide_id", "label", "split"), ("a", "x", splits[0]), ("b", "y", splits[1]), ("c", "y", "test")]
    (tmp_path / "m.csv").write_text("\n".join(",".join(row) for row in rows))
    load = partial(load_feature_cohort, tmp_path / "m.csv", folder, check=check)
    if how == "copy" and check == "shapes":
        load()  # their content was not read
        return
    if splits[0] == splits[1]:
        load()
        assert "one file under several ids: a (train" in caplog.text
    else:
        with pytest.raises(ManifestError, match=r"one side of a split.* a \(train.* and b \(test.*HINT"):
            load()


def test_features_that_are_the_same_in_every_row_are_no_copies(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in "abc":
        save_file({"features": torch.ones(5, 4)}, folder / f"{name}.safetensors")
    (tmp_path / "m.csv").write_text("slide_id,label,split\na,x,train\nb,y,train\nc,y,test\n")
    assert load_feature_cohort(tmp_path / "m.csv", folder).lengths == (5, 5, 5)


def test_a_file_that_was_replaced_with_its_size_and_time_is_read_again(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in "ab":
        save_file({"features": torch.randn(5, 4)}, folder / f"{name}.safetensors")
    (tmp_path / "m.csv").write_text("slide_id,label,split\na,x,train\nb,y,test\n")
    load_feature_cohort(tmp_path / "m.csv", folder, record_dir=tmp_path / "record")
    path = folder / "a.safetensors"
    before = path.stat()
    save_file({"features": torch.full((5, 4), torch.nan)}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(ManifestError, match="must be finite"):
        load_feature_cohort(tmp_path / "m.csv", folder, record_dir=tmp_path / "record")
