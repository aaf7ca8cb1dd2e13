"""A bag of a patient is the concatenated features of its slides: a step equals a plain loop, in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from patient_cases import LABELS, TRAIN, bag_of, run_patient_steps, scales_of_bag, write_patients
from test_task_steps import plain_cox

from ds_wsi.models import ModelConfig, build_model
from ds_wsi.stacking import stack_bags
from harness import run_ranks

pytestmark = pytest.mark.distributed
CLASSES = {"task": "classification"}
COX = {"task": "survival", "time_column": "months", "event_column": "event", "loss": "cox"}
STACKED = {"slides": 2, "micro_steps": 2}
DEALT = {"stacking": {"bags_per_step": 4, "virtual_workers": 2}}
SHARED = {"slides": 2, "micro_steps": 2, "tile_parallel": {"size": 2}}
# Name, layout, task, reading: what one process takes, and what two do.
ONE = {
    "stacked": (STACKED, CLASSES, {}),
    "cox": ({"slides": 2, "micro_steps": 3}, COX, {}),
    "drawn": (STACKED, CLASSES, {"tiles_per_bag": 4}),
}
TWO = {
    **{"ragged": ({"micro_steps": 2}, CLASSES, {}), "dealt": (DEALT, CLASSES, {}), "shared": (SHARED, CLASSES, {})},
    "cox": ({"micro_steps": 3}, COX, {}),
    "shared_drawn": (SHARED, CLASSES, {"tiles_per_slide": 2, "tiles_per_bag": 3}),
}
SCALES = {"mpps": (0.5, 2.0)}
RATIO = {**SCALES, "scale_ratio": (2, 1)}
TWO_SCALES = {
    "scales": ({"micro_steps": 2}, CLASSES, {}, SCALES),
    "scales_shared": (SHARED, CLASSES, {"tiles_per_bag": 4}, RATIO),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    write_patients(folder)
    return folder


def follow_up(patient):
    number = int(patient[1:])
    return float(1 + number * 5 % 7 // 2), float(number != 3)


def plain_gradient(folder, task, step, rows_of, bag=bag_of):
    """The gradient of the step by one forward per patient and autograd."""
    n_outputs = 1 if task is COX else 2
    model = build_model(ModelConfig(None, "gated_abmil", ("x", "y"), {}, dropout=0.0, in_dim=5))
    if n_outputs == 1:
        model.aggregator = type(model.aggregator)(5, 1, dropout=0.0)
    model = model.double().train()
    model.load_state_dict(step["before"])
    logits = torch.cat([model(stack_bags([bag(folder, p, rows_of.get(p))])).logits for p in step["patients"]])
    if task is COX:
        loss, _ = plain_cox(logits[:, 0], [follow_up(p) for p in step["patients"]], [""] * len(logits), "efron")
    else:
        labels = torch.tensor(["xy".index(LABELS[p]) for p in step["patients"]])
        loss = sum(F.cross_entropy(z[None], label[None]) for z, label in zip(logits, labels, strict=True)) / len(labels)
    model.zero_grad()
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters()}


def furthest(step, expected):
    moved = {key: step["before"][key] - step["after"][key] for key in expected}
    return max((moved[key] - expected[key]).abs().max().item() for key in expected)


def first_slide_alone(folder, patient, rows):
    return bag_of(folder, f"{patient}_a", None) if rows is None else bag_of(folder, patient, rows)


def check(folder, task, reading, steps, of_other=()):
    seen = []
    for index, step in enumerate(steps):
        bags = [*step["bags"], *(bag for other in of_other for bag in other[index]["bags"])]
        rows_of = {}
        for patient, rows in bags:
            rows_of[patient] = tuple(sorted({*rows_of.get(patient, ()), *rows}))
        assert set(rows_of) == set(step["patients"])
        for patient, rows in rows_of.items():
            length = len(bag_of(folder, patient))
            per_slide = reading.get("tiles_per_slide", length)
            parts = [len(bag_of(folder, path.stem)) for path in sorted((folder / "features").glob(f"{patient}_*"))]
            n_taken = min(reading.get("tiles_per_bag", length), sum(min(part, per_slide) for part in parts))
            assert len(rows) == n_taken, "the same number in each layout, none twice"
        assert furthest(step, plain_gradient(folder, task, step, rows_of)) < 1e-12
        seen += step["patients"]
    assert sorted(seen) == sorted(TRAIN), "each patient once"
    wrong = plain_gradient(folder, task, steps[0], {}, first_slide_alone)
    assert reading or furthest(steps[0], wrong) > 1e-4, "a bag without the other slides must be noticed"


@pytest.mark.parametrize("name", ONE)
def test_a_step_of_patients_is_a_plain_loop(cohort, name):
    layout, task, reading = ONE[name]
    check(cohort, task, reading, run_patient_steps(str(cohort), f"one_{name}", layout, task, reading))


def check_scales(folder, steps, of_other=()):
    """An embedding that is zero changes no logits, and has a gradient."""
    for index, step in enumerate(steps):
        rows_of = {}
        for patient, rows in [*step["bags"], *(bag for other in of_other for bag in other[index]["bags"])]:
            rows_of[patient] = sorted({*rows_of.get(patient, ()), *rows})
        config = ModelConfig(None, "gated_abmil", ("x", "y"), {}, dropout=0.0, in_dim=5, mpps=(0.5, 2.0))
        model = build_model(replace(config, scale_embedding=True)).double().train()
        model.load_state_dict(step["before"])
        losses, without = [], build_model(config).double()
        without.load_state_dict({key: value for key, value in step["before"].items() if "scale" not in key})
        for patient in step["patients"]:
            features, scales = scales_of_bag(folder, patient)
            rows = rows_of[patient]
            shifted = features[rows] + model.scale_embedding.weight[scales[rows]]
            label = torch.tensor(["xy".index(LABELS[patient])])
            losses.append(F.cross_entropy(model.aggregator(stack_bags([shifted])).logits, label))
            if index == 0:
                assert losses[-1] == F.cross_entropy(without(stack_bags([features[rows]])).logits, label)
        (sum(losses) / len(losses)).backward()
        expected = {key: p.grad for key, p in model.named_parameters()}
        assert furthest(step, expected) < 1e-12
        assert (expected["scale_embedding.weight"].abs().sum(1) > 1e-6).all()


def test_two_magnifications_with_an_embedding_are_a_plain_loop(cohort):
    check_scales(cohort, run_patient_steps(str(cohort), "one_scales", STACKED, CLASSES, {}, SCALES))


def on_ranks(folder: str):
    cases = {**TWO, **TWO_SCALES}
    return [run_patient_steps(folder, f"two_{name}", *case) for name, case in cases.items()]


def test_two_ranks_are_one_process(cohort):
    results = run_ranks(on_ranks, 2, str(Path(cohort)))
    for index, case in enumerate([*TWO.values(), *TWO_SCALES.values()]):
        first, second = results[0][index], results[1][index]
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(a["after"][key], b["after"][key]) for key in a["after"])
        if len(case) == 4:
            check_scales(cohort, first, [second])
        else:
            check(cohort, *case[1:], first, [second])
