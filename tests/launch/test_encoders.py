"""The main job with an encoder from a folder, adapters in it, epochs without it and every augmentation."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ds_wsi.models import load_model
from runs import run, train_arguments

pytestmark = pytest.mark.launch
OPTIONS = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}


def test_adapters_in_a_model_of_a_folder_are_merged_on_export(demo_manifest, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(5)
    base, folder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **OPTIONS), tmp_path / "hub"
    folder.mkdir()
    save_file(base.state_dict(), folder / "model.safetensors")
    pretrained = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2], "input_size": [3, 64, 64], "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": OPTIONS, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    augment = "--augment_rotation 20 --augment_stain 0.05 --augment_brightness 0.1 --augment_hue 0.02 --augment_blur 1"
    options = f"--encoder local-dir:{folder} --encoder_features cls_mean --lora_rank 4 --freeze_encoder_epochs 1"
    output = tmp_path / "run"
    more = [*options.split(), *augment.split(), "--learning_rate", "0.01", "--save_total_limit", "9"]
    printed = run(["python", "launch/train.py", *train_arguments(demo_manifest, output), *more])
    assert "96 features per tile (cls_mean), normalised with mean (0.7, 0.6, 0.7)" in printed
    model, slide_config = load_model(output)
    assert (slide_config.encoder, slide_config.encoder_options, slide_config.mean) == (
        "vit_tiny_patch16_224",
        OPTIONS,
        (0.7, 0.6, 0.7),
    )
    assert model.encoder.state_dict().keys() == base.state_dict().keys()
    first, last = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8))
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert {name for name in changed if name.startswith("encoder.")} == {name for name in last if "lora_" in name}
    # The first epoch trained the aggregator alone: adapters begin at zero.
    assert all(not value.any() for name, value in first.items() if "lora_B" in name)
    assert any(name.startswith("aggregator.") for name in changed)
    history = json.loads((output / "history.json").read_text())
    assert len(history) == 2
