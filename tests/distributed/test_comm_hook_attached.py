"""How hooks come and go: refused, discarded with a step, removed, and attached by a section or under Accelerate."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comm_hook_cases import (
    ENGINES,
    HOOKS,
    KEEP,
    Trainer,
    batch_of,
    each,
    first_error,
    make_model,
    register,
    trained,
    zero_config,
)

from harness import run_ranks

pytestmark = pytest.mark.distributed


def removed(engine):
    """Weights of two native steps after a removed hook, and without one ever."""
    native, _ = trained(engine, None, steps=2, accumulation=2)
    trainer = Trainer(engine, accumulation=2)
    handle = register(trainer, HOOKS[engine], KEEP)
    handle.remove()
    handle.remove()
    for _ in range(2):
        trainer.step()
    again = register(trainer, "topk", KEEP)
    second = first_error(lambda: register(trainer, "topk", KEEP))
    again.remove()
    return {"same": torch.equal(trainer.weights(), native), "second": second, "count": handle.count.wire_bytes}


def test_a_removed_hook_leaves_the_native_engine():
    for engine, row in run_ranks(each(removed), 2, ENGINES)[0].items():
        assert row["same"], engine
        assert row["count"] == 0, engine
        assert "must have one hook" in row["second"], engine


def refusals():
    from ds_wsi.compression import DMGC, TopK
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    outcomes = {}

    def refused(name, trainer, hook="topk", state=None):
        outcomes[name] = first_error(lambda: register_comm_hook(trainer.model, hook, state))

    zero2 = Trainer("zero2")
    refused("powersgd", zero2, "powersgd")
    refused("server", zero2, "dmgc", DMGC(topology="server", pull="weights"))
    refused("policy", zero2, "dmgc", TopK())
    refused("name", zero2, "top-k")
    refused("sharded", Trainer("zero3"), "dmgc", DMGC(pull="weights"))
    refused("sharded ddp", Trainer("ddp"), "dmgc", DMGC(pull="weights"))
    refused("contiguous", Trainer("zero2", zero={"contiguous_gradients": False}))
    zero2.model.has_moe_layers = True
    refused("moe", zero2)
    zero2 = Trainer("zero2")
    zero2.model.is_deepcompile_enabled = lambda: True
    refused("deepcompile", zero2)
    zero2 = Trainer("zero2")
    zero2.model.module.lookup = torch.nn.Embedding(2, 2, sparse=True)
    refused("sparse", zero2)
    zero2 = Trainer("zero2")
    zero2.model.zenflow = True
    refused("zenflow", zero2)
    zero2 = Trainer("zero2")
    zero2.model.optimizer.gradient_reduction_w_predivide = lambda tensor: tensor
    refused("signature", zero2)
    outcomes["module"] = first_error(lambda: register_comm_hook(torch.nn.Linear(1, 1), "topk"))
    native = trained("zero2", None, steps=2)[0]
    zero2 = Trainer("zero2")
    refused("after", zero2, "dmgc", DMGC(topology="server", pull="weights"))
    for _ in range(2):
        zero2.step()
    outcomes["untouched"] = torch.equal(zero2.weights(), native)
    return outcomes


def test_what_cannot_be_served_is_refused_with_the_reason():
    outcomes = run_ranks(refusals, 2)[0]
    words = {
        "powersgd": "must run under DDP",
        "server": "whose ranks own parts of the optimizer, got server under zero2",
        "policy": "must be a DMGC",
        "name": "must be one of allreduce",
        "sharded": "must be under ZeRO 1 or 2 with topology sharded",
        "sharded ddp": "got sharded under ddp",
        "contiguous": "contiguous_gradients must be true",
        "moe": "mixture of experts",
        "deepcompile": "DeepCompile",
        "sparse": "got an embedding's sparse ones",
        "zenflow": "got ZenFlow",
        "signature": "must take ('tensor', 'communication_data_type')",
        "module": "must be a DeepSpeedEngine, DDP or an FSDP2 module, got Linear",
    }
    for name, part in words.items():
        assert part in outcomes[name], (name, outcomes[name])
        assert "HINT" in outcomes[name] or name == "policy", name
    assert outcomes["untouched"], "a refused hook must leave the engine as it was"


def overflowed(engine):
    """fp16 with a loss scale: a step that overflows on one rank changes nothing, and residuals are in true units."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it asks whether that is fast
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]
    trainer = Trainer(engine, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    handle = register(trainer, "topk", KEEP)

    def step(factor=1.0):
        x, y = batch_of(trainer.number, dist.get_rank())
        trainer.number += 1
        trainer.model.backward(F.cross_entropy(trainer.model(x.half()).float(), y) * factor)
        trainer.model.step()

    step()
    before, weights = handle.state_dict(), trainer.weights()
    step(float("inf") if dist.get_rank() == 1 else 1.0)
    after = handle.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    kept = torch.equal(trainer.weights(), weights)
    step()
    return {
        "same": same,
        "kept": kept,
        "step": handle.state_dict()["step"].item(),
        "largest": max(float(t.abs().max()) for name, t in before.items() if name != "step"),
        "moved": not torch.equal(trainer.weights(), weights),
    }


def test_an_overflowing_step_leaves_no_trace():
    for engine, row in run_ranks(each(overflowed), 2, ("zero1", "zero2", "zero3"))[0].items():
        assert row["same"], engine
        assert row["kept"], engine
        assert row["moved"], engine
        assert row["step"] == 2, engine
        assert 0 < row["largest"] < 1, (engine, row)  # times 256 it would not be


def powersgd():
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    trainer = Trainer("ddp")
    handle = register_comm_hook(trainer.model, "powersgd")
    for _ in range(13):  # its first 10 are dense
        trainer.step()
    weights = trainer.weights()
    handle.remove()
    return weights


def test_powersgd_is_torchs_under_ddp():
    one, two = run_ranks(powersgd, 2)
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()


def attached():
    import ds_wsi
    from ds_wsi.compression.comm import CommPolicy

    section = {"compression": {"hook": "topk", "keep": 0.2, "dense_below": 10}}
    engine, *_ = ds_wsi.initialize(model=make_model(), config=zero_config(2, ds_wsi=section))
    policy = engine.comm_handle.state.policy
    choice = ds_wsi.attach(Trainer("zero2").model, CommPolicy(hook="auto"))
    return {
        "keep": policy.keep,
        "dense_below": policy.dense_below,
        "none": ds_wsi.attach(Trainer("zero2").model) is None,
        "auto": "none" if choice is None else choice.where,
    }


def test_the_json_section_attaches_a_hook():
    for row in run_ranks(attached, 2):
        assert (row["keep"], row["dense_below"], row["none"]) == (0.2, 10, True)
        assert row["auto"] == "none", "two processes of one machine and 500 parameters: nothing to gain"


def accelerated(folder):
    """A hook as the trainer attaches it, under Accelerate's DDP, saved and loaded with its checkpoints."""
    import json
    from pathlib import Path

    from ds_wsi.compression.comm import CommPolicy
    from ds_wsi.engines.accelerator.engine import attach_hook
    from ds_wsi.engines.accelerator.stepper import Stepper
    from ds_wsi.training.checkpoint import Contents, save_checkpoint
    from ds_wsi.training.saver import Saver

    def stepper():
        made = Stepper("ddp", make_model(), "sgd", 0.1)
        return made, attach_hook(made._accelerator, made.model, CommPolicy(hook="dmgc", keep=KEEP))

    def steps(made, numbers):
        for number in numbers:
            x, y = batch_of(number, dist.get_rank())
            made.backward(F.cross_entropy(made.model(x), y))
            made.step()

    first, handle = stepper()
    steps(first, range(2))
    with Saver() as saver:
        saver.make_room()
        contents = Contents({"at": 2}, {}, handle.on_host())
        checkpoint = save_checkpoint(saver, first._accelerator, Path(folder), 2, contents, 2)
        kept = first.model.state_dict()
        kept = {name: value.clone() for name, value in kept.items()}
    dist.barrier()
    steps(first, range(2, 4))
    second, again = stepper()
    second.model.load_state_dict(kept)
    again.load(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    steps(second, range(2, 4))
    one, two = first.parameters(), second.parameters()
    return {
        "same": all(torch.equal(one[name], two[name]) for name in one),
        "state": state["at"],
        "metrics": sorted(handle.metrics()),
        "listed": "comm_hook-00001-of-00002" in (checkpoint / "files.json").read_text(),
    }


def test_the_trainers_checkpoints_hold_the_hooks_state(tmp_path):
    for row in run_ranks(accelerated, 2, str(tmp_path)):
        assert row["same"]
        assert row["listed"]
        assert row["state"] == 2
        assert row["metrics"] == [
            f"comm/{way}_{what}" for way in ("pull", "push") for what in ("message_ratio", "wire_bytes")
        ]


def accumulated():
    """Three micro-steps per step through Accelerate's own accumulation under ZeRO 2: messages of three steps."""
    from pathlib import Path

    from accelerate.state import AcceleratorState, GradientState

    from ds_wsi.compression.comm import CommPolicy
    from ds_wsi.engines.accelerator.engine import EngineSettings, attach_hook, build_accelerator, prepare

    weights = {}
    for hook in ("none", "dmgc"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        settings = EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 3)
        config = zero_config(2, train_micro_batch_size_per_gpu="auto") | {"gradient_accumulation_steps": "auto"}
        accelerator = build_accelerator(settings, Path("unused"), config)
        model, _ = prepare(accelerator, make_model(), settings)
        handle = attach_hook(accelerator, model, CommPolicy(hook=hook, keep=1.0))
        for number in range(9):
            with accelerator.accumulate(model):
                x, y = batch_of(number, dist.get_rank())
                accelerator.backward(F.cross_entropy(model(x), y))
        weights[hook] = torch.cat([p.detach().flatten().clone() for p in accelerator.unwrap_model(model).parameters()])
    coalesces = hasattr(model, "coalesce_grad_reduction")
    return {
        **weights,
        "coalesces": coalesces,
        "messages": len(handle.count.push.messages),
        "step": handle.state_dict()["step"].item(),
    }


def test_accelerates_accumulation_sends_once_a_step():
    for row in run_ranks(accumulated, 2):
        torch.testing.assert_close(row["dmgc"], row["none"], rtol=0, atol=1e-6)  # another order of the same sum
        # Before there was `coalesce_grad_reduction` ZeRO 2 reduced in each micro-step, of which a step has three.
        assert row["messages"] == 3 * 2 * (1 if row["coalesces"] else 3), "two buckets a step"
        assert row["step"] == 3
