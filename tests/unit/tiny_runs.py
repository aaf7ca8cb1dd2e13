"""Runs of a second on features: what the tests of folders and of going on share."""

import csv
import hashlib
import os
import stat
from pathlib import Path

import torch
from safetensors.torch import save_file

from ds_wsi.cli import main

SLIDES = tuple(f"s{number:02d}" for number in range(12))


def rows_of(n_train=6, n_validation=4):
    """(slide_id, label, split): two classes, in turn."""
    splits = ["train"] * n_train + ["validation"] * n_validation
    return [(name, ("normal", "tumor")[k % 2], (splits + ["test"] * 12)[k]) for k, name in enumerate(SLIDES)]


def write_table(path, rows, columns=("slide_id", "label", "split")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_cohort(folder, rows=None):
    """features/ and m.csv."""
    (folder / "features").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(SLIDES):
        features = torch.randn(5 + number, 8, generator=generator) + number % 2
        save_file({"features": features}, folder / "features" / f"{name}.safetensors")
    write_table(folder / "m.csv", rows or rows_of())
    return folder


def train(folder, output, *more, epochs=2):
    """The exit status of `ds-wsi train` on the folder's cohort."""
    options = ("--features_dir", folder / "features", "--manifest", folder / "m.csv", "--output_dir", output)
    options += ("--aggregator", "abmil", "--num_train_epochs", epochs, "--dataloader_num_workers", 0)
    return main(["train", *map(str, (*options, *more))])


def evaluate(folder, model, output, *more):
    """The exit status of `ds-wsi evaluate` on the folder's cohort."""
    options = ("--features_dir", folder / "features", "--manifest", folder / "m.csv", "--output_dir", output)
    options += ("--model", model, "--dataloader_num_workers", 0, "--device", "cpu")
    return main(["evaluate", *map(str, (*options, *more))])


def listing(folder, without=()):
    """Path -> all that is known of each entry below a folder, symbolic links not followed."""
    entries = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_relative_to(folder) and path.relative_to(folder).parts[0] in without:
                continue
            state = path.lstat()
            kind = stat.S_IFMT(state.st_mode)
            if stat.S_ISLNK(kind):
                content = os.readlink(path)
            else:
                content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            time_ns = 0 if stat.S_ISDIR(kind) else state.st_mtime_ns
            entries[str(path)] = (state.st_mode, content, time_ns)
    return entries
