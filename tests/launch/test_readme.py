"""The README's Python, run as it is written; its names and its options exist."""

import re

import numpy as np
import pytest
import tifffile
import torch

import ds_wsi
from ds_wsi.cli import build_parser
from ds_wsi.config import read_section
from runs import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def write_slide(path):
    """A slide of 16 whole tiles of 256 px at 0.5 um/px, tissue on glass."""
    generator = np.random.default_rng(0)
    image = np.full((1536, 1536, 3), 244.0)
    image[256:1280, 256:1280] = np.array([190.0, 110.0, 170.0]) + generator.normal(0, 15, (1024, 1024, 1))
    with tifffile.TiffWriter(path) as file:
        file.write(
            np.clip(image, 0, 255).astype(np.uint8),
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder of one's own with what the README names, and nothing left of a block's engines."""
    monkeypatch.chdir(tmp_path)
    write_slide(tmp_path / "slide.svs")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what a block sets is undone
        monkeypatch.delenv(name)
    yield tmp_path
    from ds_wsi.engines.accelerator.scope import forget_engine

    forget_engine()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seen(names, *found):
    """The names of a block that ran, of this kind."""
    return [names[name] for name in found]


def is_slide(names):
    (output, bag) = seen(names, "output", "bag")
    assert len(bag) == 16
    assert output.logits.shape == (2, 2)
    assert output.attention.shape == (len(bag) + 10,)


def is_partition(names):
    plan, features, encoder = seen(names, "plan", "features", "encoder")
    assert plan.mode == "partitioned"
    assert plan.peak_bytes <= 40 * 2**20
    assert features.shape == (64, 512)
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def is_shared(names):
    assert all(parameter.grad is not None for parameter in names["model"].encoder.parameters())


def is_stacked(names):
    assert names["logits"].shape == (2, 2)


def is_hooked(names):
    handle, engine = seen(names, "handle", "engine")
    assert (handle.name, handle.where) == ("dmgc", "one process")
    assert engine.comm_handle.name == "dmgc"
    stack = ds_wsi.stack_bags([torch.randn(3, 1024)])
    engine.backward(engine(stack).logits.logsumexp(1).sum())
    engine.step()


def is_trained(names):
    assert names["trainer"].state.global_step == 3
    found = names["SlideModelForSlideClassification"].from_pretrained("runs/hf/model")
    theirs = names["model"].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.state_dict().items())


def is_trained_on_features(names):
    assert names["trainer"].state.global_step == 3


CHECKS = (is_slide, is_partition, is_shared, is_stacked, is_hooked, is_trained, is_trained_on_features)


@pytest.mark.parametrize(("number", "check"), enumerate(CHECKS), ids=[check.__name__ for check in CHECKS])
@pytest.mark.usefixtures("alone")
def test_a_block_runs_as_it_stands(number, check):
    assert len(blocks("python")) == len(CHECKS)
    names: dict = {}
    exec(blocks("python")[number], names)
    check(names)


@pytest.fixture
def _no_accelerator_left():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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
