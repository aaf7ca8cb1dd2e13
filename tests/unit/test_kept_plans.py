"""Plans kept on disk: read where all is the same, and made anew where anything that a search reads is another."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, plan_partition
from ds_wsi.partition.execution.input_tensor import InputCost
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.planning import depends, kept
from ds_wsi.partition.planning.depends import Asked, NoKeyError, key_of
from ds_wsi.partition.planning.kept import Budgets
from ds_wsi.partition.planning.rates import ASSUMED
from ds_wsi.partition.planning.search import Planner, find_plan

CPU = torch.device("cpu")
SHAPE = (32, 3, 16, 16)
POLICY = PartitionPolicy(gpu_budget_bytes=400_000, host_budget_bytes=2**30)
QUICK = PartitionPolicy("lean", chunk_size=8, gpu_budget_bytes=2**30, host_budget_bytes=2**30)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def asked(**changed) -> Asked:
    same = Asked(network(), SHAPE, POLICY, torch.float32, None, CPU, ASSUMED["cpu"], None, None)
    return replace(same, **changed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept, "WORTH_S", 0.0)
    return tmp_path / "ds_wsi" / "plans"


@pytest.fixture
def searches(monkeypatch):
    """The shapes that were searched for."""
    made = []
    before = Planner.searched

    def counted(self, budgets):
        made.append(self.shape)
        return before(self, budgets)

    monkeypatch.setattr(Planner, "searched", counted)
    return made


def found(policy: PartitionPolicy = QUICK):
    return find_plan(network(), SHAPE, policy, device=CPU, rates=ASSUMED["cpu"])


def test_a_plan_is_made_once_and_read_as_it_was_made(folder, searches):
    first, second = found(), found()
    assert (first.made, second.made) == (True, False)
    assert len(searches) == 1
    assert first.plan.mode == "partitioned"
    assert first.plan == second.plan
    assert first.path == second.path
    assert "was made" in first.words
    assert f"read in {second.seconds:.2g} s from {first.path}" in second.words
    assert {path.name for path in folder.iterdir()} == {first.path.name}  # no lock is left


def test_a_plan_is_read_for_all_budgets_that_it_is_the_answer_to(folder, searches):
    made = found(POLICY).plan
    planner = Planner(network(), SHAPE, POLICY, torch.float32, None, CPU, ASSUMED["cpu"], None)
    for gpu in (400_000, 399_000, 350_000, 250_000, 100_000, 401_000, 2**30):
        del searches[:]
        again = found(replace(POLICY, gpu_budget_bytes=gpu, host_budget_bytes=2**29))
        alone = planner.within(gpu, 2**29)
        assert again.plan == alone
        assert again.plan.gpu_budget_bytes == gpu
        if again.plan.segments == made.segments and gpu <= 400_000:
            assert not again.made
            assert len(searches) == 1  # that of `alone`


def _conv_of_others() -> nn.Module:
    module = network()
    module[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False, dtype=torch.float64)
    return module


def _frozen() -> nn.Module:
    module = network()
    module[0].requires_grad_(False)
    return module


def _flag(index: int, name: str, value: object) -> nn.Module:
    module = network()
    setattr(module[index], name, value)
    return module


def _shared() -> nn.Module:
    module = network()
    module[5] = module[2]
    return module


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


OTHERS = {
    "eval": lambda: {"module": network().eval()},
    "one part in eval": lambda: {"module": _flag(1, "training", False)},
    "a frozen layer": lambda: {"module": _frozen()},
    "another dtype of a weight": lambda: {"module": _conv_of_others()},
    "another stride": lambda: {"module": _flag(0, "stride", (2, 2))},
    "an activation in place": lambda: {"module": _flag(2, "inplace", True)},
    "an attribute more": lambda: {"module": _flag(2, "anything", [1, {"x": 2.5}])},
    "a part used twice": lambda: {"module": _shared()},
    "another class": lambda: {"module": nn.Sequential(*network()[:2], nn.GELU(), *network()[3:])},
    "a function of a part": lambda: {"module": _flag(2, "act", torch.nn.functional.gelu)},
    "more tiles": lambda: {"shape": (64, 3, 16, 16)},
    "larger tiles": lambda: {"shape": (32, 3, 32, 32)},
    "a dtype": lambda: {"dtype": torch.float64},
    "autocast": lambda: {"autocast": torch.bfloat16},
    "a device": lambda: {"device": torch.device("cuda")},
    "rates": lambda: {"rates": replace(ASSUMED["cpu"], link=1e9)},
    "the input's cost": lambda: {"source": InputCost(99, True, 9, True)},
    "a mode": lambda: {"policy": replace(POLICY, mode="lean")},
    "an axis": lambda: {"policy": replace(POLICY, axis="spatial")},
    "a chunk size": lambda: {"policy": replace(POLICY, chunk_size=3)},
    "a population": lambda: {"policy": replace(POLICY, bn_population="bag")},
    "compile": lambda: {"policy": replace(POLICY, compile=True)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_has_another_key(case):
    assert key_of(asked()) == key_of(asked())
    assert key_of(asked(**OTHERS[case]())) != key_of(asked())


def test_budgets_and_checks_are_no_part_of_the_key():
    policy = replace(POLICY, gpu_budget_bytes=1, host_budget_bytes=1, check=False)
    assert key_of(asked(policy=policy)) == key_of(asked())


def test_tied_weights_are_told_from_equal_ones():
    tied, apart = _tied(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert key_of(asked(module=tied)) != key_of(asked(module=apart))


@pytest.mark.parametrize("what", ["versions", "code", "file", "format", "switches", "deterministic"])
def test_other_code_and_other_switches_have_another_key(what, monkeypatch):
    before = key_of(asked())
    if what == "versions":
        monkeypatch.setattr(depends, "_version", lambda package: f"{package} 0")
    elif what == "code":
        monkeypatch.setattr(depends, "_own_code", lambda: "another")
    elif what == "file":
        monkeypatch.setattr(depends, "_file_hash", lambda path: "another")
    elif what == "format":
        monkeypatch.setattr(depends, "FORMAT", 0)
    elif what == "switches":
        monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", -7)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert key_of(asked()) != before


class Own(nn.Module):
    """Code whose helpers nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def test_what_is_not_known_whole_has_no_key(monkeypatch):
    cases = [
        {"module": _flag(2, "act", torch.Generator().seed)},
        {"module": nn.Sequential(*network(), Own())},
        {"module": _flag(2, "act", lambda x: x)},
        {"module": _flag(2, "generator", torch.Generator())},
        {"arguments": Arguments(None, (1,))},
        {"policy": replace(POLICY, nvme_path="disk")},
        {"module": nn.Sequential(torch.compile(nn.ReLU()))},
    ]
    for changed in cases:
        with pytest.raises(NoKeyError):
            key_of(asked(**changed))
    monkeypatch.setattr(nn.ReLU, "forward", Own.forward)  # put into torch's class
    with pytest.raises(NoKeyError, match="forward"):
        key_of(asked())


def test_a_plan_without_a_key_is_made_each_time(folder, searches):
    for _ in range(2):
        one = find_plan(nn.Sequential(*network(), Own()), SHAPE, QUICK, device=CPU, rates=ASSUMED["cpu"])
        assert one.made
        assert one.path is None
        assert "a Own of" in one.words
    assert len(searches) == 2
    assert not folder.exists()


@pytest.mark.parametrize("harm", ["cut", "empty", "a byte", "another key", "another format", "no object", "a folder"])
def test_a_damaged_or_foreign_file_is_told_and_made_anew(harm, folder, searches, caplog):
    made = found()
    path, text = made.path, made.path.read_text()
    content = json.loads(text)
    if harm == "cut":
        path.write_text(text[: len(text) // 2])
    elif harm == "empty":
        path.write_text("")
    elif harm == "a byte":
        path.write_text(text.replace('"chunk_size": ', '"chunk_size": 1', 1))
    elif harm in ("another key", "another format"):
        content["body"]["key" if harm == "another key" else "format"] = 7
        content["seal"] = kept._seal(content["body"])
        path.write_text(json.dumps(content))
    elif harm == "no object":
        path.write_text("[1]")
    else:
        path.unlink()
        path.mkdir()
    again = found()
    assert again.made
    assert again.plan == made.plan
    assert len(searches) == 2
    assert "is not a kept plan" in caplog.text
    if harm != "a folder":
        assert not found().made


def test_it_can_be_switched_off(folder, searches):
    found()
    off = found(replace(QUICK, keep_plans=False))
    assert off.made
    assert off.path is None
    assert len(searches) == 2
    assert plan_partition(network(), SHAPE, QUICK, device=CPU, rates=ASSUMED["cpu"]) == off.plan


def test_without_a_folder_to_write_to_plans_are_made(tmp_path, monkeypatch, searches):
    monkeypatch.setattr(kept, "WORTH_S", 0.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert found().made
    monkeypatch.setattr(kept, "cache_path", lambda: None)
    assert "no home" in found().words
    assert len(searches) == 2


def test_the_oldest_go(folder, monkeypatch):
    monkeypatch.setattr(kept, "AT_MOST", 2)
    first = found()
    os.utime(first.path, (1, 1))
    for size in (4, 16):
        found(replace(QUICK, chunk_size=size))
    assert len(list(folder.iterdir())) == 2
    assert not first.path.exists()


def test_those_that_ask_at_once_search_once(folder, monkeypatch):
    planner = Planner(network(), SHAPE, QUICK, torch.float32, None, CPU, ASSUMED["cpu"], None)
    made, budgets = [], Budgets(2**30, 2**30)

    def slow():
        made.append(1)
        return planner.searched(budgets)

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: kept.find("0" * 64, budgets, slow), range(4)))
    assert len(made) == 1
    assert sum(one.made for one in plans) == 1
    assert len({one.plan for one in plans}) == 1
