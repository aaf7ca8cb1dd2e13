"""A number that is none is noticed at its step, and no checkpoint holds it."""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_runs import train, write_cohort
from torch import nn

from ds_wsi.training import one_step
from ds_wsi.training.finite import weights_are_finite, weights_seem_finite

CPU = torch.device("cpu")


def checkpoints_are_finite(run):
    """Every tensor in every checkpoint; and there is at least one checkpoint."""
    checkpoints = list(run.glob("checkpoint-*"))
    for path in (file for checkpoint in checkpoints for file in checkpoint.rglob("*.safetensors")):
        assert all(value.isfinite().all() for value in load_file(path).values() if value.is_floating_point()), path
    return len(checkpoints)


def spoil(folder, name, value):
    path = folder / "features" / f"{name}.safetensors"
    features = load_file(path)["features"]
    features[:] = value
    save_file({"features": features}, path)


def test_the_slide_is_named_and_nothing_is_sealed(tmp_path, capfd):
    """Features that are finite, and so large that what the model makes of them is not."""
    folder = write_cohort(tmp_path)
    spoil(folder, "s03", 3e38)
    assert train(folder, tmp_path / "bad", "--save_steps", "1", "--aggregator", "mean", epochs=3) == 2
    words = capfd.readouterr().err
    assert re.search(r"the loss must be finite, got .* in epoch 1, step \d+, of 1 slide \(s03\)\.", words), words
    checkpoints_are_finite(tmp_path / "bad")


def test_an_update_that_is_not_finite_stops_at_its_step(tmp_path, capfd, monkeypatch):
    """The loss is finite, its gradient is not: the slides of the step are named, and the step before was saved."""
    folder = write_cohort(tmp_path)
    micro_loss, backward = one_step._micro_loss, Accelerator.backward
    steps, weights = [], []

    def loss_of(run, step, **more):
        steps.append([run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags])
        weights[:] = [p for p in run.module.parameters() if p.requires_grad]
        return micro_loss(run, step, **more)

    def poisoned(accelerator, loss, **more):
        backward(accelerator, loss, **more)
        if len(steps) == 3:
            weights[0].grad.view(-1)[0] = float("inf")

    monkeypatch.setattr(one_step, "_micro_loss", loss_of)
    monkeypatch.setattr(Accelerator, "backward", poisoned)
    assert train(folder, tmp_path / "run", "--save_steps", "1", "--optim", "adamw", epochs=1) == 2
    words = capfd.readouterr().err
    assert (
        f"gradient and weights must be finite, got infinity or no number in epoch 1, step 2, of 1 slide ({steps[2][0]})"
        in words
    )
    assert len(steps) == 3
    assert checkpoints_are_finite(tmp_path / "run") == 2


def test_a_learning_rate_that_diverges_is_told(tmp_path, capfd):
    folder = write_cohort(tmp_path)
    assert train(folder, tmp_path / "run", "--optim", "sgd", "--learning_rate", "1e30", epochs=8) == 2
    assert "must be finite" in capfd.readouterr().err
    for name in ("history.json", "metrics.json"):
        if (tmp_path / "run" / name).exists():
            json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("place", ["parameter", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_each_weight_and_buffer_counts(place, value):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert weights_seem_finite(module, CPU)
    assert weights_are_finite(module)
    with torch.no_grad():
        (module[2].bias if place == "parameter" else module[1].running_var)[1] = value
    assert not weights_seem_finite(module, CPU)
    assert not weights_are_finite(module)
    module.requires_grad_(False)
    assert weights_are_finite(module) == (place == "parameter"), "what is frozen is not looked at"


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.float64, 1e308)])
def test_large_finite_weights_are_finite(dtype, value):
    """Their sum may be too large: then each is looked at."""
    module = nn.Linear(3, 4, dtype=dtype)
    with torch.no_grad():
        module.weight.fill_(value)
    assert weights_are_finite(module)
    assert bool(weights_seem_finite(module, CPU)) == (dtype == torch.float16)


def test_a_run_with_large_weights_goes_on(tmp_path, monkeypatch):
    folder = write_cohort(tmp_path)
    monkeypatch.setattr(one_step, "weights_seem_finite", lambda module, device: torch.tensor(False))
    assert train(folder, tmp_path / "run", epochs=1) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rank", "numel", "own"), [(0, 3, 2), (1, 3, 1), (1, 2, 0), (3, 5, 0)])
def test_what_pads_a_partition_is_no_weight(monkeypatch, rank, numel, own, value):
    """Partitions of two elements, of a weight of `numel`: only the first `own` of this rank's are weights."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: {"the ranks": rank}[group])
    net = nn.Linear(1, 1)
    for parameter in net.parameters():
        parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = torch.ones(2), numel, "the ranks"
    net.weight.ds_tensor[own:] = value
    assert weights_are_finite(net)
    assert bool(weights_seem_finite(net, torch.device("cpu")))
    if own:
        net.weight.ds_tensor[own - 1] = value
        assert not weights_are_finite(net)
        assert not bool(weights_seem_finite(net, torch.device("cpu")))
