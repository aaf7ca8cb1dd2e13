"""Tables of runs: what is grouped, averaged, set in bold, left out and refused, in each of the four forms."""

import csv
import io
import json
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest

from ds_wsi.cli import main
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import RunFolderError, RunRecord
from ds_wsi.evaluation.tables import collect_runs, write_tables

FROZEN, END_TO_END = (0.70, 0.74, 0.78), (0.80, 0.91, 0.84)


@pytest.fixture
def make(tmp_path):
    """Write a finished run's folder; what is given changes its record."""

    def make(value, **changed):
        folder = tmp_path / f"run_{len(list(tmp_path.glob('run_*')))}"
        folder.mkdir()
        values = value if isinstance(value, dict) else dict.fromkeys(METRIC_NAMES, value)
        metrics = {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
        (folder / "predictions.csv").write_text("slide_id\n")
        record = {"dataset": "panda", "encoder": "resnet18", "aggregator": "gated_abmil", "training": "end to end"}
        record |= {"seed": 0, "split": "", "test_split": "test", "evaluation": EvaluationProtocol(), "settings": {}}
        RunRecord(**record | changed).write(folder)
        return folder

    return make


@pytest.fixture
def runs(make):
    frozen = [make(value, seed=seed, training="frozen") for seed, value in enumerate(FROZEN)]
    return [*frozen, *(make(value, seed=seed) for seed, value in enumerate(END_TO_END))]


def body(markdown):
    """The cells of the rows below the heads."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if "---" not in line]


def test_mean_and_sample_deviation_over_seeds_beside_the_baseline(runs, tmp_path):
    names, row = body(write_tables(runs, tmp_path / "out", ["accuracy"]))
    assert names == ["Method", "Accuracy frozen", "Accuracy end to end", "Accuracy difference", "Runs"]
    # By hand: 74 ± 4; (80 + 91 + 84) / 3 = 85, sqrt((25 + 36 + 1) / 2) = 5.57.
    assert row == ["resnet18 + gated_abmil", "74.00 ± 4.00", "**85.00 ± 5.57**", "+11.00", "3 / 3"]
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for line, values, change in zip(rows, (FROZEN, END_TO_END), ("", "0.11"), strict=True):
        assert float(line["mean"]) == pytest.approx(mean(values), abs=1e-15)
        assert float(line["std"]) == pytest.approx(stdev(values), abs=1e-15)
        assert line["n_runs"] == "3"
        assert line["difference_to_frozen"][:4] == change
        assert len(line["runs"].split()) == 3


def test_metrics_are_the_papers_by_default_in_the_order_asked_for(runs, tmp_path):
    for given, titles in ((None, ["QWK", "AUC", "Accuracy"]), (["f1", "auc"], ["F1", "AUC"])):
        names = body(write_tables(runs, tmp_path, given))[0]
        assert [name.split()[0] for name in names[1:-1:3]] == titles
    with pytest.raises(ValueError, match=r"metric must be one of accuracy.*got 'kappa'"):
        write_tables(runs, tmp_path, ["kappa"])


def test_datasets_methods_and_evaluations_are_kept_apart(make, tmp_path):
    random_tiles = EvaluationProtocol(256, 100)
    paths = [
        make(0.5),
        make(0.6, aggregator="dtfd"),
        make(0.9, evaluation=random_tiles),  # the highest, but of another evaluation
        make(0.7, evaluation=random_tiles, aggregator="dtfd"),
        make(0.4, dataset="tcga"),
        make(0.8, test_split="all", dataset="tcga"),
    ]
    markdown = write_tables(paths, tmp_path, ["auc"])
    assert markdown.index("## panda") < markdown.index("## tcga")
    assert body(markdown) == [
        ["Method", "Evaluation", "AUC end to end", "Runs"],
        ["resnet18 + dtfd", "256 random tiles, 100 runs", "70.00", "1"],
        ["resnet18 + dtfd", "all tiles", "**60.00**", "1"],
        ["resnet18 + gated_abmil", "256 random tiles, 100 runs", "**90.00**", "1"],
        ["resnet18 + gated_abmil", "all tiles", "50.00", "1"],
        ["Method", "Evaluation", "AUC end to end", "Runs"],
        ["resnet18 + gated_abmil", "all tiles", "40.00", "1"],
        ["resnet18 + gated_abmil", "all tiles, all slides", "80.00", "1"],
    ]


def test_runs_with_other_settings_are_rows_of_their_own_beside_one_baseline(make, tmp_path):
    paths = [make(0.5, training="frozen", settings={"lr": 1e-4})]
    paths += [make(value, settings={"lr": 5e-5, "colour": c}) for value, c in ((0.6, 0.0), (0.7, 0.1))]
    assert body(write_tables(paths, tmp_path, ["auc"]))[1:] == [
        ["resnet18 + gated_abmil", "colour 0.0", "50.00", "60.00", "+10.00", "1 / 1"],
        ["resnet18 + gated_abmil", "colour 0.1", "50.00", "**70.00**", "+20.00", "1 / 1"],
    ]


def test_the_same_seed_and_split_twice_is_refused_and_folds_are_not(make, tmp_path):
    folds = [make(0.5, split="0"), make(0.7, split="1")]
    assert body(write_tables(folds, tmp_path, ["auc"]))[1][1:] == ["60.00 ± 14.14", "2"]
    # A folder that is named twice is one run.
    assert "60.00 ± 14.14" in write_tables([*folds, folds[0]], tmp_path, ["auc"])
    with pytest.raises(ValueError, match=r"seed 0, split '1' in .*run_1 and .*run_2.*--split_name"):
        write_tables([*folds, make(0.6, split="1")], tmp_path)


def test_unfinished_and_torn_runs_are_listed_and_take_no_part(runs, make, tmp_path, caplog):
    spoilt = [make(0.1, seed=seed) for seed in range(5, 11)]
    (spoilt[0] / "run.json").unlink()
    (spoilt[1] / "run.json").write_text("{")
    (spoilt[2] / "metrics.json").write_text((runs[0] / "metrics.json").read_text())  # of another run
    (spoilt[3] / "predictions.csv").unlink()
    (spoilt[4] / "run.json").write_text(json.dumps({"format": "ds_wsi.run", "version": 2}))
    values = json.loads((spoilt[5] / "run.json").read_text())
    (spoilt[5] / "run.json").write_text(json.dumps({name: values[name] for name in values if name != "dataset"}))
    collected = collect_runs([*runs, *spoilt, tmp_path / "gone"])
    assert len(collected.runs) == 6
    reasons = ["unfinished: no run.json", "run.json is no JSON", "metrics.json is not the one that"]
    reasons += [
        "torn: no predictions.csv",
        "not of format ds_wsi.run version 1",
        "run.json must hold",
        "no such folder",
    ]
    for (path, reason), expected in zip(collected.skipped, reasons, strict=True):
        assert expected in reason
        assert str(path) in caplog.text
    markdown = write_tables([*runs, *spoilt], tmp_path / "out", ["auc"])
    assert "| 3 / 3 |" in markdown
    for form in ("md", "tex", "html"):
        text = (tmp_path / "out" / f"results.{form}").read_text()
        assert all(path.name in text for path in spoilt), form
    with pytest.raises(ValueError, match=r"at least one run must be finished.*run_6: unfinished"):
        write_tables(spoilt[:1], tmp_path)
    with pytest.raises(RunFolderError, match=r"no such folder"):
        RunRecord.read(tmp_path / "gone")


def test_an_undefined_metric_is_counted_out_in_plain_sight(make, tmp_path):
    values = [dict.fromkeys(METRIC_NAMES, 0.5) | {"auc": auc, "f1": None} for auc in (0.6, None, 0.8)]
    markdown = write_tables([make(value, seed=seed) for seed, value in enumerate(values)], tmp_path, ["auc", "f1"])
    assert body(markdown)[1][1:] == ["70.00 ± 14.14 (2 of 3)", "-", "3"]
    assert "only n of the m runs define the metric" in markdown
    assert r"$70.00 \pm 14.14$ (2 of 3) & -- & $3$" in (tmp_path / "results.tex").read_text()


class Page(HTMLParser):
    """The tags, and what is in bold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.bold = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "strong" and data.strip():
            self.bold.append(data)


def test_names_are_escaped_in_every_form_and_the_page_is_offline(make, tmp_path):
    hostile = "a_b & 50% <script>x</script> {\\} #$~^ | `*"
    paths = [make(0.5, dataset=hostile, training="frozen"), make(0.6, dataset=hostile)]
    markdown = write_tables(paths, tmp_path, ["auc"])
    assert "<script" not in markdown
    assert all(len(cells) == 5 for cells in body(markdown))
    page = (tmp_path / "results.html").read_text()
    assert "script" not in Page(page).tags
    assert Page(page).bold == ["60.00"]
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    latex = (tmp_path / "results.tex").read_text()
    escaped = r"a\_b \& 50\% \textless{}script\textgreater{}x\textless{}/script\textgreater{} "
    escaped += r"\{\textbackslash{}\} \#\$\textasciitilde{}\textasciicircum{} \textbar{}"
    assert escaped in latex
    assert r"resnet18 + gated\_abmil & $50.00$ & $\mathbf{60.00}$ & $+10.00$ & $1 / 1$ \\" in latex
    # Each line of the table has as many cells as the table has columns.
    rows = [line for line in latex.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert {line.replace("\\&", "").count("&") for line in rows} == {4}
    assert r"\begin{tabular}{lrrrr}" in latex
    assert next(csv.reader(io.StringIO((tmp_path / "results.csv").read_text().split("\n", 1)[1])))[0] == hostile


def test_the_command_prints_the_markdown_and_names_what_is_wrong(runs, tmp_path, capsys):
    arguments = ["report", *map(str, runs), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--metric", "auc, f1"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out" / "results.md").read_text().strip()
    assert "F1 difference" in printed
    assert main([*arguments, "--metric", "nothing"]) == 2


def test_a_protocols_folder_stands_for_its_runs(runs, tmp_path, capsys, monkeypatch):
    """`ds-wsi report runs/*` where some are protocols; the tables go to ./tables."""
    begun = tmp_path / "panda" / "fold9_seed0"
    begun.mkdir(parents=True)
    (begun / "protocol.json").write_text("{}")
    (tmp_path / "panda" / "manifests").mkdir()
    for path in runs[1:]:
        path.rename(tmp_path / "panda" / path.name)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(runs[0]), "panda", "--metric", "accuracy"]) == 0
    assert body(capsys.readouterr().out)[1][1:3] == ["74.00 ± 4.00", "**85.00 ± 5.57**"]
    assert f"{begun}: unfinished" in (tmp_path / "tables" / "results.md").read_text()
    assert "1 folder takes no part" in (tmp_path / "tables" / "results.md").read_text()


def test_an_evaluation_elsewhere_keeps_the_models_record_and_says_where_it_was_trained(make):
    record = RunRecord.read(make(0.5, seed=4, settings={"lr": 1.0}))
    other = record.evaluated_on("tcga", "all", EvaluationProtocol(256, 100))
    assert (other.dataset, other.seed, other.method) == ("tcga", 4, record.method)
    assert other.settings == {"lr": 1.0, "trained_on": "panda"}
    assert other.protocol == "256 random tiles, 100 runs, all slides"
    assert record.evaluated_on("panda", "test", EvaluationProtocol()) == record
