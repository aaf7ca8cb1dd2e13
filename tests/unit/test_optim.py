"""DEMON, the exponential schedule and the moving average; and that optimizers read the momentum at each step."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ds_wsi.cli import main
from ds_wsi.runtime.tensor_file import open_tensors, write_tensors
from ds_wsi.training import loop
from ds_wsi.training.optim import (
    DECAY_AN_EPOCH,
    WeightAverage,
    demon_beta,
    learning_rate_at,
    set_beta,
    warn_of_warmup,
)
from ds_wsi.training.settings import OptimSettings
from ds_wsi.training.warmup import set_rates

STEPS = 6
BETA_2, EPS, LEARNING_RATE = 0.999, 1e-8, 0.01


@given(initial=st.floats(0.01, 0.99), total=st.integers(1, 1000))
def test_demon_falls_from_its_start_to_nothing(initial, total):
    betas = [demon_beta(step, total_steps=total, initial=initial) for step in range(total + 1)]
    assert betas[0] == pytest.approx(initial)
    assert betas[-1] == 0
    assert betas == sorted(betas, reverse=True)
    # What DEMON is derived from: the weight that a gradient has in all later updates falls in proportion to the time.
    for step, beta in enumerate(betas):
        assert beta / (1 - beta) == pytest.approx(initial / (1 - initial) * (1 - step / total), abs=1e-9)


def test_known_values_of_demon():
    assert demon_beta(5, total_steps=10, initial=0.9) == pytest.approx(0.45 / 0.55)
    assert demon_beta(9, total_steps=10, initial=0.9) == pytest.approx(0.09 / 0.19)


def test_the_exponential_schedule_falls_by_the_epoch():
    def rate(step, warmup=0):
        return learning_rate_at(
            step, total_steps=40, peak=2.0, schedule="exponential", warmup_steps=warmup, steps_per_epoch=4
        )

    assert [rate(step) for step in range(9)] == [2.0] * 4 + [2 * DECAY_AN_EPOCH] * 4 + [2 * DECAY_AN_EPOCH**2]
    assert [rate(step, 2) for step in range(7)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2 * DECAY_AN_EPOCH]


def adam_by_formula(weights, gradients, betas, *, decay, decoupled):
    """Adam with another first beta at each step; bias is corrected by the step's own beta, as torch does."""
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, (gradient, beta) in enumerate(zip(gradients, betas, strict=True), 1):
        if decoupled:
            weights = weights * (1 - LEARNING_RATE * decay)
        else:
            gradient = gradient + decay * weights
        mean = beta * mean + (1 - beta) * gradient
        square = BETA_2 * square + (1 - BETA_2) * gradient**2
        corrected = mean / (1 - beta**step)
        weights = weights - LEARNING_RATE * corrected / ((square / (1 - BETA_2**step)).sqrt() + EPS)
    return weights


def trained(make, weights, gradients, betas):
    """Weights after a step of the optimizer a gradient, its betas set before each."""
    parameter = nn.Parameter(weights.clone())
    optimizer = make([parameter])
    for gradient, beta in zip(gradients, betas, strict=True):
        set_beta(optimizer, beta)
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def require_momentum_is_read_at_each_step(make, *, decoupled, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = (
        torch.randn(33, generator=generator, dtype=torch.float64).to(dtype).to(device) for _ in range(STEPS + 1)
    )
    demon = [demon_beta(step, total_steps=STEPS, initial=0.9) for step in range(STEPS)]
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    results = {}
    for name, betas in {"demon": demon, "constant": [0.9] * STEPS, "ending at 0": [0.9] * (STEPS - 1) + [0.0]}.items():
        results[name] = trained(make, weights, gradients, betas)
        expected = adam_by_formula(*(weights, gradients, betas), decay=0.01, decoupled=decoupled)
        torch.testing.assert_close(results[name], expected, **tolerance)
    assert (results["demon"] - results["constant"]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_torchs_adam_reads_the_momentum_at_each_step(optimizer, options):
    require_momentum_is_read_at_each_step(
        lambda parameters: optimizer(parameters, lr=LEARNING_RATE, weight_decay=0.01, **options),
        decoupled=optimizer is torch.optim.AdamW,
        dtype=torch.float64,
    )


def require_compiled(op):
    """Skip where DeepSpeed has not built the op yet: its compilation takes minutes, which a test must not."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if not installed_ops.get(op) and not (Path(_get_build_directory(op, verbose=False)) / f"{op}.so").exists():
        pytest.skip(f"DeepSpeed's {op} is not compiled on this machine")


@pytest.mark.parametrize("decoupled", [False, True])
def test_deepspeeds_cpu_adam_reads_the_momentum_at_each_step(decoupled):
    require_compiled("cpu_adam")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    require_momentum_is_read_at_each_step(
        lambda parameters: DeepSpeedCPUAdam(parameters, lr=LEARNING_RATE, weight_decay=0.01, adamw_mode=decoupled),
        decoupled=decoupled,
        dtype=torch.float32,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("decoupled", [False, True])
def test_deepspeeds_fused_adam_reads_the_momentum_at_each_step(decoupled):
    require_compiled("fused_adam")
    from deepspeed.ops.adam import FusedAdam

    require_momentum_is_read_at_each_step(
        lambda parameters: FusedAdam(parameters, lr=LEARNING_RATE, weight_decay=0.01, adam_w_mode=decoupled),
        decoupled=decoupled,
        dtype=torch.float32,
        device="cuda",
    )


def test_an_optimizer_without_betas_is_refused():
    with pytest.raises(ValueError, match=r"--demon must be given with an optimizer that has betas, got one.*HINT"):
        set_beta(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 0.5)


def test_the_average_is_the_weighted_sum_of_all_weights(tmp_path):
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.5)
    expected = module.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            module.weight.normal_()
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    assert set(average.weights()) == {"weight"}
    torch.testing.assert_close(average.weights()["weight"], expected)
    again = WeightAverage(nn.Linear(3, 2).requires_grad_(True), decay=0.5)
    write_tensors(tmp_path / "one", average.weights())
    write_tensors(tmp_path / "two", average.weights() | {"bias": torch.ones(2)})
    write_tensors(tmp_path / "broad", {"weight": torch.ones(1, 3), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match="of another model"), open_tensors(tmp_path / "one") as file:
        again.load(file, 19)
    with (
        pytest.raises(ValueError, match=r"weight of .* must have the shape \(2, 3\)"),
        open_tensors(tmp_path / "broad") as file,
    ):
        again.load(file, 19)
    with open_tensors(tmp_path / "two") as file:
        again.load(file, 19)
    assert again.steps == 19
    torch.testing.assert_close(again.weights()["weight"], expected)


def arguments(manifest, folder, *more):
    options = {"manifest": manifest, "output_dir": folder, "tile_size_px": 64, "encoder": "resnet10t"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["train", *given, "--num_train_epochs", "2", "--dataloader_num_workers", "0", *more]


@pytest.mark.slow
def test_a_run_with_all_of_them_resumes_to_the_same_weights(demo_manifest, tmp_path, monkeypatch):
    options = ("--demon", "--ema_decay", "0.9", "--lr_scheduler_type", "exponential", "--warmup_steps", "0")
    betas = []
    monkeypatch.setattr(loop, "set_beta", lambda optimizer, beta: (betas.append(beta), set_beta(optimizer, beta)))
    assert main(arguments(demo_manifest, tmp_path / "whole", *options)) == 0
    assert betas == [demon_beta(step, total_steps=8, initial=0.9) for step in range(8)]
    rates = [entry["learning_rate"] for entry in json.loads((tmp_path / "whole" / "history.json").read_text())]
    assert rates == pytest.approx([3e-4, 3e-4 * DECAY_AN_EPOCH])
    plain = arguments(demo_manifest, tmp_path / "plain", *options[:1], *options[3:])
    assert main(plain) == 0

    def stop(run):
        loop.save.wrapped(run)
        raise KeyboardInterrupt

    stop.wrapped = loop.save
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(demo_manifest, tmp_path / "stopped", *options))
    assert main(arguments(demo_manifest, tmp_path / "stopped", *options, "--resume_from_checkpoint")) == 0
    whole, stopped, raw = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped", "plain"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    # Trained alike, exported otherwise.
    assert math.isfinite(sum(float(value.sum()) for value in whole.values()))
    assert any(not torch.equal(whole[name], raw[name]) for name in whole if name.endswith("weight"))


def test_an_encoder_from_weights_takes_small_steps_by_default():
    assert OptimSettings().encoder_factor(from_weights=False) == 1.0
    assert OptimSettings().encoder_factor(from_weights=True) == pytest.approx(0.1)
    assert OptimSettings(learning_rate=1e-5).encoder_factor(from_weights=True) == 1.0
    for weights in (False, True):
        assert OptimSettings(encoder_learning_rate=6e-4).encoder_factor(from_weights=weights) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="encoder_learning_rate"):
        OptimSettings(encoder_learning_rate=0.0)


def test_the_encoders_group_has_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters])
    set_rates(optimizer, 0.1, 0.01, resting=False, encoder_factor=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
    set_rates(optimizer, 0.1, 0.01, resting=True, encoder_factor=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize(("warmup", "total", "warned"), [(10, 8, True), (8, 8, True), (6, 8, False), (0, 0, False)])
def test_a_warmup_that_the_run_does_not_leave_is_warned_of(warmup, total, warned, caplog):
    warn_of_warmup(warmup, total)
    assert bool(caplog.messages) == warned
    rates = [
        learning_rate_at(step, total_steps=total, peak=1.0, schedule="cosine", warmup_steps=warmup)
        for step in range(total)
    ]
    assert (rates == sorted(rates) and total > 0) == warned
    if warned:
        assert f"the run has {total} optimizer steps" in caplog.messages[0]
        assert f"only rises, to {round(100 * rates[-1])}% of its peak" in caplog.messages[0]
