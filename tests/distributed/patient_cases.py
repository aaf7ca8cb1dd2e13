"""Steps of a run whose bags are patients, in float64, and the same steps by a plain loop over concatenated features."""

import csv
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from task_cases import SEED, WIDTH, settings_of

from ds_wsi.training import prepare
from ds_wsi.training.epoch_plan import planned_steps
from ds_wsi.training.one_step import train_step
from ds_wsi.training.step_reader import StepReader, read_parts

# Patients in the order of their first rows; rows of one are not side by side, nor in the order of their ids.
ROWS = ("p0:b", "p1:c", "p2:a", "p0:a", "p3:a", "p1:a", "p4:b", "p1:b", "p4:a", "p3:b", "p5:a", "p6:a", "p5:b", "p6:b")
PATIENTS = tuple(f"p{number}" for number in range(7))
TRAIN = PATIENTS[:5]
LABELS = {patient: "xy"[number % 2] for number, patient in enumerate(PATIENTS)}


def write_patients(folder: Path) -> None:
    """Features of 14 slides of 7 patients, and a table that tells their times and events, which are the patient's."""
    generator = torch.Generator().manual_seed(2)
    (folder / "features" / "mpp_2").mkdir(parents=True)
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "label", "split", "months", "event"])
        for index, row in enumerate(ROWS):
            patient, slide = row.split(":")
            number = PATIENTS.index(patient)
            features = torch.randn(2 + 3 * index % 5, WIDTH, generator=generator)
            save_file({"features": features}, folder / "features" / f"{patient}_{slide}.safetensors")
            coarse = torch.randn(1 + index % 2, WIDTH, generator=generator)
            save_file({"features": coarse}, folder / "features" / "mpp_2" / f"{patient}_{slide}.safetensors")
            split = "train" if patient in TRAIN else "validation" if patient == "p5" else "test"
            follow_up = 1 + number * 5 % 7 // 2, int(number != 3)
            writer.writerow([f"{patient}_{slide}", patient, LABELS[patient], split, *follow_up])


def bag_of(folder: Path, patient: str, rows: tuple[int, ...] | None = None) -> torch.Tensor:
    """The features of a patient, slide after slide in the order of their ids, or of one slide; float64."""
    paths = sorted((folder / "features").glob(f"{patient}*.safetensors"))
    whole = torch.cat([load_file(path)["features"] for path in paths]).double()
    return whole if rows is None else whole[list(rows)]


def scales_of_bag(folder: Path, patient: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of a patient, each slide's fine ones before its coarse ones, and 0 or 1 of each."""
    bags, scales = [], []
    for path in sorted((folder / "features").glob(f"{patient}*.safetensors")):
        for scale, file in enumerate((path, path.parent / "mpp_2" / path.name)):
            bags.append(load_file(file)["features"].double())
            scales += [scale] * len(bags[-1])
    return torch.cat(bags), torch.tensor(scales)


def run_patient_steps(
    folder: str, name: str, layout: dict, task: dict, reading: dict | None = None, scales: dict | None = None
) -> list[dict]:
    """The steps of an epoch: weights before and after, the bags' patients, and the rows that were trained on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = settings_of(Path(folder), name, task, layout, 0.0)
    reading = replace(settings.policies.reading, workers=0, **(reading or {}))
    settings = replace(
        settings,
        data=replace(settings.data, bag="patient", classes=None, **(scales or {})),
        model=replace(settings.model, scale_embedding=bool(scales)),
        policies=replace(settings.policies, reading=reading),
    )
    build = prepare.build_slide_model
    prepare.build_slide_model = lambda *arguments: (lambda config, module: (config, module.double()))(
        *build(*arguments)
    )
    try:
        run = prepare.prepare_run(settings, None)
    finally:
        prepare.build_slide_model = build
    run.model.train()
    done, trained = [], run.cohort.rows("train")
    names = [patient.slide_id for patient in run.cohort.manifest.slides]
    weights = lambda: {key: value.detach().clone() for key, value in run.module.named_parameters()}  # noqa: E731
    steps = StepReader(run, planned_steps(run, run.progress), read_parts(run, run.reading))
    for step, micro_steps in steps.of_epoch(0):
        before, bags = weights(), []

        def noted(micro_steps=micro_steps, bags=bags):
            for micro in micro_steps:
                bags += [(names[bag.slide], tuple(bag.kept.tolist())) for bag in micro.bags]
                yield micro

        totals = train_step(run, step, noted(), 1.0, lambda: None)
        patients = [names[trained[one]] for groups in step.plan.micro_steps for group in groups for one in group]
        done.append({"before": before, "after": weights(), "patients": patients, "bags": bags, "loss": totals.loss})
    assert run.seed == SEED
    run.accelerator.free_memory()
    return done
