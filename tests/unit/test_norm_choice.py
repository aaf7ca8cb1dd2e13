"""How the norms of trained weights are evaluated: measured and chosen."""

import math
from dataclasses import replace

import pytest
import torch
from norm_models import ALL, TILE_PX, make_model, tiles_of, work
from torch import nn

from ds_wsi.bags.bag import BagPart
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.engines.policies.norms import decide_training
from ds_wsi.evaluation import populations, predict
from ds_wsi.evaluation.norm_choice import NormGap, NormPlan, best_candidate, candidates_of, choose_norms
from ds_wsi.evaluation.predict import NormVariant, encode_slides, predict_variants
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.norms import NormPolicy, batch_norms
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking import stack_bags


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX))


@pytest.mark.parametrize("memory", ["one chunk", "chunks", "read again"])
def test_a_slides_own_statistics_are_over_all_its_tiles(cohort, memory, monkeypatch):
    """Against the plain encoder in training mode; whether the tiles fit, are held, or are read for each norm."""
    free = {"one chunk": 2**40, "chunks": 1, "read again": 1}[memory]
    monkeypatch.setattr(populations, "free_bytes", lambda device: free)
    if memory == "read again":
        monkeypatch.setattr(populations, "free_host_bytes", lambda: 4 * 7 * 3 * TILE_PX**2)
    model = make_model().set_norms(evaluation="bag")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    slides, grids, policy, failures = work(cohort)
    for row, features, kept in encode_slides(model, slides, grids, [0, 3], policy, failures):
        plain = make_model().encoder.train()
        expected = plain(model.normalise(tiles_of(cohort, row)))
        torch.testing.assert_close(features, expected.detach(), rtol=0, atol=1e-10)
        assert len(kept) == len(expected) > 7
        in_one_call = model(stack_bags([tiles_of(cohort, row)])).logits
        torch.testing.assert_close(model.aggregate(stack_bags([features])).logits, in_one_call)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_norms_without_running_statistics_never_have_a_chunks(cohort):
    """They have nothing but what they are given: a chunk's would make a prediction depend on how tiles are read."""
    encoded = []
    for chunk in (5, 1000):
        model = make_model()
        model.encoder[1] = nn.BatchNorm2d(6, track_running_stats=False).double()
        slides, grids, policy, failures = work(cohort, chunk)
        encoded += [features for _, features, _ in encode_slides(model.eval(), slides, grids, [0], policy, failures)]
    torch.testing.assert_close(*encoded)


def test_variants_are_predicted_from_one_reading(cohort, monkeypatch):
    reads, read = [], predict.read_chunks

    def counted(slides, grids, order, policy):
        reads.append(list(order))
        return read(slides, grids, order, policy)

    monkeypatch.setattr(predict, "read_chunks", counted)
    model = make_model()
    taken = {
        name: torch.rand_like(value) + 0.5 for name, value in model.encoder.state_dict().items() if "running" in name
    }
    variants = [NormVariant("running"), NormVariant("recalibrated", taken), NormVariant("bag")]
    slides, grids, policy, failures = work(cohort)
    (predictions,) = predict_variants(model, slides, grids, [1], policy, failures, variants)
    assert reads == [[1]]
    tiles = tiles_of(cohort, 1)
    for prediction, name in zip(predictions, ("running", "recalibrated", "bag"), strict=True):
        plain = make_model().set_norms(evaluation=name)
        if name == "recalibrated":
            plain.encoder.load_state_dict(plain.encoder.state_dict() | taken)
        torch.testing.assert_close(prediction.logits, plain(stack_bags([tiles])).logits[0], msg=name)
    assert not torch.allclose(predictions[0].logits, predictions[2].logits)


def parts(cohort):
    return tuple(BagPart(row, 0, cohort.lengths[row]) for row in cohort.rows("train"))


def test_statistics_taken_anew_are_those_of_one_call_on_all_training_tiles(cohort):
    model = make_model()
    plan = NormPlan("bag", ("recalibrated",), rows=(), recalibration=parts(cohort))
    choice = choose_norms(model, *work(cohort), plan)
    plain = make_model()
    for norm in batch_norms(plain.encoder):
        norm.momentum = 1.0
    plain.encoder.train()(model.normalise(torch.cat([tiles_of(cohort, part.slide) for part in plan.recalibration])))
    assert choice.evaluation == "recalibrated"
    for name, value in choice.statistics.items():
        torch.testing.assert_close(value, plain.encoder.state_dict()[name], rtol=1e-10, atol=1e-10)
    assert torch.equal(model.encoder[1].running_mean, make_model().encoder[1].running_mean), "the model keeps its own"


def test_the_best_candidate_is_exported_and_the_gap_is_of_it(cohort):
    """Norms trained by bag: with other statistics the same weights lose what they learned."""
    model = make_model()
    rows = cohort.rows("train")
    for index, row in enumerate(rows):
        cohort.manifest.slides[row]
        assert cohort.manifest.slides[row].label == index % 2
    plan = NormPlan("bag", ALL, "auc", rows, "train", parts(cohort), parts(cohort), 1)
    choice = choose_norms(model, *work(cohort), plan)
    assert set(choice.metrics) == set(ALL)
    best = best_candidate(choice.metrics, "auc", ALL)
    assert choice.evaluation == best
    assert (choice.statistics is None) == (best != "recalibrated")
    entry = choice.entry()
    assert entry["norm_evaluation"] == best
    assert {"norm_running_loss", "norm_bag_auc", "norm_trained_loss", "norm_exported_loss"} <= set(entry)
    bag = choice.metrics["bag"]["eval_loss"]
    assert choice.gap.trained == pytest.approx(bag), "the population of training is each bag"
    assert choice.gap.exported == pytest.approx(choice.metrics[best]["eval_loss"])
    step = choose_norms(model, *work(cohort), replace(plan, training="step", bags_per_population=3))
    assert step.gap.trained != pytest.approx(bag, rel=1e-6), "three bags and the last one as one population"
    assert (model.training, model.norm_evaluation) == (False, "running")


def test_ties_are_decided_by_the_loss_and_then_by_the_order():
    metrics = {"running": {"eval_auc": 0.9, "eval_loss": 2.0}, "bag": {"eval_auc": 0.9, "eval_loss": 0.1}}
    assert best_candidate(metrics, "auc", ("running", "bag")) == "bag"
    metrics["bag"]["eval_loss"] = 2.0
    assert best_candidate(metrics, "auc", ("running", "bag")) == "running"
    assert best_candidate({}, "auc", ALL) == "running"
    assert best_candidate({"running": {"eval_loss": math.nan}, "bag": {"eval_loss": 9.0}}, "auc", ALL) == "bag"


def test_a_gap_is_wide_beyond_both_bounds():
    for trained, exported, wide in (
        *((1.0, 1.09, False), (1.0, 1.2, True), (0.001, 0.04, False), (0.001, 0.06, True)),
        *((0.5, 0.1, False), (0.5, math.nan, True), (0.5, math.inf, True)),
    ):
        assert NormGap(trained, exported).is_wide == wide, (trained, exported)


@pytest.mark.parametrize(
    ("evaluation", "training", "has_norms", "expected"),
    [
        ("auto", "bag", True, ALL),
        ("auto", "frozen", True, ("running",)),
        ("auto", "step", False, ("running",)),
        ("bag", "step", True, ("bag",)),
    ],
)
def test_what_is_measured(evaluation, training, has_norms, expected):
    assert candidates_of(evaluation, training, has_norms=has_norms) == expected


def test_what_training_averages_over_follows_from_the_weights(caplog):
    fresh = SlideModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), build_aggregator("mean", 4, 2))
    loaded = make_model().train()
    assert decide_training(NormPolicy(), "stack", fresh) == "step"
    assert decide_training(NormPolicy(), "stack", loaded) == "frozen"
    assert decide_training(NormPolicy(), "bag", loaded) == "bag", "as the partition has it"
    plain = SlideModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)), build_aggregator("mean", 4, 2))
    assert decide_training(NormPolicy(training="step"), "stack", plain) == "bag", "no BatchNorm"
    with pytest.raises(ValueError, match=r'partition.bn_population must not be "bag" where norm.training is "step"'):
        decide_training(NormPolicy(training="step"), "bag", fresh)
    with pytest.raises(ValueError, match=r'norm.affine must be true where norm.training is "step"'):
        decide_training(NormPolicy(affine=False), "stack", fresh)
    assert decide_training(NormPolicy(training="frozen"), "stack", fresh) == "frozen"
    assert "statistics were never taken" in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    stateless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    without = SlideModel(stateless, build_aggregator("mean", 4, 2))
    assert decide_training(NormPolicy(), "stack", without) == "step", "there is nothing to freeze"
    assert "it has no running statistics" in caplog.text
    assert decide_training(NormPolicy(training="frozen"), "stack", without) == "frozen"
    assert "it averages over each bag still. HINT: --norm_training step" in caplog.text
    assert "loaded" not in caplog.text
    assert "never taken" not in caplog.text
    fresh.encoder.requires_grad_(False)
    assert decide_training(NormPolicy(), "stack", fresh.train()) == "frozen", "with the encoder"


@pytest.mark.parametrize("wrong", [{"training": "batch"}, {"evaluation": "x"}, {"recalibration_tiles": -1}])
def test_words_that_name_no_population_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"norm\.{next(iter(wrong))} must be"):
        NormPolicy(**wrong)


def test_frozen_norms_keep_their_statistics_and_train_their_weights(cohort):
    for affine in (True, False):
        from ds_wsi.engines.policies.norms import apply_training

        model = make_model().train()
        apply_training("frozen", NormPolicy(affine=affine), model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(stack_bags([tiles_of(cohort, 0), tiles_of(cohort, 1)])).logits.logsumexp(1).sum().backward()
        norm = model.encoder[1]
        assert (norm.weight.grad is not None) == affine
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        plain = make_model()  # in evaluation mode: what is trained is what is exported
        torch.testing.assert_close(
            model(stack_bags([tiles_of(cohort, 0)])).logits, plain(stack_bags([tiles_of(cohort, 0)])).logits
        )


def test_a_stack_is_one_population_and_bags_are_not(cohort):
    stack = stack_bags([tiles_of(cohort, row) for row in (0, 1)])
    features = {}
    for training in ("bag", "stack", "step"):
        model = make_model().train().set_norms(training)
        features[training] = model._encode_stack(stack)
        plain = make_model().encoder.train()
        bags = [model.normalise(bag) for bag in stack.split()]
        expected = torch.cat([plain(bag) for bag in bags]) if training == "bag" else plain(torch.cat(bags))
        torch.testing.assert_close(features[training], expected, msg=training)
    assert not torch.allclose(features["bag"], features["stack"])
