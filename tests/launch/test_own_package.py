"""A package of somebody else's brings an encoder, an aggregator and a loss, and trains by command and by function."""

import csv
import sys

import pytest
import torch
from safetensors.torch import load_file

import ds_wsi
from documents import block
from ds_wsi.cli import main
from ds_wsi.slides.demo import DemoPolicy, make_demo

PARTS = '''
import torch
import torch.nn.functional as F
from torch import nn

from ds_wsi import SlideOutput


class Net(nn.Module):
    """Whole in [0, 1]: it normalises by itself."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tiles):
        tokens = self.stem(tiles * 2 - 1).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.norm(tokens.mean(1))


class Pool(nn.Module):
    """Means of bags, and the focal loss of their logits beside the cross-entropy."""

    needs_labels = True

    def __init__(self, in_dim, num_classes, focus=2.0):
        super().__init__()
        self.focus, self.last = focus, nn.Linear(in_dim, num_classes)

    def forward(self, bags, labels=None):
        logits = self.last(torch.stack([bag.mean(0) for bag in bags.split()]))
        loss = None
        if labels is not None:
            entropy = F.cross_entropy(logits, labels, reduction="none")
            loss = (1 - (-entropy).exp()) ** self.focus * entropy
        return SlideOutput(logits, None, loss)
'''
POINTS = """[ds_wsi.encoders]
theirs = their_package.parts:Net
[ds_wsi.aggregators]
their_pool = their_package.parts:Pool
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An installed package, as importlib sees it, and slides."""
    folder = tmp_path_factory.mktemp("theirs")
    package, info = folder / "site" / "their_package", folder / "site" / "their_package-2.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(PARTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    make_demo(folder / "slides", DemoPolicy(train=4, validation=2, test=2, min_side_px=352, max_side_px=352))
    before = list(sys.path)
    sys.path.insert(0, str(folder / "site"))
    yield folder
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[name]


SETTINGS = {
    "encoder": "their_package.parts:Net",
    "encoder_options": {"width": 12},
    "aggregator": "their_package.parts:Pool",
    "aggregator_options": {"focus": 1.5},
    "tile_size_px": 64,
    "num_train_epochs": 2,
    "bags_per_step": 2,
    "layer_decay": 0.5,
    "no_decay_1d": True,
    "augment_flips": False,
    "dataloader_num_workers": 0,
    "heatmaps": 0,
    "encoder_weights": None,
}
WORDS = """--encoder theirs --encoder_options width=12 --aggregator their_pool --aggregator_options focus=1.5
--tile_size_px 64 --num_train_epochs 2 --bags_per_step 2 --layer_decay 0.5 --no_decay_1d --no_augment_flips
--dataloader_num_workers 0 --heatmaps 0"""


@pytest.fixture(scope="module")
def runs(workplace):
    """The run by command, with the entry points' names, and by function, with the module's."""
    manifest = workplace / "slides" / "manifest.csv"
    by_command = ["train", *WORDS.split(), "--manifest", str(manifest), "--output_dir", str(workplace / "command")]
    assert main(by_command) == 0
    done = ds_wsi.train(manifest=manifest, output_dir=workplace / "function", **SETTINGS)
    return manifest, done


def test_both_train_to_the_same_bits(runs, workplace):
    _, done = runs
    one, other = (load_file(workplace / name / "model.safetensors") for name in ("command", "function"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert done["output_dir"] == str(workplace / "function")
    assert done["seconds"] > 0
    tables = [(workplace / name / "predictions.csv").read_bytes() for name in ("command", "function")]
    assert tables[0] == tables[1]
    assert (workplace / "function" / "report.html").is_file()


def test_their_loss_is_trained_with(runs, workplace):
    """Other weights come without their loss, or with all layers at one rate."""
    manifest, _ = runs
    trained = load_file(workplace / "function" / "model.safetensors")
    for name, changed in (("flat", {"layer_decay": 1.0}), ("unfocused", {"aggregator_options": {"focus": 0.0}})):
        ds_wsi.train(manifest=manifest, output_dir=workplace / name, **{**SETTINGS, **changed})
        other = load_file(workplace / name / "model.safetensors")
        assert not torch.equal(trained["encoder.stem.weight"], other["encoder.stem.weight"]), name


def test_predictions_are_those_of_the_command(runs, workplace, tmp_path):
    manifest, _ = runs
    run, common = workplace / "function", {"dataloader_num_workers": 0, "device": "cpu"}
    with pytest.raises(ValueError, match=r"must be allowed by you .* HINT: --allow_code their_package.parts"):
        ds_wsi.predict(run, manifest, **common)
    common["allow_code"] = ["their_package.parts"]
    rows = ds_wsi.predict(run, manifest, tmp_path / "out", **common)
    with (tmp_path / "out" / "predictions.csv").open() as file:
        assert [row["slide_id"] for row in rows] == [row["slide_id"] for row in csv.DictReader(file)]
    assert len(rows) == 8
    tested = ds_wsi.predict(run, manifest, split="test", **common)
    with (run / "predictions.csv").open() as file:
        by_run = list(csv.DictReader(file))
    assert tested == [row for row in rows if row["slide_id"] in {one["slide_id"] for one in by_run}]
    for row, one in zip(tested, by_run, strict=True):
        assert {name: str(value) if name != "probability_tumor" else one[name] for name, value in row.items()} == one
        assert row["probability_tumor"] == float(one["probability_tumor"])
    with manifest.open() as file:
        first = next(csv.DictReader(file))
    (alone,) = ds_wsi.predict(run, [manifest.parent / first["path"]], **common)
    assert "label" not in alone
    by_table = next(row for row in rows if row["slide_id"] == first["slide_id"])
    assert alone["probability_normal"] == by_table["probability_normal"]
    assert isinstance(alone["n_tiles"], int)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-3}, r"ds_wsi\.train: unrecognized arguments: --lr=0.001\. HINT: did you mean --learning_rate\?"),
        ({"learning_rat": 1e-3}, "did you mean --learning_rate"),
        ({"learning_rate": "fast"}, "argument --learning_rate.*: invalid float value: 'fast'. HINT: keywords are"),
        ({"aggregator": "meen"}, "invalid choice: 'meen'. HINT: did you mean mean"),
        ({"num_train_epochs": False}, "num_train_epochs must be a value, got False"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 must not be given together"),
        ({"dry_run": True}, "unrecognized arguments: --dry_run"),
        ({"manifest": "none.csv"}, r"none\.csv"),
    ],
)
def test_settings_that_are_none_are_refused_in_the_commands_words(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ds_wsi.train(**settings)


def test_arguments_of_predict_are_given_once(tmp_path):
    with pytest.raises(ValueError, match=r"ds_wsi\.predict: model must not be a keyword"):
        ds_wsi.predict(tmp_path, [], model="x")
    with pytest.raises(ValueError, match=r"ds_wsi\.predict: unrecognized arguments: --devise"):
        ds_wsi.predict(tmp_path, [], devise="cpu")
    with pytest.raises(ValueError, match=r"slides must be a manifest or a list of slide files, got .*none\.svs"):
        ds_wsi.predict(tmp_path, ["none.svs"])


def test_the_page_of_own_models_computes_what_it_says():
    names: dict = {}
    exec(block("own code").text, names)
    features = names["Small"](width=24)(torch.rand(4, 3, 32, 32))
    bags = ds_wsi.stack_bags([features[:3], features[3:]])
    expected = torch.stack([features[:3].topk(2, dim=0).values.mean(0), features[3]])
    aggregator = names["Largest"](24, 2, k=2)
    torch.testing.assert_close(aggregator(bags).logits, aggregator.classifier(expected))


def test_the_page_of_a_run_from_python_runs(workplace, monkeypatch, capsys):
    table = (workplace / "slides" / "manifest.csv").read_text("utf-8").replace(",slides/", ",slides/slides/")
    for name in ("cohort.csv", "external.csv"):
        (workplace / name).write_text(table, "utf-8")
    monkeypatch.chdir(workplace)
    # A smaller encoder, and no reading processes.
    text = block("python").text.replace("resnet18", "resnet10t")
    for call in ("num_train_epochs=1", 'output_dir="runs/python_external"', '["slides/slides/demo_000.tiff"]'):
        assert call in text
        text = text.replace(call, f"{call}, dataloader_num_workers=0")
    names: dict = {}
    exec(text, names)
    assert len(names["rows"]) == 8
    assert capsys.readouterr().out.splitlines()[-1].split()[0] in ("normal", "tumor")
    assert (workplace / "runs/python_external/report.html").is_file()
    (one,) = names["one"]
    by_table = next(row for row in names["rows"] if row["slide_id"] == one["slide_id"])
    assert by_table["probability_tumor"] == one["probability_tumor"]
