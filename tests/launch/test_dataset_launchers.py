"""Each dataset's script under a real launcher, on its cohort in miniature: from the official files to a table.

Two processes each, two runs one after the other in the same processes under DDP and under DeepSpeed.
"""

import json
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from miniatures import CAMELYON16, PANDA, TCGA, camelyon16, camelyon17, custom, draw, panda, table, tcga, touch
from runs import ROOT, run

pytestmark = pytest.mark.launch
SMALL = "--tile_size_px 32 --encoder resnet10t --num_train_epochs 1 --tiles_per_slide 4 --dataloader_num_workers 0"
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]
MORE_PANDA = [(f"{n:032x}", "radboud", str(n % 3), "3+3" if n % 3 else "negative") for n in range(4)]


def make_panda(root):
    """PANDA with a split as PANTHER publishes it."""
    panda(root, rows=[*PANDA, *MORE_PANDA])
    touch(root, *(f"train_images/{row[0]}.tiff" for row in MORE_PANDA))
    draw(root, mpp=0.486)
    names = [row[0] for row in [*PANDA, *MORE_PANDA]]
    for name, listed in (("train", names[:5]), ("val", names[5:7]), ("test", names[7:])):
        table(root / "split" / f"{name}.csv", ("slide_id",), [(slide,) for slide in listed])
    return ["--split_file", str(root / "split"), "--seeds", "2"]


def make_camelyon16(root):
    draw(camelyon16(root), mpp=0.243)
    return ["--validation_fraction", "0.4", "--seeds", "1", "--preset", "camelyon16_frozen"]


def make_camelyon17(root):
    """CAMELYON17 with the test patients, whose labels the corrections bring."""
    touch(camelyon17(root), *(f"testing/patients/patient_10{n}/patient_10{n}_node_{n}.tif" for n in (1, 2)))
    rows = [("patient_101_node_1.tif", "macro"), ("patient_102_node_2.tif", "negative")]
    corrections = table(root / "plus.csv", ("slide", "stage"), rows)
    draw(root, mpp=0.243)
    return ["--corrections", str(corrections), "--validation_fraction", "0.4", "--seeds", "2"]


def make_tcga(root):
    more = [
        (f"TCGA-55-000{n}", ("adenocarcinoma", "squamous")[n % 2], "Site-1", f"TCGA-55-000{n}-01Z-00-DX1.{n}")
        for n in range(2)
    ]
    tcga(root, rows=[*TCGA, *more])
    draw(touch(root, *(f"downloads/{row[3]}.svs" for row in more)), mpp=0.25)
    return ["--labels", str(root / "labels.csv"), "--folds", "2", "--validation_fraction", "0", "--seeds", "1"]


def make_custom(root):
    draw(custom(root))
    columns = ["--slide_column", "image", "--label_column", "egfr", "--patient_column", "case"]
    return [
        "--labels",
        str(root / "mutations.csv"),
        *columns,
        "--preset",
        "breast",
        "--folds",
        "2",
        "--validation_fraction",
        "0",
    ]


# Script, what makes its cohort, launcher, the runs' names, and some of the preset's values in a run's settings.
CASES = {
    "panda": (
        *(make_panda, TORCHRUN, ["published0_seed0", "published0_seed1"]),
        {"tiling.tissue": "grey", "stacking.bags_per_step": 32, "optim.optim": "adam"},
    ),
    "camelyon16": (
        make_camelyon16,
        ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "accelerate" / "zero3.yaml")],
        ["official_seed0"],
        {"model.freeze_encoder": True, "tiling.tissue": "otsu"},
    ),
    "camelyon17": (
        *(make_camelyon17, ["deepspeed", "--num_gpus", "2"], ["official_seed0", "official_seed1"]),
        {"optim.demon": 0.9, "optim.optim": "adam", "data.classes": ["normal", "tumor"]},
    ),
    "custom": (
        *(make_custom, TORCHRUN, ["fold0_seed0", "fold1_seed0"]),
        {"model.aggregator": "gated_abmil", "model.freeze_encoder_epochs": 0, "stacking.bags_per_step": 1},
    ),
    "tcga_lung": (make_tcga, TORCHRUN, ["fold0_seed0", "fold1_seed0"], {"run.metric_for_best_model": "auc"}),
}


@pytest.mark.parametrize("name", CASES)
def test_from_the_official_files_to_a_table(name, tmp_path):
    make, launcher, runs, expected = CASES[name]
    options = ["--data_dir", str(tmp_path / "data"), *make(tmp_path / "data"), *SMALL.split()]
    if launcher[0] == "deepspeed":
        options += ["--deepspeed", str(ROOT / "ds_configs" / "papers.json")]
    printed = run([*launcher, f"launch/train_{name}.py", *options, "--output_dir", str(tmp_path / "out")])
    assert {"deepspeed": "ZeRO stage 2", "accelerate": "ZeRO stage 3", "torchrun": "DDP (gloo)"}[launcher[0]] in printed
    assert "2 processes, CPU" in printed
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.strip() in printed
    assert f"| resnet10t + {'gated_abmil' if name == 'custom' else 'abmil'} |" in text
    assert "unfinished" not in text
    for number, folder in enumerate(tmp_path / "out" / each for each in runs):
        assert (folder / "report.html").stat().st_size > 1000
        record = json.loads((folder / "run.json").read_text())
        assert f"{record['split']}_seed{record['seed']}" == runs[number]
        begun = json.loads((folder / "protocol.json").read_text())
        assert {key: begun[key] for key in expected} == expected
        assert begun["optim.num_train_epochs"] == 1
    if name == "camelyon16":
        assert len(CAMELYON16) == sum(1 for _ in (tmp_path / "out" / "tiles").iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_configurations_load(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == "no"
    expected = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == expected[path.stem]
    if config.distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_the_slurm_script_parses_and_asks_for_a_script():
    script = str(ROOT / "launch" / "slurm" / "train.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
