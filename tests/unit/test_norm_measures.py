"""What is measured of norms on unusual slides, plans and encoders: one tile, nothing that moves, part of the norms."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_wsi.bags.bag import BagPart, FailureLog, read_bags
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.evaluation import norm_choice
from ds_wsi.evaluation.norm_choice import NormPlan, Ranks, choose_norms, norm_gap
from ds_wsi.evaluation.predict import NormVariant, encode_slides, predict_slides
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.norms import NormPolicy, batch_norms
from ds_wsi.norms.policy import CANDIDATES
from ds_wsi.norms.population import OneValueError
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training.norm_plan import bags_of_population, measures_norms, norm_plan

TILE_PX = 32


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX))


def make_model(last=nn.BatchNorm1d) -> SlideModel:
    """A model whose last norm has one value per channel for each tile."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(6, 5), last(5), nn.ReLU()),
    )
    model = SlideModel(encoder, build_aggregator("gated_abmil", 5, 2, dropout=0.0)).double().eval()
    for norm in batch_norms(encoder):
        if norm.running_mean is not None:
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model


def work(cohort, chunk=7):
    slides, grids = cohort.manifest.slides, cohort.grids
    return slides, grids, ReadPolicy(0, chunk_tiles=chunk), FailureLog(slides, grids, 0.0)


def parts(cohort):
    return tuple(BagPart(row, 0, cohort.lengths[row]) for row in cohort.rows("train"))


def with_one_tile(cohort, row):
    """The cohort, in which this slide has one tile."""
    grids = list(cohort.grids)
    grids[row] = replace(grids[row], coords=grids[row].coords[:1])
    return replace(cohort, grids=tuple(grids))


def test_a_slide_of_one_tile_leaves_out_the_evaluation_that_cannot_take_it(cohort, caplog):
    """A norm of one value has no variance: each slide's own statistics are out, the others are measured and said."""
    row = cohort.rows("validation")[0]
    one = with_one_tile(cohort, row)
    plan = NormPlan("bag", CANDIDATES, rows=one.rows("validation"), recalibration=parts(one), gap=parts(one))
    choice = choose_norms(make_model(), *work(one), plan)
    assert set(choice.metrics) == {"running", "recalibrated"}
    assert choice.evaluation in choice.metrics
    assert choice.gap is not None
    name = one.manifest.slides[row].slide_id
    assert "norm_evaluation bag is left out, the others are measured" in caplog.text
    assert f"got 1 tile of {name}" in caplog.text
    assert set(choose_norms(make_model(), *work(cohort), plan).metrics) == set(CANDIDATES), "where each has several"


def test_an_evaluation_without_an_alternative_names_the_slide(cohort):
    row = cohort.rows("validation")[0]
    one, model = with_one_tile(cohort, row), make_model().set_norms(evaluation="bag")
    words = rf"got 1 tile of {one.manifest.slides[row].slide_id} \(norm_evaluation bag\)\. HINT: .*\"running\""
    with pytest.raises(ValueError, match=words):
        choose_norms(model, *work(one), NormPlan("bag", ("bag",), rows=(row,)))
    slides, grids, policy, failures = work(one)
    for stream in (predict_slides, encode_slides):
        with pytest.raises(OneValueError, match=words):
            list(stream(model, slides, grids, [row], policy, failures))
        assert len(list(stream(model.set_norms(evaluation="running"), slides, grids, [row], policy, failures))) == 1
        model.set_norms(evaluation="bag")


def test_a_test_slide_of_one_tile_is_known_before_its_turn(cohort):
    """Measured on no metric: the exported model must be able to take it."""
    row = cohort.rows("test")[0]
    one = with_one_tile(cohort, row)
    plan = NormPlan("bag", CANDIDATES, rows=one.rows("validation"), recalibration=parts(one))
    probed, without = (choose_norms(make_model(), *work(one), replace(plan, probes=rows)) for rows in ((row,), ()))
    assert set(without.metrics) - set(probed.metrics) == {"bag"}
    assert probed.metrics["running"] == without.metrics["running"]


def test_ranks_leave_out_what_one_of_them_cannot_take(cohort):
    """This rank has slides of many tiles; another one's answer holds the refusal."""
    plan = NormPlan("bag", ("running", "bag"), rows=cohort.rows("validation"))
    row = plan.rows[0]
    error = OneValueError("got 1 tile of theirs")

    def gather(answers):
        if not isinstance(answers[0], tuple):
            return answers
        return [(answers[0][0], error), *answers[1:]]

    ranks = Ranks(lambda costs: range(len(costs)), gather)
    assert set(choose_norms(make_model(), *work(cohort), plan, ranks).metrics) == {"running"}
    assert row in plan.rows


def test_a_training_slide_of_one_tile_is_no_part_of_the_gap(cohort):
    train = cohort.rows("train")
    one = with_one_tile(cohort, train[0])
    given = [NormPlan("bag", gap=parts(one)), NormVariant("running")]
    gap = norm_gap(make_model(), *work(one), *given)
    others = replace(given[0], gap=parts(one)[1:])
    assert gap == pytest.approx(norm_gap(make_model(), *work(one), others, given[1]))
    assert norm_gap(make_model(), *work(one), replace(given[0], gap=parts(one)[:1]), given[1]) is None


@pytest.mark.parametrize("exported", ["bag", "running"])
def test_norms_that_did_not_move_were_trained_with_running_statistics(cohort, exported):
    """Trained frozen and evaluated by bag is another model: the gap says so; as running there is none."""
    plan = NormPlan("frozen", (exported,), gap=parts(cohort))
    gap = choose_norms(make_model(), *work(cohort), plan).gap
    slides = cohort.manifest.slides
    plain, losses = make_model().set_norms(evaluation="running").eval(), []
    for bag in read_bags(slides, cohort.grids, plan.gap, ReadPolicy(0), work(cohort)[3]):
        logits = plain.aggregate(norm_choice.stack_bags([plain.encode(bag.tiles).detach()])).logits
        losses.append(nn.functional.cross_entropy(logits, torch.tensor([slides[bag.slide].class_index])).item())
    assert gap.trained == pytest.approx(sum(losses) / len(losses))
    assert (gap.exported == pytest.approx(gap.trained, rel=1e-9)) == (exported == "running")


def test_while_the_encoder_rests_its_norms_are_trained_with_running_statistics():
    plan = NormPlan("step", resting_epochs=2)
    assert [plan.of_epoch(epoch).training for epoch in (1, 2, 3)] == ["frozen", "frozen", "step"]


def test_populations_of_the_gap_are_as_large_as_those_of_training(cohort, monkeypatch):
    """Five slides at two a step are two populations: one of a single slide was never trained."""
    rows = [*cohort.rows("train"), *cohort.rows("validation")][:5]
    plan = NormPlan("step", gap=tuple(BagPart(row, 0, 8) for row in rows), bags_per_population=2)
    sizes, together = [], norm_choice.TileEncoder.together

    def counted(encode, bags):
        sizes.append(len(bags))
        return together(encode, bags)

    monkeypatch.setattr(norm_choice.TileEncoder, "together", counted)
    for bags, expected in ((2, [2, 2]), (5, [5]), (8, [5])):
        sizes.clear()
        gap = norm_gap(make_model(), *work(cohort), replace(plan, bags_per_population=bags), NormVariant("running"))
        assert sizes == expected
        whole = replace(plan, gap=plan.gap[: sum(expected)], bags_per_population=bags)
        assert gap == norm_gap(make_model(), *work(cohort), whole, NormVariant("running"))


@pytest.mark.parametrize(
    ("layout", "stack"),
    [(StepLayout(1, 1, 8), 1), (StepLayout(2, 3, 4), 3), (StepLayout(2, 1, 2, StackingPolicy(bags_per_step=12)), 3)],
)
def test_a_stack_is_of_one_micro_step_and_a_step_of_all(layout, stack):
    sizes = [bags_of_population(training, layout) for training in ("bag", "stack", "step", "frozen")]
    assert sizes == [1, stack, layout.bags_per_step, 1]


def planned(cohort, training, evaluation="auto", bags=1, freeze_epochs=0):
    """The plan of a run, of which the plan asks this much."""
    settings = SimpleNamespace(
        policies=SimpleNamespace(norm=NormPolicy(evaluation=evaluation)),
        run=SimpleNamespace(metric_for_best_model="auc"),
        model=SimpleNamespace(freeze_encoder_epochs=freeze_epochs),
    )
    run = SimpleNamespace(
        config=SimpleNamespace(norm_training=training),
        task=None,
        best_metric="eval_auc",
        settings=settings,
        seed=0,
        reading=ReadPolicy(0),
        module=make_model(),
        cohort=cohort,
        step_layout=StepLayout(bags_per_group=bags),
    )
    return norm_plan(run), measures_norms(run)


def test_what_can_differ_from_what_was_trained_is_measured(cohort):
    for training, evaluation, measured in (
        *(("frozen", "auto", False), ("frozen", "running", False), ("frozen", "bag", True)),
        *(("frozen", "recalibrated", True), ("step", "running", True), ("bag", "auto", True)),
    ):
        plan, measures = planned(cohort, training, evaluation)
        assert (measures, bool(plan.gap)) == (measured, measured), (training, evaluation)


def test_a_plan_has_whole_populations_and_the_epochs_of_rest(cohort):
    many = replace(cohort, manifest=replace(cohort.manifest, slides=cohort.manifest.slides * 8), grids=cohort.grids * 8)
    for bags, slides in ((1, 8), (3, 9), (6, 12), (8, 8)):
        plan, _ = planned(many, "step", bags=bags, freeze_epochs=2)
        assert (len(plan.gap), plan.bags_per_population, plan.resting_epochs) == (slides, bags, 2)
    one = with_one_tile(cohort, cohort.rows("test")[0])
    assert planned(one, "step")[0].probes == cohort.rows("test")[:1]
    assert planned(cohort, "step")[0].probes == ()
