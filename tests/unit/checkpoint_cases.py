"""Checkpoints written for tests of their files, and what is logged of them."""

import torch

from ds_wsi.training.checkpoint import Contents, save_checkpoint, seal
from ds_wsi.training.saver import Saver


def write_checkpoint(folder):
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    (folder / "shards" / "rank_0.pt").write_bytes(b"optimizer" * 100)
    (folder / "state.json").write_text('{"step": 7}')
    (folder / "empty").touch()
    seal(folder)
    return folder


def flip_byte(path, place=100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


class OneProcess:
    """What `save_checkpoint` needs of an Accelerator."""

    is_main_process, num_processes, process_index = True, 1, 0


def save_one(saver, folder, step):
    saver.make_room()
    shared, own_files = {"model.safetensors": {"w": torch.ones(2)}}, {"own.safetensors": {"x": torch.arange(3)}}
    save_checkpoint(saver, OneProcess(), folder, step, Contents({}, shared, own_files), 2)


def save(folder, step):
    with Saver() as saver:
        save_one(saver, folder, step)
