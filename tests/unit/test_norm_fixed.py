"""Norms that stay in evaluation mode while others train are no part of what is averaged over, in evaluation either."""

import json

import pytest
import torch
from torch import nn

from ds_wsi.bags.bag import BagPart, FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.evaluation.norm_choice import NormPlan, choose_norms
from ds_wsi.evaluation.predict import predict_slides
from ds_wsi.models import ModelConfig, SlideModel, build_aggregator, build_model, load_model, save_model
from ds_wsi.models.freezing import freeze_until
from ds_wsi.norms import batch_norms, named_batch_norms
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags

TILE_PX = 32


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX))


class Encoder(nn.Sequential):
    """An encoder whose first norm is fixed: by `freeze_until`, by a train() of its own, or by whoever built it."""

    def __init__(self, fixed_by="nothing"):
        super().__init__(
            *(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.fixed_by = fixed_by
        if fixed_by == "freeze_until":
            freeze_until(self, "3")

    def train(self, mode=True):
        super().train(mode)
        if self.fixed_by == "train":
            self[1].eval()
        return self


WAYS = ("freeze_until", "train", "config")


def make_model(fixed_by) -> SlideModel:
    torch.manual_seed(0)
    model = SlideModel(Encoder(fixed_by), build_aggregator("gated_abmil", 5, 2, dropout=0.0)).double()
    for norm in batch_norms(model.encoder):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    model.set_norms("bag", fixed=["1"] if fixed_by == "config" else None)
    return model.train()


def work(cohort):
    slides, grids = cohort.manifest.slides, cohort.grids
    return slides, grids, ReadPolicy(0, chunk_tiles=7), FailureLog(slides, grids, 0.0)


def tiles_of(cohort, row):
    slides, grids, policy, failures = work(cohort)
    return next(read_bags(slides, grids, [row], policy, failures)).tiles


def trained_logits(cohort, row, fixed_by):
    """Logits of a plain copy in training mode, with the first norm in evaluation mode."""
    plain = make_model("nothing")
    if fixed_by != "nothing":
        plain.encoder[1].eval()
    with torch.no_grad():
        return plain(stack_bags([tiles_of(cohort, row)])).logits[0]


@pytest.mark.parametrize("fixed_by", [*WAYS, "nothing"])
def test_a_slides_own_statistics_are_taken_by_the_norms_that_trained(cohort, fixed_by):
    model = make_model(fixed_by).set_norms(evaluation="bag").eval()
    assert model.fixed_norms == (() if fixed_by == "nothing" else ("1",))
    row = cohort.rows("train")[0]
    (prediction,) = predict_slides(model, *work(cohort)[:2], [row], *work(cohort)[2:])
    torch.testing.assert_close(prediction.logits, trained_logits(cohort, row, fixed_by))
    with torch.no_grad():
        in_one_call = model(stack_bags([tiles_of(cohort, row)])).logits[0]
    torch.testing.assert_close(in_one_call, trained_logits(cohort, row, fixed_by))


@pytest.mark.parametrize("fixed_by", WAYS)
def test_the_gap_is_of_the_norms_that_trained_and_others_keep_their_statistics(cohort, fixed_by):
    model, slides = make_model(fixed_by), cohort.manifest.slides
    parts = tuple(BagPart(row, 0, cohort.lengths[row]) for row in cohort.rows("train"))
    choice = choose_norms(model, *work(cohort), NormPlan("bag", ("recalibrated",), recalibration=parts, gap=parts))
    losses = [
        nn.functional.cross_entropy(
            trained_logits(cohort, part.slide, fixed_by), torch.tensor(slides[part.slide].class_index)
        ).item()
        for part in parts
    ]
    assert choice.gap.trained == pytest.approx(sum(losses) / len(losses))
    assert choice.gap.exported != pytest.approx(choice.gap.trained, rel=1e-4)
    assert sorted(choice.statistics) == ["4.running_mean", "4.running_var"]
    plain = make_model("nothing").encoder
    plain[1].eval()
    plain[4].momentum = 1.0
    plain(model.normalise(torch.cat([tiles_of(cohort, part.slide) for part in parts])))
    torch.testing.assert_close(choice.statistics["4.running_mean"], plain[4].running_mean)


def test_an_encoder_that_rests_says_nothing_of_its_norms():
    """While it rests all are in evaluation mode; by themselves they are not."""
    model = make_model("freeze_until")
    model.warming_up = True
    assert model.train().fixed_norms == ("1",)
    frozen = make_model("nothing")
    frozen.encoder.requires_grad_(False)
    assert frozen.train().fixed_norms == ()
    assert [norm.training for norm in frozen.set_norms(evaluation="bag").eval().population_norms] == [True, True]


def test_norms_that_train_again_average_again():
    model = make_model("freeze_until")
    model.encoder.frozen_parts = ()
    assert model.eval().fixed_norms == ("1",), "as it was trained"
    assert model.train().fixed_norms == ()


def config_of(**changes):
    tiling = {"tile_size_px": TILE_PX, "mpp": 0.5}
    return ModelConfig("resnet10t", "gated_abmil", ("normal", "tumor"), tiling, **changes)


def test_an_exported_model_says_which_norms_are_fixed(tmp_path):
    model = build_model(config_of())
    freeze_until(model.encoder, "layer2")
    fixed = model.train().fixed_norms
    assert 0 < len(fixed) < len(batch_norms(model.encoder))
    config = config_of(norm_evaluation="bag", fixed_norms=fixed)
    save_model(tmp_path, config, model.state_dict())
    loaded, read = load_model(tmp_path)
    assert (read, loaded.fixed_norms) == (config, fixed)
    for mode in (False, True, False):  # a call of train() loses nothing
        loaded.train(mode)
        in_training = {name for name, norm in named_batch_norms(loaded.encoder).items() if norm.training}
        assert in_training == set(named_batch_norms(loaded.encoder)) - set(fixed)


def test_a_model_of_the_version_before_is_evaluated_as_before(tmp_path):
    model = build_model(config_of())
    save_model(tmp_path, config_of(norm_evaluation="bag"), model.state_dict())
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("fixed_norms") == []
    (tmp_path / "config.json").write_text(json.dumps({**values, "version": 4}))
    loaded, config = load_model(tmp_path)
    assert config.fixed_norms == ()
    assert all(norm.training for norm in batch_norms(loaded.encoder))


def test_names_of_no_norm_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fixed norms must be BatchNorms of Encoder, got '0'"):
        make_model("nothing").set_norms(fixed=["0"])
    save_model(tmp_path, config_of(fixed_norms=("stem",)), build_model(config_of()).state_dict())
    with pytest.raises(ValueError, match=r"must describe a model.*got 'stem'"):
        load_model(tmp_path)


def test_a_transformers_folder_says_which_norms_are_fixed(tmp_path):
    from ds_wsi import SlideModelConfig, SlideModelForSlideClassification

    config = config_of(norm_evaluation="bag")
    model = build_model(config)
    freeze_until(model.encoder, "layer2")
    given = SlideModelForSlideClassification(SlideModelConfig.of(config), model).train()
    fixed = model.fixed_norms
    given.export_run(tmp_path / "run")
    assert load_model(tmp_path / "run")[0].fixed_norms == fixed
    given.save_pretrained(tmp_path / "hf")
    read = SlideModelForSlideClassification.from_pretrained(tmp_path / "hf")
    assert read.slide_model.fixed_norms == fixed
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    values["slide_model"].pop("fixed_norms")  # of an earlier version
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    assert SlideModelForSlideClassification.from_pretrained(tmp_path / "hf").slide_model.fixed_norms == ()


def test_norms_that_are_said_to_be_fixed_are_written_as_such_at_once(tmp_path):
    from ds_wsi import SlideModelConfig, SlideModelForSlideClassification

    config = config_of(norm_evaluation="bag")
    given = SlideModelForSlideClassification(SlideModelConfig.of(config), build_model(config)).eval()
    name = next(name for name, _ in given.slide_model.encoder.named_modules() if name.endswith("bn1"))
    given.slide_model.set_norms(fixed=[name])
    given.export_run(tmp_path / "run")
    assert load_model(tmp_path / "run")[0].fixed_norms == (name,)


def test_norms_of_an_aggregator_are_told_once_by_name(caplog):
    """No policy says what they average over; those of the encoder are the policy's."""
    aggregator = build_aggregator("gated_abmil", 5, 2)
    SlideModel(Encoder(), aggregator).train()
    assert "outside of the norm policy" not in caplog.text
    aggregator.extra = nn.BatchNorm1d(5)
    model = SlideModel(Encoder(), aggregator).eval()
    assert "outside of the norm policy" not in caplog.text, "it is a matter of training"
    model.train().train()
    assert caplog.text.count("BatchNorm in the aggregator GatedABMIL (extra) is outside of the norm policy") == 1


@pytest.mark.parametrize("memory", ["one chunk", "chunks"])
@pytest.mark.parametrize("mode", ["keep", "lean", "recompute", "paper"])
@pytest.mark.parametrize("part", ["encoder", "inner"])
def test_a_partitioned_encoder_is_evaluated_with_a_slides_own_statistics(cohort, memory, mode, part, monkeypatch):
    """The partition computes its norms itself: passes over them stop in the module's own calls."""
    if memory == "chunks":
        monkeypatch.setattr("ds_wsi.evaluation.populations.free_bytes", lambda _: 1)
    row, policy = cohort.rows("train")[0], PartitionPolicy(mode, bn_population="bag", chunk_size=3)
    model = make_model("nothing").set_norms(evaluation="bag")
    if part == "inner":
        model.encoder = nn.Sequential(model.encoder)
    handle = partition_layers(model.encoder if part == "encoder" else model.encoder[0], policy)
    model.eval()
    forward = model.encoder.__dict__.get("forward")
    (prediction,) = predict_slides(model, *work(cohort)[:2], [row], *work(cohort)[2:])
    torch.testing.assert_close(prediction.logits, trained_logits(cohort, row, "nothing"))
    assert model.encoder.__dict__.get("forward") is forward
    parts = (BagPart(row, 0, cohort.lengths[row]),)
    plan = NormPlan("bag", ("recalibrated",), recalibration=parts, gap=parts)
    choice, plain = choose_norms(model, *work(cohort), plan), choose_norms(make_model("nothing"), *work(cohort), plan)
    for one, other in zip(choice.statistics.values(), plain.statistics.values(), strict=True):
        torch.testing.assert_close(one, other)
    assert choice.gap == pytest.approx(plain.gap)
    handle.remove()


@pytest.mark.parametrize("last", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_an_encoder_whose_norm_has_one_value_a_tile_and_no_statistics_is_evaluated(cohort, last):
    """It refuses a single tile, by which a slide's size was judged."""
    torch.manual_seed(0)
    ends = [nn.Flatten(), last(6, track_running_stats=False)]
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2), nn.AdaptiveAvgPool2d(1)), *(ends if last is nn.BatchNorm1d else ends[::-1])
    )
    model = SlideModel(encoder, build_aggregator("gated_abmil", 6, 2, dropout=0.0)).double().eval()
    row = cohort.rows("train")[0]
    (prediction,) = predict_slides(model, *work(cohort)[:2], [row], *work(cohort)[2:])
    with torch.no_grad():
        torch.testing.assert_close(prediction.logits, model(stack_bags([tiles_of(cohort, row)])).logits[0])
