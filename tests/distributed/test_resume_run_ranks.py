"""Whole runs of the main job are gone on with under the same engine bit by bit, and by other numbers of processes."""

import json
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from resume_cases import EXACT32, ITEMS, Runs, distance
from safetensors import safe_open
from tiny_runs import write_cohort

from ds_wsi.compression.comm import CommPolicy
from harness import run_ranks

pytestmark = pytest.mark.distributed


def settings_of(folder, name, world, **more):
    """Settings of a run on features of four slides per step, however many processes there are."""
    from dataclasses import replace

    from ds_wsi.config import DsWsiConfig
    from ds_wsi.training.settings import DataSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings

    policies = DsWsiConfig()
    policies = replace(policies, reading=replace(policies.reading, workers=0), **more.pop("policies", {}))
    optim = {
        "num_train_epochs": 3,
        "optim": "adam",
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "ema_decay": 0.5,
        "max_grad_norm": 0.5,
    }
    optim |= {"gradient_accumulation_steps": ITEMS // world, **more.pop("optim", {})}
    return TrainSettings(
        DataSettings(manifest=f"{folder}/c/m.csv", features_dir=f"{folder}/c/features"),
        ModelSettings(aggregator="abmil", dropout=0.2),
        OptimSettings(**optim),
        RunSettings(output_dir=f"{folder}/{name}", save_steps=1, save_total_limit=9, disable_tqdm=True, **more),
        policies,
    )


def run_of(settings, stage):
    """The run at its end, without its test."""
    from ds_wsi.engines.accelerator.engine import Accelerator
    from ds_wsi.evaluation.norm_choice import NormChoice
    from ds_wsi.training import loop, validation

    ended = []
    loop.finish = lambda run, started: ended.append(run) or {}
    loop.is_finished = lambda run: False
    validation.validate = lambda run, state: NormChoice("running")
    Accelerator.end_training = lambda self: None  # it would end the group
    config = None
    if stage is not None:
        params = {"lr": "auto", "weight_decay": "auto", "torch_adam": True}
        config = {"optimizer": {"type": "Adam", "params": params | {"adam_w_mode": False}}}
        config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    loop.train(settings, config)
    (run,) = ended
    return run


def state_of(run):
    from ds_wsi.engines.sharded.zero import full_state_dict

    averages = {} if run.average is None else {f"average {k}": v for k, v in run.average.weights().items()}
    losses = torch.tensor([entry["train_loss"] for entry in run.progress.history])
    return full_state_dict(run.module) | averages | {"losses": losses}


def how_of(engine):
    """(settings, ZeRO stage) of an engine."""
    stage = int(engine[-1]) if engine.startswith("zero") else None
    return {"fsdp": engine == "fsdp2", "optim": {"ema_decay": 0.0} if stage == 3 else {}}, stage


def train_runs(cases, folder):
    """What there is at the end of cases (engine, name, checkpoint to go on from or None); a ValueError's words."""
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    results = {}
    for engine, name, source, *changes in cases:
        more, stage = how_of(engine)
        more |= {"resume_from_checkpoint": source and f"{folder}/{source}"} | (changes[0] if changes else {})
        try:
            results[name] = state_of(run_of(settings_of(folder, name, world, **more), stage))
        except ValueError as error:
            results[name] = str(error)
    return results


DMGC = {"policies": {"compression": CommPolicy(hook="dmgc", keep=0.1)}}
HOOK = {"policies": {"compression": CommPolicy(hook="topk", keep=0.1)}}
RUNS = ("ddp", "fsdp2", "zero0", "zero2", "zero3")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_cohort(folder / "c")
    return folder


@pytest.fixture(scope="module")
def whole_runs(cohort):
    """Runs on two processes, from the beginning, and from their own checkpoints."""
    cases = [(engine, engine, None) for engine in RUNS]
    cases += [(engine, f"{engine} again", f"{engine}/checkpoint-3") for engine in RUNS]
    cases += [("ddp", "hook", None, HOOK), ("ddp", "hook again", "hook/checkpoint-3", HOOK)]
    cases += [("zero1", "pull", None, DMGC), ("zero1", "pull again", "pull/checkpoint-3", DMGC)]
    cases += [("ddp", "pull-ddp", "pull/checkpoint-3", DMGC)]
    return run_ranks(train_runs, 2, cases, str(cohort))[0]


def test_a_run_goes_on_bit_by_bit(whole_runs, cohort):
    for name in (*RUNS, "hook", "pull"):
        state, again = whole_runs[name], whole_runs[f"{name} again"]
        assert isinstance(state, dict), state
        assert isinstance(again, dict), again
        assert state.keys() == again.keys()
        for key, value in state.items():
            assert torch.equal(again[key], value), (name, key)
    (path,) = cohort.glob("pull/checkpoint-3/**/optimizer.safetensors")
    with safe_open(path, "pt") as states:
        has_masters = any(key.startswith("master/") for key in states.keys())  # noqa: SIM118
    if has_masters:
        assert "must be gone on with under ZeRO 1 or 2: DMGC's pull left the ranks" in whole_runs["pull-ddp"]
    else:  # with an earlier DeepSpeed means are pulled, see `zero_weights.unfit`: another engine loses nothing
        assert Version(version("deepspeed")) < Version("0.19.8")
        assert isinstance(whole_runs["pull-ddp"], dict)


def test_a_loss_scale_is_numbers_and_comes_back():
    from ds_wsi.engines.full_state.engine_state import _put_scale

    one, two = (torch.amp.GradScaler("cpu", init_scale=2.0**exponent) for exponent in (5, 9))
    for scaler in (one, two):
        scaler.scale(torch.ones(1))
    _put_scale(two, json.loads(json.dumps(one.state_dict())))
    assert two.get_scale() == 32
    with pytest.raises(ValueError, match=r"a loss scale must be .*got .*HINT"):
        _put_scale(two, {"scale": "32"})


@pytest.mark.slow
def test_runs_go_on_with_one_and_with_four_processes(whole_runs, cohort):
    marker = cohort / "it ran"
    for path in cohort.glob("*/checkpoint-2"):  # what DeepSpeed and Accelerate would unpickle
        for name in ("pytorch_model/mp_rank_00_model_states.pt", "random_states_0.pkl", "optimizer.bin", "latest"):
            (path / name).parent.mkdir(exist_ok=True)
            torch.save(Runs(marker), path / name)
    one = [("ddp" if engine == "fsdp2" else engine, f"{engine}-1", f"{engine}/checkpoint-2") for engine in RUNS]
    few = {"optim": {"gradient_accumulation_steps": 1}}
    one += [("ddp", "few", "ddp/checkpoint-2", few), ("ddp", "hook-1", "hook/checkpoint-2", HOOK)]
    alone = run_ranks(train_runs, 1, one, str(cohort))[0]
    assert "an optimizer step must be as many as the checkpoint's, 4, got 1 (world_size 1 x 1 slide x 1" in alone["few"]
    assert "give --gradient_accumulation_steps 4" in alone["few"]
    assert "comm_hook must be the checkpoint's, topk" in alone["hook-1"]
    assert "Go on with two or more processes" in alone["hook-1"]
    four = [(engine, f"{engine}-4", f"{engine}-1/checkpoint-4") for engine in RUNS]
    four += [("zero3", "ddp-zero3", "ddp/checkpoint-3", {"optim": {"ema_decay": 0.0}})]
    four += [("zero1", "pull-4", "pull/checkpoint-3", DMGC)]
    four += [("fsdp2", "zero2-fsdp2", "zero2/checkpoint-3"), ("ddp", "hook-4", "hook/checkpoint-3", HOOK)]
    ends = run_ranks(train_runs, 4, four, str(cohort))[0]
    assert "ema_decay must be the checkpoint's, 0.5" in ends.pop("ddp-zero3")
    assert isinstance(ends.pop("pull-4"), dict)
    assert isinstance(ends.pop("hook-4"), dict), "the mean of two residuals is four's: other messages, the same debt"
    for name, state in ends.items():
        assert isinstance(state, dict), (name, state)
        far = distance(state, whole_runs[name.split("-")[0]])
        assert far < (EXACT32,), (name, far)
    for name, state in alone.items():
        if name not in ("few", "hook-1"):
            far = distance(state, whole_runs[name.split("-")[0]])
            assert far < (EXACT32,), (name, far)
    assert not marker.exists()
