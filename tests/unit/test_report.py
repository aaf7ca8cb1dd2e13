"""The report: whole, offline, and inert whatever the names hold."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_wsi.evaluation.bootstrap import MetricInterval
from ds_wsi.evaluation.figures import roc_points
from ds_wsi.evaluation.metrics import slide_metrics
from ds_wsi.evaluation.report import heatmap_side_px, write_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """Tags with their attributes, and the text by the tag that holds it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def prediction(slide_id: str, *, correct: bool = True, chance: float = 0.875, **changed: Any) -> dict[str, Any]:
    row = {"slide_id": slide_id, "label": "tumor" if correct else "normal", "predicted": "tumor", "n_tiles": 1234}
    return row | {"probabilities": {"normal": 1 - chance, "tumor": chance}, "correct": correct} | changed


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 3000, 3), dtype=np.uint8)).save(path)
    return path


def report(path: Path, **changed: Any) -> tuple[Page, str]:
    arguments: dict[str, Any] = {
        "title": "Demo",
        "summary": {"Epochs": "12"},
        "intervals": {"auc": MetricInterval(0.91234, 0.81, 0.99, 1998)},
        "predictions": [prediction("slide_a"), prediction("slide_b", correct=False)],
        "curves_png": None,
        "heatmaps": [],
        "failures": [],
    }
    write_report(path / "report.html", **(arguments | changed))
    html = (path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def test_numbers_and_names_are_there(tmp_path: Path, png: Path):
    page, html = report(
        tmp_path,
        curves_png=png,
        heatmaps=[("slide_b", png)],
        failures=[{"slide_id": "slide_a", "x": 512, "y": 1024, "reason": "cannot decode"}],
        sections={"Frozen encoder": "AUC 0.61.\n\nWorse."},
    )
    for text in ("0.912", "0.810 to 0.990", "1,998", "95% interval", "Epochs", "12", "0.875", "1,234", "512", "1024"):
        assert text in page.text, text
    for text in ("cannot decode", "Frozen encoder", "AUC 0.61.", "Worse."):
        assert text in page.text, text
    assert (
        "1 of 2 slides are predicted correctly. The wrong ones come first. A slide's name leads to its heat map."
        in page.text
    )
    assert "1 tile of 1 slide could not be read and took no part." in page.text
    assert len(page.all("img")) == 2
    assert html.startswith("<!DOCTYPE html>")


def test_wrong_predictions_are_marked_in_words(tmp_path: Path):
    page, _ = report(tmp_path)
    assert page.text.count("correct") == 1
    assert page.text.count("wrong") == 1
    assert [row.get("class") for row in page.all("tr") if row.get("class")] == ["wrong", "right"], "first the wrong"


def test_wrong_predictions_come_first_the_surest_at_the_top(tmp_path: Path):
    rows = [prediction("a"), prediction("b", correct=False, chance=0.6), prediction("c")]
    rows.append(prediction("d", correct=False, chance=0.9))
    _, html = report(tmp_path, predictions=rows)
    listed = re.findall(r'<tr class="(?:right|wrong)"><th scope="row">(\w)<', html)
    assert listed == ["d", "b", "a", "c"]


def test_the_confusion_matrix_counts_every_slide_by_label_and_prediction(tmp_path: Path):
    rows = [prediction("a"), prediction("b", correct=False), prediction("c", correct=False)]
    rows.append(prediction("d", label="normal", predicted="normal"))
    _, html = report(tmp_path, predictions=rows)
    matrix = html[html.index("Confusion matrix") :].split("</table>")[0]
    assert [[int(cell) for cell in re.findall(r">(\d+)</td>", line)] for line in matrix.split("<tr>")[2:]] == [
        [1, 2, 3],
        [0, 1, 1],
    ]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_below_the_roc_curve_is_the_auc(tmp_path: Path, classes: int):
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 40)
    chances = generator.dirichlet(np.ones(classes), 40).round(1)  # with ties
    chances[:, 0] += 1 - chances.sum(1)
    areas = []
    for index in range(classes):
        points = roc_points(labels == index, chances[:, index])
        assert points is not None
        areas.append(np.trapezoid(points[:, 1], points[:, 0]))
    auc = slide_metrics(labels, chances.clip(0))["auc"]
    assert (areas[1] if classes == 2 else np.mean(areas)) == pytest.approx(auc, abs=1e-12)
    names = [f"class_{index}" for index in range(classes)]
    rows = [
        prediction(
            *(str(number),),
            label=names[label],
            predicted=names[int(chance.argmax())],
            probabilities=dict(zip(names, map(float, chance), strict=True)),
            correct=bool(label == chance.argmax()),
        )
        for number, (label, chance) in enumerate(zip(labels, chances, strict=True))
    ]
    page, html = report(tmp_path, predictions=rows)
    shown = names[1:] if classes == 2 else names
    assert [text for text in page.text if ", area " in text] == [
        f"{name}, area {area:.3f}" for name, area in zip(names, areas, strict=True) if name in shown
    ]
    assert html.count("<polyline") == len(shown)


def test_one_class_alone_has_no_roc_curve(tmp_path: Path):
    page, _ = report(tmp_path, predictions=[prediction("a"), prediction("b")])
    assert "ROC curve" not in page.text
    assert roc_points([True, True], [0.1, 0.9]) is None


def test_cohort_and_changed_settings_are_tables(tmp_path: Path):
    cohort = [("", "train", "all"), ("slides", "3", "4"), ("label tumor", "1", "2")]
    page, html = report(tmp_path, cohort=cohort, changed={"--learning_rate": "0.5"})
    assert {"train", "slides", "label tumor", "--learning_rate", "0.5"} <= set(page.text)
    assert '<th scope="row">label tumor</th><td class="number">1</td><td class="number">2</td>' in html
    page, _ = report(tmp_path, changed={})
    assert "None does." in page.text


def test_nothing_comes_from_outside(tmp_path: Path, png: Path):
    page, html = report(tmp_path, curves_png=png, heatmaps=[("slide_a", png)])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    policies = [meta["content"] or "" for meta in page.all("meta") if meta.get("http-equiv")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")


def test_every_text_is_escaped(tmp_path: Path, png: Path):
    safe, _ = report(tmp_path, **everywhere("harmless", png))
    page, html = report(tmp_path, **everywhere(HOSTILE, png))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in safe.tags], "no name makes an element"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = "".join(page.text)
    assert shown.count(HOSTILE) == "".join(safe.text).count("harmless") >= 14


def everywhere(text: str, png: Path) -> dict[str, Any]:
    return {
        "title": text,
        "summary": {text: text},
        "intervals": {text: MetricInterval(0.5, 0.4, 0.6, 10)},
        "predictions": [prediction(text, label=text, predicted=text, probabilities={text: 1.0})],
        "heatmaps": [(text, png)],
        "failures": [{"slide_id": text, "reason": text, text: 1}],
        "sections": {text: text},
        "cohort": [("", text), (text, text)],
        "changed": {text: text},
    }


def test_predictions_link_to_their_own_heat_maps(tmp_path: Path, png: Path):
    page, html = report(tmp_path, heatmaps=[("slide_b", png), ("slide_a", png)])
    assert [link["href"] for link in page.all("a")] == ["#heatmap-0", "#heatmap-1"]
    figures = {part.split('"', 1)[0]: part for part in html.split('<figure id="')[1:]}
    assert "<strong>slide_b</strong>" in figures["heatmap-0"]
    assert "<strong>slide_a</strong>" in figures["heatmap-1"]


def test_huge_images_are_reduced_and_keep_their_shape(tmp_path: Path, png: Path):
    page, _ = report(tmp_path, heatmaps=[("slide_a", png)])
    (image,) = page.all("img")
    data = base64.b64decode((image["src"] or "").split(",", 1)[1])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (1400, 28)
        assert opened.format == "JPEG"
    assert (image["width"], image["height"]) == ("1400", "28")


def test_area_of_many_heat_maps_is_bounded():
    assert heatmap_side_px(1) == heatmap_side_px(40) == 1400
    assert heatmap_side_px(160) == 700
    assert all(count * heatmap_side_px(count) ** 2 <= 40 * 1400**2 for count in range(1, 340))


def test_empty_parts_are_said_in_words(tmp_path: Path):
    page, _ = report(tmp_path, intervals={}, predictions=[], summary={})
    for text in ("No metric was computed.", "No slide was predicted.", "No tile failed to read."):
        assert text in page.text
    assert not {"Training", "Heat maps", "Run"} & set(page.text)


def test_undefined_and_negative_metrics(tmp_path: Path):
    nan = math.nan
    intervals = {"auc": MetricInterval(nan, nan, nan, 0), "quadratic_weighted_kappa": MetricInterval(-0.5, -1, 0, 9)}
    page, html = report(tmp_path, intervals=intervals)
    assert page.text.count("undefined") == 2
    assert "-1 to 1" in page.text
    assert 'cx="25.00%"' in html
    assert "nan" not in "".join(page.text)


def test_missing_image_raises_and_leaves_no_report(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent"):
        report(tmp_path, curves_png=tmp_path / "absent.png")
    assert not list(tmp_path.glob("*.html"))
