"""Many files in the way of `ds-wsi features` are told by their kind."""

import pytest
import torch

from ds_wsi.bags.features import write_features
from ds_wsi.evaluation.extract import _kept


def about(name, encoder="resnet18 with weights 00000001", tiles="4 at coords 0a0b0c0d, {}"):
    return {"slide_id": name, "encoder": encoder, "mean_and_std": "(0.5,), (0.5,)", "tiles": tiles}


def test_a_thousand_files_of_another_encoder_are_one_line(tmp_path):
    names = [f"slide-{chr(97 + number % 26)}-{number}" for number in range(40)]
    for name in names[:20]:
        write_features(tmp_path / f"{name}.safetensors", torch.ones(4, 2), torch.zeros(4, 2), 1.0, about(name))
    for name in names[20:30]:
        (tmp_path / f"{name}.h5").write_bytes(b"theirs")
    for name in names[30:]:
        other = about(name, tiles=f"{len(name)} at coords {hash(name) % 99}, {{}}")
        write_features(tmp_path / f"{name}.safetensors", torch.ones(4, 2), torch.zeros(4, 2), 1.0, other)
    records = [about(name, "resnet50 with weights 00000002") for name in names[:30]] + [about(n) for n in names[30:]]
    with pytest.raises(ValueError, match="got 40 other files") as caught:
        _kept(tmp_path, records)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(lines) == 3, lines
    assert "20 times: encoder must be resnet50 with weights 00000002, got resnet18 with weights 00000001 (" in lines[0]
    assert "and 15 more" in lines[0]
    assert "10 times: features must be a file that `ds-wsi features` wrote, got another (" in lines[1]
    assert "10 times: tiles must be this command's, got " in lines[2]
