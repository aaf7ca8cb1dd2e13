"""Several processes share a cohort: who begins where, what is refused, each slide once, the same bytes, one summary."""

import argparse
import csv
import multiprocessing
import os
import random
import signal
from dataclasses import asdict
from multiprocessing.connection import wait

import pytest
import torch

from ds_wsi.bags import cohort as cohort_module
from ds_wsi.bags import packing
from ds_wsi.bags.shards import SummaryFile, own_items, shard_order
from ds_wsi.cli import main
from ds_wsi.commands import cohort as cohort_options
from ds_wsi.evaluation import extract, heatmap, slide_maps
from ds_wsi.evaluation.parts import Parts
from ds_wsi.models import ModelConfig, build_model, resolve_encoder
from ds_wsi.models.config import save_model
from ds_wsi.runtime.environment import command_line
from ds_wsi.runtime.shards import ALONE, Shard, local_index, parse_shard, shard_of
from ds_wsi.slides import masks
from ds_wsi.slides.policy import TilingPolicy

FORK = multiprocessing.get_context("fork")
RANKS = {"RANK": "2", "WORLD_SIZE": "4"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, "1/1"),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, "1/1"),
        (None, {"WORLD_SIZE": "1"}, "1/1"),
        (None, RANKS, "3/4"),
        (None, STEP, "2/2"),
        (None, {**STEP, "SLURM_STEP_ID": "0", **RANKS}, "3/4"),  # torchrun on each of two machines
        (None, {name: text for name, text in STEP.items() if name != "SLURM_STEP_ID"}, "1/1"),  # a batch script's own
        (None, ARRAY, "4/4"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, "1/4"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "1"}, "1/4"),  # 1,3,7,9: gaps
        (None, {**ARRAY, **STEP}, "8/8"),
        (None, {**ARRAY, **RANKS}, "15/16"),
        ("2/3", {}, "2/3"),
        ("2/3", ARRAY, "2/3"),  # an array may number something else
        ("3/4", RANKS, "3/4"),
        ("1/4", RANKS, "--shard must say what the launcher says to each process, 3/4 (RANK, WORLD_SIZE), got 1/4"),
        ("1/2", STEP, "2/2 (SLURM_PROCID, SLURM_NTASKS), got 1/2"),
        (None, {"RANK": "4", "WORLD_SIZE": "4"}, "RANK must be a number below WORLD_SIZE, got 4 and 4"),
        (None, {"WORLD_SIZE": "4"}, "RANK must be a number below WORLD_SIZE, got none and 4"),
        (None, {"RANK": "1"}, "got 1 and none"),
        (None, {**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID must be a number below SLURM_NTASKS, got x and 2"),
        (None, {**RANKS, **STEP, "SLURM_NTASKS": "3"}, "WORLD_SIZE must be a multiple of SLURM_NTASKS, got 4 and 3"),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "0"}, "SLURM_ARRAY_TASK_ID must be a task of its array"),
        (None, {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT=none"),
    ],
)
def test_the_shard_is_the_options_else_the_launchers_and_contradictions_are_named(given, environ, expected):
    shard = None if given is None else parse_shard(given)
    if expected[0].isdigit() and "(" not in expected:
        assert str(shard_of(shard, environ)) == expected
    else:
        with pytest.raises(ValueError, match="HINT") as caught:
            shard_of(shard, environ)
        assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/b", "-1/4", "1/"])
def test_what_names_no_shard_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be I/N .*got"):
        parse_shard(text)


def test_each_begins_with_its_own_and_all_reach_all():
    costs = [3, 90, 5, 5, 40, 8, 60, 1, 1, 30]
    assert shard_order(costs, ALONE) == list(range(10))
    orders = [shard_order(costs, Shard(index, 3)) for index in range(3)]
    dealt = [own_items(costs, Shard(index, 3)) for index in range(3)]
    assert sorted(item for items in dealt for item in items) == list(range(10))
    for order, items in zip(orders, dealt, strict=True):
        assert sorted(order) == list(range(10))
        assert set(order[: len(items)]) == items
        begun = [costs[item] for item in order[: len(items)]]
        assert begun == sorted(begun, reverse=True)
    assert max(sum(costs[item] for item in items) for items in dealt) == 90  # the largest has a shard of its own
    assert orders[0][len(dealt[0])] == min(dealt[1], key=lambda item: costs[item])  # of others the cheap end


def test_a_process_takes_its_machines_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    options = argparse.Namespace(device=None)
    for count, environ, expected in (  # noqa: B007 (device_count reads it)
        (4, {"LOCAL_RANK": "3"}, "cuda:3"),
        (2, {"LOCAL_RANK": "3"}, "cuda:1"),
        (4, {"SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}, "cuda:2"),
        (4, {"SLURM_LOCALID": "2"}, "cuda:0"),
        (1, {"LOCAL_RANK": "3"}, "cuda"),  # Slurm shows the task its own alone
    ):
        monkeypatch.setattr(cohort_options, "local_index", lambda environ=environ: local_index(environ))
        assert str(cohort_options.device_of(options)) == expected
    assert chosen == ["cuda:3", "cuda:1", "cuda:2", "cuda:0"]
    options.device = "cuda:1"
    count = 2
    assert str(cohort_options.device_of(options)) == "cuda:1"


def test_a_command_is_told_without_what_says_which_process_it_is(monkeypatch):
    words = ["ds-wsi", "evaluate", "--shard", "2/4", "--model", "m", "--local_rank=3", "--split", "all"]
    monkeypatch.setattr("sys.argv", words)
    assert command_line() == "ds-wsi evaluate --model m --split all"


def test_a_table_of_the_users_is_not_written_over(tmp_path):
    (tmp_path / "features_summary.csv").write_text("theirs\n")
    with pytest.raises(ValueError, match=r"must not hold files of other programs .*features_summary.csv"):
        SummaryFile(tmp_path / "features_summary.csv", ("slide_id", "n_rows"))


# ------------------------------------------------------------------------------------------- whole commands

LEFT_DEAD = 3  # of the shards 0 to 3: its slides are done by the others


def _name_of_png(thumbnail, coords, side, attention, downsample, path, *rest):
    return f"{path.parent.name}/{path.stem}"


WORK = (  # what is done once per slide, where, and which slide it is
    ("tile", cohort_module, "write_grid", lambda grid, *rest: grid.slide_id),
    ("mask", masks, "write_mask", lambda path, *rest: path.stem),
    ("pack", packing, "pack_slide", lambda slide, grid, *rest: grid.slide_id),
    ("features", extract, "write_features", lambda path, *rest: path.stem),
    ("predict", Parts, "write", lambda parts, prediction: parts.path(prediction.slide).stem),
    ("draw", slide_maps, "draw_attention", _name_of_png),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported model of random weights."""
    source, tiling = resolve_encoder("resnet10t"), asdict(TilingPolicy(tile_size_px=64))
    config = ModelConfig.of_source(source, "gated_abmil", ("normal", "tumor"), tiling)
    torch.manual_seed(0)
    save_model(folder := tmp_path_factory.mktemp("model"), config, build_model(config).state_dict())
    return folder


def commands(root, manifest, model):
    """The command lines, each with the folder that it writes."""
    tiles = ["--tiles_dir", root / "tiles", "--dataloader_num_workers", 0, "--device", "cpu"]
    slides = ["--manifest", manifest]
    size = ["--tile_size_px", 64]
    packed = ["--store", root / "store", "--export", "clam", "--export_masks", root / "masks"]
    lines = [
        ["tile", *slides, *size, "--output_dir", root / "tiles", *packed],
        ["features", *slides, *size, "--encoder", "resnet10t", "--output_dir", root / "features", *tiles],
        ["evaluate", *slides, "--model", model, "--split", "all", "--output_dir", root / "evaluated", *tiles],
        ["heatmap", *slides, "--model", model, "--output_dir", root / "maps", *tiles],
    ]
    return [[str(word) for word in line] for line in lines]


def run_all(lines, log, environ, dies_at=0, dies_after=False, together=None):
    """All commands; the process kills itself at its n-th piece of work, before or after it is written."""
    os.environ.update(environ)
    begun = [0]
    if together is not None:
        together.wait(120)

    def watched(kind, real, name_of):
        def work(*args, **options):
            if begun[0] + 1 == dies_at and not dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if result is False:  # the slide was packed already
                return result
            begun[0] += 1
            os.write(log, f"{kind} {name_of(*args)} {os.getpid()}\n".encode())
            if begun[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return work

    for kind, module, name, name_of in WORK:
        setattr(module, name, watched(kind, getattr(module, name), name_of))
    os._exit(max(main(line) for line in lines))


def start(lines, log, shard, draw, life, together=None):
    """A shard's process: the even ones are told by the option, the odd ones by a Slurm array."""
    array = ARRAY | {"SLURM_ARRAY_TASK_ID": str(1 + 2 * shard)}
    environ, more = (array, []) if shard % 2 else ({}, ["--shard", f"{shard + 1}/4"])
    dies_at = 1 if shard == LEFT_DEAD else draw.randint(2, 9) if life < 2 else 0
    given = [[*line, *more] for line in lines]
    process = FORK.Process(target=run_all, args=(given, log, environ, dies_at, draw.random() < 0.5, together))
    process.start()
    return process


def test_shards_that_are_killed_and_started_again_do_each_slide_once_and_write_the_bytes_of_one(
    demo_manifest, model, tmp_path, monkeypatch, capfd
):
    head, *rows = demo_manifest.read_text().splitlines()
    manifest = demo_manifest.with_name("five.csv")
    manifest.write_text("\n".join([head, *rows[:5]]) + "\n")
    names = [row["slide_id"] for row in csv.DictReader(manifest.open(newline=""))]
    monkeypatch.setattr(heatmap, "DPI", 20)  # a part of the time
    torch.set_num_threads(1)
    # The folders of the results have one path, which CLAM's files hold.
    folder, alone = tmp_path / "work", tmp_path / "alone"
    lines = commands(folder, manifest, model)
    assert [main(line) for line in lines] == [0] * len(lines)
    folder.rename(alone)
    capfd.readouterr()
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    draw = random.Random(4)
    together = FORK.Barrier(4)
    lives = {shard: start(lines, log, shard, draw, 0, together) for shard in range(4)}
    deaths = dict.fromkeys(range(4), 0)
    while lives:
        assert wait([process.sentinel for process in lives.values()], 240), "a shard waits for ever"
        for shard, process in list(lives.items()):
            process.join(0)
            if process.exitcode is None:
                continue
            del lives[shard]
            if process.exitcode == -signal.SIGKILL:
                deaths[shard] += 1
                if shard != LEFT_DEAD:
                    lives[shard] = start(lines, log, shard, draw, deaths[shard])
            else:
                assert process.exitcode == 0, capfd.readouterr().err
    assert deaths[LEFT_DEAD] == 1
    assert sum(deaths.values()) >= 3
    done = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    kinds = [("tile", ""), ("mask", ""), ("pack", ""), ("features", ""), ("predict", "")]
    kinds += [("draw", "heatmaps/"), ("draw", "maps/")]
    expected = sorted((kind, f"{prefix}{name}") for kind, prefix in kinds for name in names)
    assert sorted((kind, name) for kind, name, _ in done) == expected, "a slide was left out, or done twice"
    assert len({pid for *_, pid in done}) >= 4, "too few processes took part: the test proved nothing"
    sharded, of_one = contents(folder), contents(alone)
    assert sharded.keys() == of_one.keys()
    assert [name for name in of_one if sharded[name] != of_one[name]] == []
    assert {"features/features_summary.csv", "store/store_summary.csv", "tiles/tile_summary.csv"} <= of_one.keys()
    assert capfd.readouterr().out.count("metrics of 5 slides of all splits") == 1


def test_slides_that_are_tiled_anew_with_another_policy_are_done_once(demo_manifest, tmp_path):
    """The files are there and are not kept: which process takes a slide is still a matter of its lock."""
    line = ["tile", "--manifest", str(demo_manifest), "--output_dir", str(tmp_path / "tiles"), "--tile_size_px"]
    assert main([*line, "64"]) == 0
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    processes = [FORK.Process(target=run_all, args=([[*line, "32"]], log, {})) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    done = sorted(line.split()[1] for line in (tmp_path / "log").read_text().splitlines())
    assert done == [f"demo_{number:03}" for number in range(8)]


def contents(folder):
    """Name -> bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
