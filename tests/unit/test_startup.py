"""What a command imports, and when: libraries that take seconds are imported where they are used."""

import os
import subprocess
import sys
from pathlib import Path

from ds_wsi.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HELP = """
import sys
from ds_wsi.cli import main
for command in {commands}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
    heavy = [name for name in {heavy} if name in sys.modules]
    assert not heavy, f"{{command}} --help imports {{heavy}}"
"""
FEATURES = """
import sys
from pathlib import Path
from ds_wsi.cli import main
from ds_wsi.slides.demo import DemoPolicy, make_demo
folder = Path(sys.argv[1])
table = make_demo(folder / "demo", DemoPolicy(train=2, validation=2, test=2, min_side_px=352, max_side_px=352))
line = ["--manifest", str(table), "--encoder", "resnet10t", "--tile_size_px", "64", "--dataloader_num_workers", "0"]
assert main(["features", *line, "--output_dir", str(folder / "features")]) == 0
heavy = [name for name in {heavy} if name in sys.modules]
assert not heavy, heavy
"""
TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/unit")
from tiny_runs import train, write_cohort
import ds_wsi.training.loop
early = [name for name in {early} if name in sys.modules]
assert not early, f"before a run is prepared: {{early}}"
folder = write_cohort(Path(sys.argv[1]) / "cohort")
assert train(folder, folder / "run", epochs=1) == 0
heavy = [name for name in {heavy} if name in sys.modules]
assert not heavy, heavy
"""
ENGINES = ("deepspeed", "accelerate", "transformers", "datasets", "evaluate")
PLOTS = ("matplotlib", "sklearn", "tensorboard", "pandas")


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_commands_help_imports_torch_or_what_needs_it():
    heavy = ("torch", "torchvision", "timm", "scipy", "h5py", *ENGINES, *PLOTS)
    run(HELP.format(commands=tuple(COMMANDS), heavy=heavy))


def test_features_are_written_without_engines_and_plots(tmp_path):
    run(FEATURES.format(heavy=(*ENGINES, *PLOTS)), tmp_path)


def test_a_training_imports_what_it_uses_when_it_does(tmp_path):
    early = ("deepspeed", "transformers", "datasets", "evaluate", *PLOTS)
    run(TRAIN.format(early=early, heavy=("deepspeed", "transformers", "datasets", "evaluate")), tmp_path)
