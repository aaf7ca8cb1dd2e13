"""What takes the place of "auto" in a DeepSpeed JSON, what a precision in it means, and hooks on one process."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ds_wsi
from ds_wsi.compression.comm import CommPolicy
from ds_wsi.engines.accelerator import engine as accelerate
from ds_wsi.engines.accelerator.engine import EngineSettings
from ds_wsi.engines.comm_hooks.register import HOOKS
from ds_wsi.engines.deepspeed_json.auto import BUCKET_SIZE, fill_for_model, fill_rest, hidden_size

PLAIN = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2))


def test_batches_are_what_the_others_leave_to_compute():
    for given, filled in (
        ({}, {"train_micro_batch_size_per_gpu": 1}),
        ({"train_batch_size": "auto"}, {"train_micro_batch_size_per_gpu": 1}),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"},
            {"train_batch_size": 8},
        ),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "train_batch_size": "auto"},
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        ),
    ):
        before = dict(given)
        assert fill_for_model(given, PLAIN) == filled
        assert given == before


def test_the_optimizer_that_is_given_says_its_options():
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": 0.5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    }
    given = torch.optim.Adam(PLAIN.parameters(), lr=0.25, betas=(0.8, 0.9))
    filled = fill_for_model(config, PLAIN, given)
    assert filled["optimizer"]["params"] == {"lr": 0.25, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.5}
    assert filled["scheduler"]["params"] == {"warmup_min_lr": 0, "warmup_max_lr": 0.25}
    alone = fill_for_model(config, PLAIN)
    assert alone["optimizer"]["params"] == {"lr": 3e-4, "weight_decay": 0.5}
    assert alone["scheduler"]["params"]["warmup_max_lr"] == 3e-4
    later = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"^scheduler\.params\.warmup_max_lr .*must be a value"):
        fill_for_model(config, PLAIN, later)
    del config["scheduler"]
    assert fill_for_model(config, PLAIN, later)["optimizer"]["params"] == {"weight_decay": 0.5}


def test_buckets_follow_from_the_models_size():
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": "auto",
        "offload_param": {"device": "auto"},
    }
    filled = fill_for_model({"train_batch_size": 1, "zero_optimization": zero}, PLAIN)["zero_optimization"]
    assert filled == {
        "stage": 3,
        "reduce_bucket_size": 64,
        "stage3_prefetch_bucket_size": 57,
        "stage3_param_persistence_threshold": 80,
        "offload_param": {"device": "none"},
    }
    convolutions = nn.Sequential(nn.Conv2d(3, 64, 9, bias=False), nn.Flatten(), nn.Linear(10, 2))
    filled = fill_for_model({"train_batch_size": 1, "zero_optimization": zero}, convolutions)["zero_optimization"]
    assert filled["reduce_bucket_size"] == 3 * 64 * 81, "a bucket holds the largest parameter"
    assert fill_rest({"zero_optimization": zero})["zero_optimization"]["reduce_bucket_size"] == BUCKET_SIZE


def test_the_hidden_size_is_the_configurations_where_there_is_one():
    model = nn.Linear(3, 4)
    assert hidden_size(model) == 3
    assert hidden_size(nn.Conv2d(3, 4, 1)) is None
    for config, size in (
        (SimpleNamespace(hidden_size=7), 7),
        (SimpleNamespace(hidden_sizes=[4, 16, 8]), 16),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_size=5)), 5),
    ):
        model.config = config
        assert hidden_size(model) == size
    encoder = ds_wsi.build_encoder("test_resnet")
    slide_model = ds_wsi.SlideModel(encoder, ds_wsi.build_aggregator("mean", encoder.num_features, 2))
    assert hidden_size(slide_model) == encoder.num_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_the_models_own(dtype):
    config = {"train_batch_size": 1, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": "auto"}}
    filled = fill_for_model(config, nn.Linear(2, 2, dtype=dtype))
    assert filled["bf16"] == {"enabled": dtype == torch.bfloat16}
    assert filled["fp16"] == {"enabled": dtype == torch.float16}


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("scheduler.params.total_num_steps", {"scheduler": {"params": {"total_num_steps": "auto"}}}),
        ("zero_optimization.stage", {"zero_optimization": {"stage": "auto"}}),
        ("activation_checkpointing.number", {"activation_checkpointing": {"number": "auto"}}),
        ("steps_per_print", {"steps_per_print": "auto"}),
    ],
)
def test_what_no_rule_fills_is_refused_by_name(key, config):
    for fill in (lambda: fill_for_model(config, PLAIN), lambda: fill_rest(config)):
        with pytest.raises(ValueError, match=rf'^{key} of the DeepSpeed config must be a value, got "auto".*HINT: '):
            fill()


def test_our_own_autos_stay():
    section = {"partition": {"mode": "auto"}, "norm": {"training": "auto"}}
    assert fill_for_model({"train_batch_size": 1, "ds_wsi": section}, PLAIN)["ds_wsi"] == section


def test_what_was_filled_is_said(caplog):
    with caplog.at_level(logging.INFO, "ds_wsi"):
        fill_for_model({"gradient_clipping": "auto", "optimizer": {"params": {"lr": "auto"}}}, PLAIN)
    (words,) = caplog.messages
    assert "train_micro_batch_size_per_gpu = 1" in words
    assert "gradient_clipping: none" in words
    assert "optimizer.params.lr = 0.0003" in words


def use_autocast(config, precision):
    accelerate._use_autocast(config, precision)
    return config


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
class TestPrecisionOfTheJson:
    def test_the_same_as_the_option_is_followed_by_autocast(self, kind, dtype):
        for enabled in (True, "auto"):
            filled = use_autocast({kind: {"enabled": enabled, "loss_scale": 0}}, kind)
            assert filled == {kind: {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": dtype}}

    def test_without_the_option_the_remedy_is_the_option(self, kind, dtype):
        with pytest.raises(ValueError, match=rf"^{kind}\.enabled .*precision, no, got true\. HINT: give --{kind}, or"):
            use_autocast({kind: {"enabled": True}}, "no")
        with pytest.raises(ValueError, match=rf"^{kind}\.enabled .* {kind}, got false\. HINT: leave out --{kind}, or"):
            use_autocast({kind: {"enabled": False}}, kind)
        assert use_autocast({kind: {"enabled": False}}, "no") == {kind: {"enabled": False}}

    def test_another_autocast_is_refused(self, kind, dtype):
        other = "float16" if kind == "bf16" else "bfloat16"
        with pytest.raises(ValueError, match=rf"^torch_autocast .*{kind}, got .*{other}.*HINT: leave the section out"):
            use_autocast({"torch_autocast": {"enabled": True, "dtype": other}}, kind)
        assert use_autocast({"torch_autocast": {"enabled": True, "dtype": dtype}}, kind)["torch_autocast"]["enabled"]


def test_momentum_is_of_sgd():
    settings = EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 1, momentum=0.9)
    with pytest.raises(ValueError, match=r"^--momentum must be given with SGD, got 0\.9 and optimizer\.type AdamW"):
        accelerate._deepspeed_plugin(settings, {"optimizer": {"type": "AdamW", "params": {}}})


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_on_one_process_a_hook_is_left_out_with_one_line(hook, caplog):
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.INFO, "ds_wsi"):
        handle = ds_wsi.register_comm_hook(model, hook)
    assert caplog.messages == [f"communication hook {hook}: left out, one process has nobody to send to"]
    assert handle.where == "one process"
    assert handle.metrics() == {}
    assert handle.state_dict() == {}
    with pytest.raises(ValueError, match="must have one hook"):
        ds_wsi.register_comm_hook(model, hook)
    handle.remove()
    ds_wsi.attach(model, CommPolicy(hook=hook)).remove()
    with pytest.raises(ValueError, match="a hook must be one of"):
        ds_wsi.register_comm_hook(model, "top-k")


def test_a_models_own_config_is_no_deepspeed_config(caplog):
    """A transformers model's is an object without `get`; another's may be a dictionary with anything."""
    for config in (SimpleNamespace(hidden_size=3), {"ds_wsi": {"compression": {"hook": "dmgc"}}}, None):
        model = nn.Linear(3, 2)
        model.config = config
        with caplog.at_level(logging.INFO, "ds_wsi"):
            assert ds_wsi.attach(model) is None
        assert "nothing to do, one process" in caplog.messages[-1]


def test_what_is_no_model_is_refused_on_one_process_too():
    with pytest.raises(ValueError, match=r"got str on 1 processes\. HINT: give the model that deepspeed\.initialize"):
        ds_wsi.attach("model")


def test_ddp_of_one_process_is_the_identity(tmp_path, caplog):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Linear(30, 20)
        wrapped = DistributedDataParallel(model)
        with caplog.at_level(logging.INFO, "ds_wsi"):
            assert ds_wsi.attach(wrapped) is None
            handle = ds_wsi.register_comm_hook(wrapped, "topk")  # of 1 %: 99 % of the gradient would come late
        assert [("nothing to do" in m, "left out" in m) for m in caplog.messages] == [(True, False), (False, True)]
        x = torch.randn(4, 30)
        wrapped(x).square().sum().backward()
        plain = torch.autograd.grad(model(x).square().sum(), model.weight)[0]
        assert torch.equal(model.weight.grad, plain)
        # What two processes owed when they saved their state is paid with the next step, and nothing after it.
        owed = {"weight": torch.ones(20, 30), "bias": torch.zeros(20)}
        handle.load_state_dict({**{f"residual.{n}": t.flatten() for n, t in owed.items()}, "step": torch.tensor([7])})
        for more in (1.0, 0.0):
            model.zero_grad()
            wrapped(x).square().sum().backward()
            torch.testing.assert_close(model.weight.grad, plain + more, rtol=0, atol=1e-5)
        handle.save(tmp_path / "state")
        handle.load(tmp_path / "state")
    finally:
        torch.distributed.destroy_process_group()
