"""Tables of other projects in our columns: what a follow-up means there, who is missing, and in which fold."""

import csv

import pytest

from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.projects import PROJECTS, Asked, read_project, write_cohorts
from ds_wsi.cli import main
from ds_wsi.commands import manifest as command


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


# P1 was followed 12 months and died, P2 30 months and lives, P3 is not known.
PORPOISE = """,case_id,slide_id,site,survival_months,censorship,train
0,P1,P1-A.svs,BP,12.5,0.0,1
1,P1,P1-B.svs,BP,12.5,0.0,1
2,P2,P2-A.svs,BP,30,1.0,1
3,P3,P3-A.svs,BP,-1,-1,1
4,P4,P4-A.svs,BP,7,0,1
"""
LISTS = {
    0: ",train,val\n0,P1,P4\n1,P2,\n2,P3,\n",
    1: ",train,val\n0,P4,P2\n1,P3,P1\n",
}


def porpoise(folder):
    for number, text in LISTS.items():
        write(folder / f"splits/splits_{number}.csv", text)
    return write(folder / "tcga.csv", PORPOISE)


def test_a_censored_patient_is_one_without_an_event_and_folds_are_of_patients(tmp_path, capsys):
    table, out = porpoise(tmp_path), tmp_path / "cohort.csv"
    options = ["--labels", str(table), "--split_file", str(tmp_path / "splits"), "--output", str(out)]
    assert main(["manifest", "--from", "porpoise", *options]) == 0
    shown = capsys.readouterr().out
    assert "--task survival --time_column time_months --event_column event" in shown
    first, second = rows(tmp_path / "cohort_0.csv"), rows(tmp_path / "cohort_1.csv")
    assert [tuple(row.values()) for row in first] == [
        ("P1-A", "P1", "train", "12.5", "1"),
        ("P1-B", "P1", "train", "12.5", "1"),
        ("P2-A", "P2", "train", "30", "0"),
        ("P3-A", "P3", "train", "", ""),
        ("P4-A", "P4", "test", "7", "1"),
    ]
    assert {row["patient_id"]: row["split"] for row in second} == dict(P1="test", P2="test", P3="train", P4="train")
    assert main(["manifest", "--from", "porpoise", *options]) == 0  # over its own files


def imported(table, folder):
    cohorts = read_project("porpoise", table, Asked(split=folder / "splits/splits_0.csv"))
    write_cohorts(cohorts, folder / "cohort.csv")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("P4,P4-A.svs,BP,7,0", "P4,P4-A.svs,BP,7,2", "censorship must say 1 or 0 .1: censored., got '2' .row 6."),
        ("P4,P4-A.svs,BP,7,0", "P4,P4-A.svs,BP,0,0", "time_months must be positive, got 0"),
        ("P1-B.svs,BP,12.5", "P1-B.svs,BP,13", "patient P1 must have one time_months and event"),
        ("case_id,", "patient,", "must have the columns case_id, slide_id, survival_months, censorship"),
        ("P4,P4-A", "P5,P5-A", "patient of the split must be in the table, got 'P4'"),
        ("survival_months,censorship", "Event,Status", "in ABMILX's tables Event is the time in months"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(tmp_path, old, new, said):
    table = porpoise(tmp_path)
    assert old in PORPOISE
    table.write_text(PORPOISE.replace(old, new))
    with pytest.raises(ManifestError, match=said):
        imported(table, tmp_path)
    assert not (tmp_path / "cohort.csv").exists()


def test_slides_that_no_list_names_are_dropped_on_request_alone(tmp_path):
    table = porpoise(tmp_path)
    split = write(tmp_path / "splits_0.csv", ",train,val\n0,P1,P4\n1,P2,\n")
    with pytest.raises(ManifestError, match="patient must be in the split, got 'P3' in none of it"):
        read_project("porpoise", table, Asked(split=split))
    (cohort,) = read_project("porpoise", table, Asked(split=split, keep_listed=True))
    assert [row["slide_id"] for row in cohort.rows] == ["P1-A", "P1-B", "P2-A", "P4-A"]


def test_the_endpoint_of_survpath_is_said(tmp_path):
    table = write(
        tmp_path / "t.csv",
        "case_id,slide_id,survival_months,censorship,survival_months_dss,censorship_dss\n"
        "P1,S1.svs,10,1,11,0\nP2,S2.svs,20,0,21,1\n",
    )
    with pytest.raises(ManifestError, match="endpoint must be one of os, dss"):
        read_project("survpath", table, Asked())
    cohorts = {name: read_project("survpath", table, Asked(endpoint=name))[0].rows for name in ("os", "dss")}
    assert [(row["time_months"], row["event"]) for row in cohorts["os"]] == [("10", "0"), ("20", "1")]
    assert [(row["time_months"], row["event"]) for row in cohorts["dss"]] == [("11", "1"), ("21", "0")]


def test_mmps_folders_are_folds(tmp_path):
    head = "case_id,slide_id,os_survival_days,os_censorship,dss_survival_days,dss_censorship_cr\n"
    for fold, test in ((0, "P2"), (1, "P1")):
        days = {"P1": "P1,S1,100,1,90,-1\n", "P2": "P2,S2,200,0,90,-1\n"}
        folder = tmp_path / f"TCGA_BLCA_overall_survival_k={fold}"
        write(folder / "test.csv", head + days.pop(test))
        write(folder / "train.csv", head + "".join(days.values()))
    first, second = read_project("mmp", tmp_path, Asked(endpoint="os"))
    assert {row["slide_id"]: (row["split"], row["time_days"], row["event"]) for row in first.rows} == {
        "S1": ("train", "100", "0"),
        "S2": ("test", "200", "1"),
    }
    assert {row["slide_id"]: row["split"] for row in second.rows} == {"S1": "test", "S2": "train"}
    (alone,) = read_project("mmp", tmp_path / "TCGA_BLCA_overall_survival_k=1", Asked(endpoint="os"))
    assert alone == second
    with pytest.raises(ManifestError, match=r"must have the columns .*dss_censorship, got"):
        read_project("mmp", tmp_path, Asked(endpoint="dss"))


def test_patho_benchs_configuration_says_what_the_task_is(tmp_path):
    table = write(
        tmp_path / "k=all.tsv",
        "case_id\tslide_id\tOS\tOS_days\tOS_event\tfold_0\tfold_1\n"
        "P1\tS1\t0\t100\t1\ttrain\ttest\nP2\tS2\t1\t200\t0\ttest\ttrain\nP3\tS3\t1\t300\t0\ttrain\t\n",
    )
    config = "task_col: OS\nsample_col: case_id\nmetrics: [cindex]\n"
    write(tmp_path / "config.yaml", config + "extra_cols: [OS_event, OS_days]\n")
    first, second = read_project("patho_bench", table, Asked())
    assert first.time == "time_days"
    assert [(row["split"], row["time_days"], row["event"]) for row in first.rows] == [
        ("train", "100", "1"),
        ("test", "200", "0"),
        ("train", "300", "0"),
    ]
    assert [row["slide_id"] for row in second.rows] == ["S1", "S2"]
    write(tmp_path / "config.yaml", config + "extra_cols: []\nlabel_dict: {0: wild, 1: mutant}\n")
    first, _ = read_project("patho_bench", table, Asked())
    assert (first.time, [row["label"] for row in first.rows]) == (None, ["wild", "mutant", "mutant"])
    write(tmp_path / "config.yaml", config + "label_dict: {0: wild}\n")
    with pytest.raises(ManifestError, match=r"OS must be one of config\.yaml's label_dict, 0, got '1'"):
        read_project("patho_bench", table, Asked())


def test_stamps_status_has_words(tmp_path):
    clini = write(
        tmp_path / "clini.csv", "PATIENT,os,status,msi\nP1,10,dead,MSI\nP2,20,Alive,MSS\nP3,30,1,MSS\nP4,,,MSI\n"
    )
    slide = write(tmp_path / "slide.csv", "PATIENT,FILENAME\nP1,P1-A.h5\nP2,P2.h5\nP1,P1-B.h5\nP3,P3.h5\nP4,P4.h5\n")
    both = f"{clini},{slide}"
    (cohort,) = read_project("stamp", both, Asked(time_column="os", event_column="status"))
    assert [(row["slide_id"], row["patient_id"], row["time"], row["event"]) for row in cohort.rows] == [
        ("P1-A", "P1", "10", "1"),
        ("P2", "P2", "20", "0"),
        ("P1-B", "P1", "10", "1"),
        ("P3", "P3", "30", "1"),
        ("P4", "P4", "", ""),
    ]
    (classes,) = read_project("stamp", both, Asked(label_column="msi"))
    assert [row["label"] for row in classes.rows] == ["MSI", "MSS", "MSI", "MSS", "MSI"]
    with pytest.raises(ManifestError, match="got --time_column"):
        read_project("stamp", both, Asked(time_column="os"))
    with pytest.raises(ManifestError, match=r"os must say 1 or 0 .*HINT: is it the column of the times"):
        read_project("stamp", both, Asked(time_column="status", event_column="os"))


def test_clams_lists_are_of_slides_and_slides_are_found(tmp_path):
    table = write(tmp_path / "t.csv", "case_id,slide_id,label\nP1,S1,a\nP2,S2,b\nP3,S3,a\n")
    split = write(tmp_path / "splits_0.csv", ",train,val,test\n0,S1,S2,S3\n")
    for name in ("a/S1.svs", "b/S2.svs", "S3.svs"):
        write(tmp_path / "slides" / name, "")
    cohorts = read_project("clam", table, Asked(split=split))
    ((path, manifest),) = write_cohorts(cohorts, tmp_path / "out.csv", tmp_path / "slides")
    assert [(slide.split, slide.path.name, manifest.label_name(slide)) for slide in manifest.slides] == [
        ("train", "S1.svs", "a"),
        ("validation", "S2.svs", "b"),
        ("test", "S3.svs", "a"),
    ]
    assert path.read_text().startswith("slide_id,patient_id,split,label,path\n")
    (tmp_path / "slides/S3.svs").unlink()
    with pytest.raises(ManifestError, match="path"):
        write_cohorts(cohorts, tmp_path / "other.csv", tmp_path / "slides")
    split.write_text(",train,val,test\n0,S1,S2,S3\n1,S2,,\n")
    with pytest.raises(ManifestError, match="'S2' must be in one list"):
        read_project("clam", table, Asked(split=split))


def test_the_command_names_all_projects_and_refuses_what_they_do_not_take(tmp_path, capsys):
    assert sorted(PROJECTS) == sorted(command.PROJECTS)
    table = porpoise(tmp_path)
    usual = ["manifest", "--from", "porpoise", "--labels", str(table), "--output", str(tmp_path / "o.csv")]
    for more, said in (
        (["--endpoint", "os"], "--endpoint must not be given with --from porpoise"),
        (["--folds", "3"], "without what it does not take, got folds"),
    ):
        assert main([*usual, *more]) != 0
        assert said in capsys.readouterr().err
    assert main(["manifest", "--output", "o.csv"]) != 0
    assert "HINT: ds-wsi manifest custom" in capsys.readouterr().err
