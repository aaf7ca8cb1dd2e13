"""The GPU's budget of a run leaves room for what comes after the plan."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy
from ds_wsi.training import device_budget
from ds_wsi.training.device_budget import EngineMemory, later_bytes, with_budget
from ds_wsi.training.settings import DataSettings, OptimSettings, RunSettings, TrainSettings

FREE = 10 * 2**30
GPU = torch.device("cuda", 0)


class Model(nn.Module):
    """1,000 parameters of an encoder, of which 100 are frozen, 10 of an aggregator, and a buffer of 5."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.frozen = nn.Parameter(torch.zeros(100), requires_grad=False)
        self.encoder.trained = nn.Parameter(torch.zeros(900))
        self.aggregator = nn.Linear(9, 1)
        self.register_buffer("mean", torch.zeros(5))


def later(engine, *, averages=False):
    module = Model()
    return later_bytes(module, module.encoder, engine, averages=averages)


def test_what_comes_later_is_the_sum_of_its_parts():
    weights, aggregators, adam = 1015 * 4, 10 * 4, 910 * 8
    assert later(EngineMemory()) == weights + aggregators + adam
    assert later(EngineMemory(), averages=True) == weights + aggregators + adam + 1010 * 4
    assert later(EngineMemory(buckets=True)) == weights + aggregators + adam + 910 * 4
    assert later(EngineMemory(offloads=True)) == weights + aggregators
    assert later(EngineMemory(state_parts=2)) == weights + aggregators + adam // 2
    assert later(EngineMemory(state_parts=2, weight_parts=2)) == weights // 2 + aggregators + adam // 2
    assert later(EngineMemory(copies=True)) == weights + aggregators + adam + 910 * 4


def accelerator(**more):
    values = {"device": GPU, "num_processes": 1, "is_main_process": True, "is_fsdp2": False, "mixed_precision": "no"}
    return SimpleNamespace(**values | {"state": SimpleNamespace(deepspeed_plugin=None)} | more)


def deepspeed(stage, **zero):
    config = {"zero_optimization": {"stage": stage, **zero}}
    return SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))


def test_an_engine_says_what_it_keeps():
    assert EngineMemory.of(accelerator()) == EngineMemory()
    assert EngineMemory.of(accelerator(num_processes=4)) == EngineMemory(buckets=True)
    assert EngineMemory.of(accelerator(num_processes=4, is_fsdp2=True)) == EngineMemory(4, 4, buckets=True)
    offload = deepspeed(2, offload_optimizer={"device": "cpu"})
    assert EngineMemory.of(accelerator(num_processes=4, state=offload)) == EngineMemory(4, 1, True, True)
    half = accelerator(num_processes=4, state=deepspeed(3), mixed_precision="bf16")
    assert EngineMemory.of(half) == EngineMemory(4, 4, False, True, True)


def budget(monkeypatch, policy=None, validates=True, engine=None, **run):
    monkeypatch.setattr(device_budget, "free_bytes", lambda device: FREE)
    settings = TrainSettings(DataSettings(demo="tumour"), optim=OptimSettings(), run=RunSettings(**run))
    policy = policy or PartitionPolicy()
    return with_budget(policy, Model(), settings, engine or accelerator(), validates=validates)


def test_the_budget_is_what_is_left(monkeypatch):
    left = 0.9 * (FREE - later(EngineMemory()))
    assert budget(monkeypatch) == PartitionPolicy(gpu_budget_bytes=int(left))


@pytest.mark.parametrize(
    ("run", "more", "shared"),
    [
        ({"validate_beside": True}, {}, True),
        ({"validate_beside": True}, {"is_main_process": False}, False),
        ({"validate_beside": True, "validation_device": "cuda:0"}, {}, True),
        ({"validate_beside": True, "validation_device": "cuda:1"}, {}, False),
        ({"validate_beside": True, "validation_device": "cpu"}, {}, False),
        ({}, {}, False),
    ],
)
def test_a_validation_beside_on_the_same_gpu_has_a_fifth(monkeypatch, caplog, run, more, shared):
    caplog.set_level(logging.INFO, "ds_wsi")
    share = 0.9 * 0.8 if shared else 0.9
    policy = budget(monkeypatch, engine=accelerator(**more), **run)
    assert policy.gpu_budget_bytes == int(share * (FREE - later(EngineMemory())))
    assert ("a fifth for the validation beside (--validate_beside)" in caplog.text) is shared
    assert "of the 10.00 GiB that are free on cuda:0" in caplog.text


def test_without_a_validation_split_nothing_is_kept_for_it(monkeypatch):
    assert budget(monkeypatch, validates=False, validate_beside=True) == budget(monkeypatch)


def test_a_budget_that_is_given_stands_and_a_cpu_has_none(monkeypatch):
    given = PartitionPolicy(gpu_budget_bytes=2**30)
    assert budget(monkeypatch, given, validate_beside=True) == given
    assert budget(monkeypatch, engine=accelerator(device=torch.device("cpu"))) == PartitionPolicy()


def test_weights_that_leave_nothing_leave_the_refusal_to_the_plan(monkeypatch):
    monkeypatch.setattr(device_budget, "later_bytes", lambda *given, **more: 2 * FREE)
    assert budget(monkeypatch) == replace(PartitionPolicy(), gpu_budget_bytes=1)
