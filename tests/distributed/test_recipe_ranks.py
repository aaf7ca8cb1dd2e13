"""A vision transformer with H-optimus's layout, tuned by the recipe at ZeRO-2 on two processes, in bounded memory."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from slide_files import write_slide

from ds_wsi.cli import main
from harness import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TILE, SIDE, WIDTH, DEPTH = 56, 16, 96, 8  # 256 tiles per slide
LAYOUT = {
    **{"img_size": TILE, "patch_size": 14, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "reg_tokens": 4},
    **{"mlp_ratio": 5.33334, "init_values": 1e-5, "no_embed_class": True},
}
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
# Of a tile, kept by a plain forward: per token and block at least its norms, qkv, attention's and SwiGLU's values.
KEPT_BYTES = DEPTH * (16 + 5) * WIDTH * 4 * 20
STAGE2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
}


def write_all(folder):
    """Six slides, an encoder as timm saves it, ZeRO-2's JSON, and the teacher's features."""
    random = np.random.default_rng(0)
    rows = [("slide_id", "path", "label", "split")]
    for number in range(6):
        pixels = random.integers(60, 200, (SIDE * TILE, SIDE * TILE, 3)).astype(np.uint8)
        pixels[..., number % 2] //= 2
        split = ("train", "train", "train", "train", "validation", "test")[number]
        rows.append((f"s{number}", write_slide(folder / f"s{number}.tiff", pixels, mpp=0.5), "ab"[number % 2], split))
    with (folder / "cohort.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    torch.manual_seed(0)
    mlp = getattr(timm.layers, SWIGLU["mlp_layer"])
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **LAYOUT, **{**SWIGLU, "mlp_layer": mlp})
    (folder / "encoder").mkdir()
    save_file(encoder.state_dict(), folder / "encoder" / "model.safetensors")
    statistics = {"mean": [0.707223, 0.578729, 0.703617], "std": [0.211883, 0.230117, 0.177517]}
    about = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {**LAYOUT, **SWIGLU},
        "pretrained_cfg": {"input_size": [3, TILE, TILE], "num_classes": 0, **statistics},
    }
    (folder / "encoder" / "config.json").write_text(json.dumps(about))
    (folder / "zero2.json").write_text(json.dumps(STAGE2))
    assert command("features", folder, "--output_dir", folder / "frozen", "--device", "cpu") == 0


def command(name, folder, *more):
    options = ("--encoder", f"local-dir:{folder / 'encoder'}", "--manifest", folder / "cohort.csv")
    options += ("--tile_size_px", TILE, "--mpp", 0.5, "--tissue", "none", "--dataloader_num_workers", 0)
    return main([name, *map(str, (*options, *more))])


def on_ranks(folder):
    options = ("--recipe", "finetune", "--distill", folder / "frozen", "--num_train_epochs", 2, "--learning_rate", 2e-3)
    options += ("--encoder_learning_rate", 1e-3, "--deepspeed", folder / "zero2.json", "--output_dir", folder / "run")
    assert command("train", folder, *options, "--partition", "recompute", "--partition_chunk_size", 4) == 0


def test_the_recipe_at_zero2_with_a_partition_on_two_processes(tmp_path):
    write_all(tmp_path)
    run_ranks(on_ranks, 2, tmp_path)
    resting, trained = json.loads((tmp_path / "run" / "history.json").read_text())
    assert np.isfinite([resting["train_loss"], trained["train_loss"]]).all()
    assert trained["distill_loss"] > 100 * resting["distill_loss"], "an encoder that is trained moves"
    log = (tmp_path / "run" / "train.log").read_text()
    for words in ("DeepSpeed ZeRO stage 2", "2 processes", "after 1 frozen epochs", "layers of the encoder, at"):
        assert words in log
    added = trained["peak_memory_bytes"] - resting["peak_memory_bytes"]
    assert added < SIDE * SIDE * KEPT_BYTES / 2, "the activations of a bag must never be there together"
