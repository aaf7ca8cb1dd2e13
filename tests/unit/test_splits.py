from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ds_wsi.bags.manifest import SPLITS, Manifest, ManifestError, SlideEntry, patient_problems
from ds_wsi.bags.splits import assign_splits


def cohort(patients, classes=("a", "b")):
    """Patients as a list of lists of labels."""
    slides = [
        SlideEntry(f"s{number}_{index}", Path("x.tiff"), label, f"p{number}")
        for number, labels in enumerate(patients)
        for index, label in enumerate(labels)
    ]
    return Manifest(tuple(slides), classes)


patients = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=3, max_size=60)


@given(patients=patients, seed=st.integers(0, 2**31))
def test_all_slides_of_a_patient_are_on_one_side(patients, seed):
    try:
        out = assign_splits(cohort(patients), seed=seed)
    except ManifestError:
        assume(False)
    assert not patient_problems(out.slides)
    assert {slide.split for slide in out.slides} == set(SPLITS)
    assert sum(len(out.in_split(split)) for split in SPLITS) == len(out.slides)
    # nothing but the split is set, and no slide moves
    assert [(slide.slide_id, slide.label) for slide in out.slides] == [
        (slide.slide_id, slide.label) for slide in cohort(patients).slides
    ]


@given(sizes=st.tuples(st.integers(5, 60), st.integers(5, 60)), seed=st.integers(0, 999))
def test_each_label_is_split_by_the_fractions_within_one_patient(sizes, seed):
    out = assign_splits(cohort([[0]] * sizes[0] + [[1]] * sizes[1]), seed=seed)
    for label, size in enumerate(sizes):
        counts = Counter(slide.split for slide in out.slides if slide.label == label)
        for split, fraction in zip(SPLITS, (0.6, 0.2, 0.2)):
            assert abs(counts[split] - fraction * size) <= 1.0 + 1e-9


def test_a_patient_counts_for_the_label_most_of_its_slides_have():
    out = assign_splits(cohort([[0, 1, 1]] * 10 + [[0]] * 10), seed=1)
    places = defaultdict(Counter)
    for slide in out.slides:
        places[slide.split][slide.patient_id in {f"p{number}" for number in range(10)}] += 1
    assert places["test"] == {True: 6, False: 2}
    assert places["train"] == {True: 18, False: 6}


def test_draws_repeat_by_seed_and_seeds_differ():
    manifest = cohort([[0]] * 20 + [[1]] * 20)
    assert assign_splits(manifest, seed=3) == assign_splits(manifest, seed=3)
    assert len({assign_splits(manifest, seed=seed).slides for seed in range(5)}) == 5


def test_the_order_of_the_rows_does_not_matter():
    manifest = cohort([[0, 1], [1], [0]] * 8)
    backwards = Manifest(manifest.slides[::-1], manifest.classes)
    assert assign_splits(backwards, seed=2).slides[::-1] == assign_splits(manifest, seed=2).slides


def test_splits_that_are_given_are_kept():
    slides = tuple(SlideEntry(f"s{i}", Path("x"), i % 2, f"p{i}", split="test") for i in range(4))
    manifest = Manifest(slides, ("a", "b"))
    assert assign_splits(manifest) is manifest


@pytest.mark.parametrize("patients", [[[0], [1]], [[0, 0, 1, 1]], [[0], [0, 1]]])
def test_too_few_patients_are_refused(patients):
    with pytest.raises(ManifestError, match=r"at least one patient each.*HINT: add a `split` column"):
        assign_splits(cohort(patients))
