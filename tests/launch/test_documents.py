"""README and docs: every block of code runs as it is written, or says why not; names, options and messages exist."""

import json
import re
import shlex

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import save_file

import ds_wsi
from documents import LANGUAGES, OTHERS, PAGES, Block, block, blocks, commands, templates, unnamed
from ds_wsi.cli import build_parser, main
from ds_wsi.config import read_section
from ds_wsi.models import build_encoder
from ds_wsi.slides.demo import DemoPolicy, make_demo
from runs import ROOT

README = (ROOT / "README.md").read_text("utf-8")


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


def seen(names, *keys):
    """The names of a block that ran, of this kind."""
    return [names[name] for name in keys]


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
    model = names["SlideModelForSlideClassification"].from_pretrained("runs/hf/model")
    expected = names["model"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def is_trained_on_features(names):
    assert names["trainer"].state.global_step == 3


def is_own_model(names):
    trained = [parameter.grad is not None for parameter in names["model"].parameters()]
    assert all(trained)
    whole = names["model"].eval()(ds_wsi.stack_bags(names["bags"][:1]))
    torch.testing.assert_close(names["streamed"].logits, whole.logits)
    assert names["other"].logits.shape == (2, 2)


def is_by_bag(names):
    model = names["model"]
    assert (model.norm_training, model.norm_evaluation) == ("bag", "bag")


CHECKS = {
    "slide": is_slide,
    "partition": is_partition,
    "shared bag": is_shared,
    "stacked features": is_stacked,
    "hooks": is_hooked,
    "own model": is_own_model,
    "norms of a loop": is_by_bag,
    "trainer": is_trained,
    "trainer on features": is_trained_on_features,
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.usefixtures("alone")
def test_a_block_of_python_runs_as_it_stands(name):
    names: dict = {}
    exec(block(name).text, names)
    CHECKS[name](names)


@pytest.mark.usefixtures("alone")
def test_each_line_of_which_part_do_i_need_runs():
    names: dict = {}
    exec(block("slide").text + "from ds_wsi import *", names)
    names["engine"] = names["build_aggregator"]("abmil", 512, num_classes=2)
    section = README.split("## Which part do I need")[1].split("\n## ")[0]
    lines = [line for row in re.findall(r"^\|.*\|$", section, re.M) for line in re.findall(r"`([^`]*\(.*?\))`", row)]
    assert len(lines) == 7
    # In one process one rank shares a bag, where the line says four; and a small bag is planned.
    smaller = {"size=4": "size=1", "Policy(4)": "Policy(1)", "2048, 3, 256, 256": "64, 3, 64, 64"}
    for line in lines:
        for written, here in smaller.items():
            line = line.replace(written, here)
        value = eval(line, names)
        if hasattr(value, "remove"):
            value.remove()


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

    diff = block("accelerate").text
    dataset = [(torch.randn(3 + index, 1024), index % 2, f"slide_{index}") for index in range(9)]
    for sign in "-+":
        names: dict = {"dataset": dataset, "ABMIL": ABMIL}
        exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)), names)
        assert names["loss"].isfinite()
        assert len(names["optimizer"].state) > 0
    assert names["labels"].shape == (1,)  # nine bags are eight and one


# --- shell ---

# What the blocks' commands get besides, so that they take seconds: smaller tiles, fewer epochs, no reading process.
SMALL = {
    "tile": ["--tile_size_px", "64"],
    "train": ["--num_train_epochs", "1", "--dataloader_num_workers", "0", "--heatmaps", "0", "--tiles_per_slide", "4"],
    "features": ["--tile_size_px", "64", "--dataloader_num_workers", "0"],
    "evaluate": ["--dataloader_num_workers", "0"],
    "plan": ["--encoder", "resnet10t", "--tiles", "64", "--tile_size_px", "32"],
    "report": [],
    "compare": [],
}
# Name -> files that the block must leave, and blocks that come before it.
SHELL = {
    "own slides": (["tiles", "runs/mine/report.html", "runs/external/metrics.json"], ()),
    "features": (["runs/frozen/report.html", "runs/again/metrics.json"], ()),
    "compare": (["tables/results.md", "compared"], ("own slides", "features")),
    "resume": (["runs/kept/report.html"], ("own slides",)),
    "plan": (["plan/plan.json", "plan/plan.png"], ()),
    "own code on the command line": (["runs/own/report.html", "runs/own_external/metrics.json"], ()),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small cohort, and the names of the blocks that ran in it."""
    folder = tmp_path_factory.mktemp("documents")
    policy = DemoPolicy(train=2, validation=2, test=2, min_side_px=352, max_side_px=352)
    table = make_demo(folder / "slides", policy).read_text("utf-8").replace(",slides/", ",slides/slides/")
    for name in ("cohort.csv", "external.csv"):
        (folder / name).write_text(table, "utf-8")
    save_file(build_encoder("resnet18").state_dict(), folder / "encoder.safetensors")
    (folder / "my_models.py").write_text(block("own code").text, "utf-8")
    return folder, set()


def run_shell(name, done):
    for other in SHELL[name][1]:
        run_shell(other, done)
    if name in done:
        return
    done.add(name)
    for line in commands(block(name).text):
        program, command, *options = shlex.split(line)
        assert program == "ds-wsi"
        small = SMALL[command]
        if command == "train" and "--features_dir" not in options:
            small = [*small, "--tile_size_px", "64", *(() if "--encoder" in options else ("--encoder", "resnet10t"))]
        assert main([command, *options, *small]) == 0, line


@pytest.mark.parametrize("name", SHELL)
def test_a_block_of_shell_runs(name, workplace, monkeypatch):
    folder, done = workplace
    monkeypatch.chdir(folder)
    run_shell(name, done)
    for path in SHELL[name][0]:
        assert (folder / path).exists(), path


def command_lines():
    """All commands of all pages, and where they stand."""
    return [(one.page, line) for one in blocks() if one.language == "bash" for line in commands(one.text)]


def refusal(words, capsys):
    """Why the parser refuses a command line; "" where it does not."""
    try:
        build_parser(words[0]).parse_args(words)
    except SystemExit:
        return capsys.readouterr().err
    return ""


def test_every_command_has_options_that_exist(capsys):
    n_parsed = 0
    for page, line in command_lines():
        match = re.search(r"(?:^|\s)(?:ds-wsi|-m ds_wsi\.cli|\S+/features\.sbatch|launch/(\w+)\.py)\s*(.*)$", line)
        if not match or " benchmark" in line or "..." in line:
            continue
        script, words = match[1], shlex.split(match[2])
        if script and script.startswith("train_"):
            words = ["protocol", {"tcga_lung": "tcga"}.get(script[6:], script[6:]), *words]
        elif script:
            words = [script, *words]
        refused = refusal(words, capsys)
        assert refused == "", f"{page}: {line}: {refused}"
        n_parsed += 1
    assert n_parsed > 30


def launcher_parsers():
    """Launcher -> what parses the words after its name."""
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    return {
        "torchrun": get_args_parser().parse_args,
        "accelerate launch": launch_command_parser().parse_args,
        "deepspeed": runner.parse_args,
    }


def test_every_launcher_has_the_options_it_is_given(capsys):
    parsers = launcher_parsers()
    n_parsed = 0
    for page, line in command_lines():
        for launcher, parse in parsers.items():
            if line.startswith(f"{launcher} "):
                try:
                    parse(shlex.split(line.removeprefix(launcher)))
                except SystemExit:
                    pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
                n_parsed += 1
    assert n_parsed > 10


def test_files_of_the_repository_that_commands_name_exist():
    named = {
        word
        for _, line in command_lines()
        for word in re.findall(r"(?:ds_configs|launch|tests|constraints)/[\w./]+", line)
    }
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_a_part_of_a_json_that_is_not_run_parses():
    parts = [one for one in blocks() if one.language == "json" and not one.name]
    assert parts
    for one in parts:
        json.loads(one.text if one.text.startswith("{") else f"{{{one.text}}}")


@pytest.mark.parametrize("script", ["panda", "camelyon16", "camelyon17", "tcga_lung", "custom"])
def test_the_launchers_are_protocols(script):
    assert any(f"launch/train_{script}.py" in line for _, line in command_lines())
    dataset = {"tcga_lung": "tcga"}.get(script, script)
    source = (ROOT / "launch" / f"train_{script}.py").read_text("utf-8")
    assert f'main(["protocol", "{dataset}", *sys.argv[1:]], ends_process=True)' in source


# --- all blocks, names and messages ---


def test_every_block_of_code_has_a_name_or_a_reason():
    assert unnamed(blocks()) == []
    names = [one.name for one in blocks() if one.name]
    assert sorted(names) == sorted([*CHECKS, *SHELL, "accelerate", "own code", "python", "section"]), (
        "a name twice, or one that no test runs"
    )
    fences = sum(len(re.findall(r"^ *```\w*$", page.read_text("utf-8"), re.M)) for page in PAGES)
    assert fences == 2 * len(blocks()), "a fence is indented, or not closed"


def test_every_block_is_of_a_language_that_is_looked_at():
    assert {one.language for one in blocks()} <= {*LANGUAGES, *OTHERS}


def test_what_reasons_name_exists():
    named = [path for one in blocks() for path in re.findall(r"\b(?:tests|launch)/[\w/]+(?:\.py)?", one.reason)]
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("comment", ["", "code: ", "not run: ", "ran: it"])
def test_a_block_without_a_name_is_seen(comment):
    wrong = Block("docs/x.md", comment, "bash", "ds-wsi train")
    assert unnamed([wrong, *blocks()]) == [wrong]


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/reference/api.md").read_text("utf-8")
    shown = re.findall(r"^::: ds_wsi\.(\w+)$", page, re.M)
    assert sorted(shown) == sorted(ds_wsi.__all__)


def test_the_section_is_accepted():
    assert read_section(json.loads(block("section").text)["ds_wsi"]).reading.workers == 4


def test_readme_is_a_door():
    assert len(README.splitlines()) <= 200
    first_screen = "\n".join(README.splitlines()[:25])
    assert "Apache-2.0" in first_screen
    assert "CITATION.cff" in first_screen
    assert "## Which part do I need" in "\n".join(README.splitlines()[:60])


def test_links_of_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_messages_of_troubleshooting_are_the_codes():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^```text\n(.*?)\n```$", page, re.M | re.S)
    assert len(messages) > 30
    patterns = [re.compile(template, re.S) for template in templates()]
    # Lists of values are joined to some messages; where there is a hint, the whole is one template.
    unknown = [
        message
        for message in messages
        if not any(one.fullmatch(message) or ("HINT" not in message and one.match(message)) for one in patterns)
    ]
    assert unknown == []
