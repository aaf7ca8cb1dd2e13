"""Communication hooks under every engine: at 100 % the engine's own weights, and steps that keep what they owe.

Two ranks add in one order only and halve exactly, so that dense sums agree bit by bit whoever makes them.
"""

import pytest
import torch
import torch.nn.functional as F
from comm_hook_cases import ENGINES, STEPS, ZERO, Trainer, batch_of, make_model, trained, zero_config
from torch import nn

from harness import run_ranks

pytestmark = pytest.mark.distributed
EXACT = ("allreduce", "topk", "dmgc")  # at 100 %
CASTS = ("fp16", "bf16")


# --- at 100 % ---


def differences(cases):
    from deepspeed.runtime.engine import DeepSpeedEngine

    rows = []
    for engine, how in cases:
        native, _ = trained(engine, None, **how)
        # One pass a step is another order of the same sum: compared with the engine's own single pass.
        single = engine in ("zero2", "zero3") and how.get("accumulation", 1) > 1
        single = single and hasattr(DeepSpeedEngine, "coalesce_grad_reduction")  # before, hooks reduce as engines do
        oracle = trained(engine, None, coalesced=True, **how)[0] if single else native
        start = Trainer(engine, **how).weights()
        row = {"moved": float((native - start).abs().max()), "order": float((oracle - native).abs().max())}
        for hook in (*EXACT, *(() if how else CASTS)):
            weights, handle = trained(engine, hook, **how)
            row[hook] = float((weights - oracle).abs().max())
            row[f"{hook} step"] = getattr(handle.state, "step", STEPS)
        rows.append(row)
    return rows


def parity_cases():
    cases = []
    for engine in ENGINES:
        for autocast in (False, True):
            for accumulation in (1, 3):
                how = {"autocast": autocast, "accumulation": accumulation}
                cases.append((engine, how if autocast or accumulation > 1 else {}))
    for engine in ("zero1", "zero2", "zero3"):
        cases.append((engine, {"zero": {"offload_optimizer": {"device": "cpu"}}, "optimizer": "Adam"}))
        offload = {"zero": {"offload_optimizer": {"device": "cpu"}}, "optimizer": "Adam", "accumulation": 3}
        cases.append((engine, offload))
        cases.append((engine, {"zero": {"overlap_comm": True}}))
        cases.append((engine, {"zero": {"overlap_comm": True}, "accumulation": 3}))
    for engine in ZERO:
        cases.append((engine, {"bf16": {"enabled": True}}))
    cases.append(("zero3", {"zero": {"reduce_scatter": False}}))
    cases.append(("zero2", {"zero": {"reduce_bucket_size": 100000}}))
    return cases


def test_a_hook_at_one_hundred_percent_trains_the_engines_own_weights():
    cases = parity_cases()
    first, second = run_ranks(differences, 2, cases)
    assert first == second
    for (engine, how), row in zip(cases, first, strict=True):
        assert row["moved"] > 0.01, (engine, how)
        assert row["order"] < 1e-4, (engine, how, row)
        for hook in EXACT:
            assert row[hook] == 0.0, (engine, how, row)
            assert row[f"{hook} step"] == STEPS, (engine, how)
        if not how:  # 16 bits: rounded once to the owners and once back; Adam takes it for a sign
            assert row["fp16"] < 1e-3, (engine, how, row)
            assert row["bf16"] < 1e-2, (engine, how, row)


def test_three_ranks_agree_to_rounding_with_shards_that_are_padded():
    """Sums of three have an order: DDP's and gloo's is not ours."""
    cases = [(engine, {}) for engine in ENGINES]
    ranks = run_ranks(differences, 3, cases)
    assert ranks[0] == ranks[1] == ranks[2]
    for (engine, _), row in zip(cases, ranks[0], strict=True):
        assert row["moved"] > 0.01, engine
        for hook in EXACT:
            assert row[hook] < 1e-6, (engine, row)


def hugging_face(folder):
    """The same steps inside the HF Trainer: its engine's own, and a hook's at 100 %."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers import Trainer as HfTrainer
    from transformers import TrainerCallback, TrainingArguments

    from ds_wsi.compression import DMGC
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x, labels):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Register(TrainerCallback):
        handle = None

        def on_train_begin(self, args, state, control, **_):
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            Register.handle = register_comm_hook(engine, "dmgc", DMGC(keep=1.0))

    weights = []
    for callbacks in ([], [Register()]):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(backend="gloo")
        config = zero_config(2, train_micro_batch_size_per_gpu="auto", fp16={"enabled": False})
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=4,
            deepspeed=config,
            accelerator_config={"use_configured_state": True},
            report_to=[],
            save_strategy="no",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        rows = [dict(zip(("x", "labels"), pair)) for n in range(6) for pair in zip(*batch_of(n, 0))]
        trainer = HfTrainer(Model(), arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()]))
    started = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    return {
        "same": torch.equal(*weights),
        "moved": not torch.equal(weights[0], started),
        "pulled": Register.handle.count.pull.wire_bytes,
    }


def test_a_hook_works_inside_the_hf_trainer(tmp_path):
    for row in run_ranks(hugging_face, 2, str(tmp_path)):
        assert row["same"]
        assert row["moved"]
        assert row["pulled"] > 0
