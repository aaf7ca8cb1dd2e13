import copy
import json

import pytest
import torch
from torch import nn

from ds_wsi.engines.accelerator.engine import average_buffers
from ds_wsi.engines.deepspeed_json.config import fill_auto, read_config, suit_machine
from ds_wsi.engines.sharded.zero import full_state_dict

VALUES = {
    "train_batch_size": 8,
    "gradient_clipping": 0.0,
    "optimizer.params.lr": 3e-4,
    "optimizer.params.weight_decay": 1e-4,
    "bf16.enabled": False,
}


def test_auto_is_replaced_and_what_is_absent_filled():
    config = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}
    before = copy.deepcopy(config)
    assert fill_auto(config, VALUES) == {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
    }
    assert config == before


def test_sections_are_filled_only_where_they_are():
    config = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99]}}, "bf16": {}}
    filled = fill_auto(config, VALUES)
    assert filled["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 3e-4, "weight_decay": 1e-4, "betas": [0.9, 0.99]},
    }
    assert filled["bf16"] == {"enabled": False}
    assert fill_auto({"optimizer": {"type": "Adam"}}, VALUES)["optimizer"]["params"]["lr"] == 3e-4
    assert "optimizer" not in fill_auto({}, VALUES)


def test_the_same_value_is_no_contradiction():
    config = {"train_batch_size": 8, "gradient_clipping": 0, "optimizer": {"params": {"lr": 0.0003}}}
    assert fill_auto(config, VALUES)["optimizer"]["params"]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 16}, r"^train_batch_size .*the run's value, 8, got 16.*HINT"),
        ({"optimizer": {"params": {"lr": 0.1}}}, r"^optimizer\.params\.lr .*0\.0003, got 0\.1"),
        ({"bf16": {"enabled": True}}, r"^bf16\.enabled .*False, got True"),
        ({"gradient_clipping": None}, r"^gradient_clipping .*0\.0, got None"),
    ],
)
def test_a_contradiction_names_the_key_and_both_values(config, message):
    with pytest.raises(ValueError, match=message):
        fill_auto(config, VALUES)


def test_a_config_is_read_with_every_key(tmp_path):
    config = {"zero_optimization": {"stage": 1}, "ds_wsi": {"tiling": {"tile_size_px": 64}}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "ds.json") == config
    assert read_config(str(tmp_path / "ds.json")) == config


def test_what_is_no_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"got .*none\.json \(missing\).*HINT: check --deepspeed"):
        read_config(tmp_path / "none.json")
    with pytest.raises(ValueError, match="missing"):
        read_config(tmp_path)
    path = tmp_path / "ds.json"
    path.write_text('{\n  "train_batch_size": 8\n  "bf16": {}\n}')
    with pytest.raises(ValueError, match=r"must be JSON, got .*ds\.json, line 3, column 3"):
        read_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got list"):
        read_config(path)


def test_full_state_is_float32_copies_under_the_modules_names():
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(2, 3).to(torch.bfloat16), nn.BatchNorm1d(3))
    state = full_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert state["0.weight"].dtype == torch.float32
    assert state["1.num_batches_tracked"].dtype == torch.int64
    state["1.weight"].zero_()
    assert model[1].weight.sum() == 3


def test_running_statistics_are_averaged_and_constants_left_alone():
    """The results are those of two ranks' values together: means 0 and 2, variances 1 and 1 pool to 1 and 2."""

    class Ranks:
        num_processes = 2

        def reduce(self, tensor, reduction):
            assert reduction == "mean"
            other = {0.0: 2.0, 2.0: 2.0}  # the other rank's mean, and its variance with its mean's distance
            return torch.tensor([(value + other[value]) / 2 for value in tensor.tolist()])

    module = nn.Sequential(nn.Identity(), nn.BatchNorm1d(2))
    module[0].register_buffer("mean", torch.tensor([0.485]), persistent=False)
    average_buffers(Ranks(), module)
    assert module[0].mean.equal(torch.tensor([0.485]))
    assert module[1].running_mean.equal(torch.ones(2))
    assert module[1].running_var.equal(torch.full((2,), 2.0))
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("zero_optimization.stage", value) for value in ("x", [1], {}, True, None, 4, -1, float("nan"), 10**20)),
        *(("optimizer.type", value) for value in (float("nan"), 1, [1], {}, True)),
        *((key, value) for key in ("optimizer", "zero_optimization", "optimizer.params", "fp16") for value in (3, [1])),
        ("zero_optimization.offload_optimizer", "cpu"),
        ("zero_optimization.reduce_bucket_size", [1]),
    ],
)
def test_a_value_of_another_kind_is_named(key, value, tmp_path):
    """These keys are looked into before DeepSpeed reads them."""
    for name in reversed(key.split(".")):
        value = {name: value}
    (tmp_path / "ds.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"^{key} of the DeepSpeed config must be"):
        read_config(tmp_path / "ds.json")
    with pytest.raises(ValueError, match=rf"^{key} of the DeepSpeed config must be"):
        suit_machine(value)
