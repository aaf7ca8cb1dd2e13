"""The demo's targets follow from what its slides hold, the same of a patient's slides, and bags do not tell them."""

from itertools import combinations

from ds_wsi.evaluation.task_metrics.concordance import harrell_c
from ds_wsi.evaluation.task_metrics.follow_up import follow_up
from ds_wsi.slides import demo
from ds_wsi.slides.demo_targets import TARGET_FIELDS


def cohort():
    """The cohort's rows, each with what the slide is drawn with."""
    policy = demo.GradedPolicy()
    return [(row, demo._findings(k, policy), demo._side_px(k, policy)) for k, row in enumerate(demo._rows(policy))]


def test_targets_are_of_what_is_drawn():
    for row, findings, _ in cohort():
        assert row["grade"] == str(findings.foci)
        assert row["several_foci"] == str(int(findings.foci > 1))
        assert row["full_foci"] == str(int(findings.foci > 0 and findings.rings == 1))
        assert row["score"] == "" or abs(float(row["score"]) - findings.burden) < 0.5
        assert 0 < int(row["months"]) <= 72


def test_a_patients_slides_have_one_follow_up_and_one_split():
    of_patient: dict[str, set] = {}
    for row, findings, _ in cohort():
        of_patient.setdefault(row["patient_id"], set()).add((row["months"], row["event"], row["split"], findings))
    assert len(of_patient) == 88
    assert all(len(told) == 1 for told in of_patient.values())


def test_the_tumour_decides_the_event_and_the_size_of_slides_nothing():
    for split, least in (("train", 0.8), ("validation", 0.8), ("test", 0.8)):
        rows = [(row, findings) for row, findings, _ in cohort() if row["split"] == split]
        followed = follow_up([int(row["months"]) for row, _ in rows], [int(row["event"]) for row, _ in rows])
        assert harrell_c(followed, [findings.burden for _, findings in rows]).value > least
        assert {findings.foci for _, findings in rows} == {0, 1, 2, 3}
    assert len({side for *_, side in cohort()}) == 1


def test_there_are_ties_censored_patients_and_missing_scores():
    rows = [row for row, *_ in cohort()]
    assert {row["event"] for row in rows} == {"0", "1"}
    assert any(not row["score"] for row in rows)
    first = {row["patient_id"]: row["months"] for row in rows if row["event"] == "1"}
    assert any(first[a] == first[b] for a, b in combinations(first, 2))
    assert set(TARGET_FIELDS) < set(rows[0])
