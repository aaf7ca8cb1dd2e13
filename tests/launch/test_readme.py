"""The README's Python, run as it is written; its names and its options exist."""

import re

import pytest
import torch

import ds_wsi
from ds_wsi.bags.manifest import read_manifest
from ds_wsi.cli import build_parser
from ds_wsi.config import read_section
from runs import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(demo_manifest, tmp_path, monkeypatch):
    code = blocks("python")[0]
    slide = read_manifest(demo_manifest).slides[0].path
    (tmp_path / "slide.svs").symlink_to(slide)
    monkeypatch.chdir(tmp_path)
    # The demo slide is too small for a tile of 256 px and has few of 64.
    names: dict = {}
    exec(code.replace("256", "64").replace("bag[:10]", "bag[:2]"), names)
    assert names["output"].logits.shape == (2, 2)
    assert names["output"].attention.shape == (len(names["bag"]) + 2,)
    for slide_id in ("slide_1", "slide_2"):
        torch.save(torch.randn(5, 1024), tmp_path / f"{slide_id}.pt")
    exec(blocks("python")[3].replace("folder", repr(str(tmp_path))), names)
    assert names["logits"].shape == (2, 2)
    exec(blocks("python")[2], names)  # one bag across ranks: here across one
    assert all(parameter.grad is not None for parameter in names["model"].encoder.parameters())


def test_the_partition_example_runs_within_its_budget(capsys):
    code = blocks("python")[1]
    names: dict = {}
    exec(code, names)
    assert names["plan"].mode == "partitioned"
    assert names["plan"].peak_bytes <= 80 * 2**20
    assert names["features"].shape == (256, 512)
    assert all(parameter.grad is not None for parameter in names["encoder"].parameters())
    assert "segment up to" in capsys.readouterr().out


@pytest.fixture
def _no_accelerator_left():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_no_accelerator_left")
def test_the_trainer_example_runs(tmp_path, monkeypatch):
    (code,) = [block for block in blocks("python") if "SlideTrainer" in block]
    monkeypatch.chdir(tmp_path)
    names: dict = {"bag": torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)}
    exec("from ds_wsi import TilingPolicy\n" + code.replace("256", "64").replace("bag[:10]", "bag[:2]"), names)
    assert names["trainer"].state.global_step == 3
    found = names["SlideModelForSlideClassification"].from_pretrained(tmp_path / "runs/hf/model")
    theirs = names["model"].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())


@pytest.mark.usefixtures("_no_accelerator_left")
def test_both_sides_of_the_diff_train():
    class ABMIL(torch.nn.Linear):
        def __init__(self, width, num_classes):
            super().__init__(width, num_classes)

        def forward(self, features):
            return super().forward(features.mean(0, keepdim=True))

    (diff,) = blocks("diff")
    dataset = [(torch.randn(3 + index, 1024), index % 2, f"slide_{index}") for index in range(9)]
    for sign in "-+":
        names: dict = {"dataset": dataset, "ABMIL": ABMIL}
        exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)), names)
        assert names["loss"].isfinite()
        assert len(names["optimizer"].state) > 0
    assert names["labels"].shape == (1,)  # nine bags are eight and one


def test_every_public_name_is_listed():
    for name in ds_wsi.__all__:
        assert f"`{name}`" in README, name


def test_the_section_is_accepted():
    import json

    (section,) = [json.loads(block)["ds_wsi"] for block in blocks("json")]
    assert read_section(section).reading.workers == 4


@pytest.mark.parametrize(
    "command", ["tile", "train", "evaluate", "features", "heatmap", "demo", "plan", "compare", "report"]
)
def test_options_in_the_readme_exist(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    known = capsys.readouterr().out
    script = rf"(?:ds-wsi {command}|launch/{command}\.py)"
    text = README.replace("\\\n", " ")
    used = [flag for line in re.findall(rf"{script}([^\n#`]*)", text) for flag in re.findall(r"--[\w-]+", line)]
    assert used
    assert [flag for flag in used if flag not in known] == []


@pytest.mark.parametrize("script", ["panda", "camelyon16", "camelyon17", "tcga_lung", "custom"])
def test_the_launchers_commands_parse(script):
    text = README.replace("\\\n", " ")
    used = re.findall(rf"launch/train_{script}\.py([^\n#`]*)", text)
    assert used
    dataset = {"tcga_lung": "tcga"}.get(script, script)
    source = (ROOT / "launch" / f"train_{script}.py").read_text()
    assert f'main(["protocol", "{dataset}", *sys.argv[1:]])' in source
    for line in used:
        options = build_parser().parse_args(["protocol", dataset, *line.split()])
        assert "data_dir" in options
