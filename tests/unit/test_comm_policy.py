import pytest
import torch

import ds_wsi
from ds_wsi.compression import DMGC, Cast, Compressor, TopK
from ds_wsi.compression.comm import HOOK_NAMES, CommPolicy
from ds_wsi.compression.cost import Choice, Link, cast_time, encode_time, fastest, predict
from ds_wsi.compression.residual import Residuals
from ds_wsi.config import read_section

SLOW, FAST = Link(4, 20e6 / 8, 1e-3), Link(4, 100e9 / 8, 1e-5)
NUMEL = 25_000_000


def test_the_section_builds_the_hooks_policies():
    policy = read_section(
        {"compression": {"hook": "dmgc", "keep": 0.02, "clip_norm": 1, "dense_steps": 5, "pull_keep": 0.1}}
    ).compression
    built = policy.build("dmgc")
    assert isinstance(built, Compressor)
    assert isinstance(built.policy, DMGC)
    assert (built.policy.keep, built.policy.pull_keep, built.policy.clip_norm) == (0.02, 0.1, 1.0)
    assert built.policy.schedule.keep_at(4, 0.02) == 1.0
    topk = policy.build("topk")
    assert isinstance(topk, Compressor)
    assert type(topk.policy) is TopK
    cast = policy.build("bf16")
    assert isinstance(cast, Compressor)
    assert cast.policy == Cast(torch.bfloat16)
    assert policy.build("powersgd") is None
    assert CommPolicy().hook == "none", "compression is off unless it is asked for"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"hook": "top-k"}, "ds_wsi.compression: hook must be one of none, auto"),
        ({"keep": 0}, "keep must be in"),
        ({"keep": 0.5, "pull_keep": 2.0}, "pull_keep must be in"),
        ({"topology": "ring"}, "topology must be one of all_gather, sharded, server"),
        ({"pull": "deltas"}, "pull must be one of auto, weights, means"),
        ({"approx_rank": 0}, "approx_rank must be at least 1"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"hooks": "topk"}, "ds_wsi.compression.hooks must be one of"),
    ],
)
def test_a_wrong_section_is_refused(section, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_section({"compression": section})


@pytest.mark.parametrize("topology", ["sharded", "server", "all_gather"])
def test_compression_pays_on_a_slow_link_and_not_on_a_fast_one(topology):
    policy = CommPolicy(keep=0.01, topology=topology)
    assert fastest(predict(policy, NUMEL, SLOW, 0.2, 0.02)) == "dmgc"
    assert fastest(predict(policy, NUMEL, FAST, 0.2, 0.02)) == "none"
    # 6/4 of 4 bytes per value at 2.5 MB/s, and six latencies.
    assert predict(policy, NUMEL, SLOW, 0.2, 0.02)["none"] == pytest.approx(1.5 * 4 * NUMEL / 2.5e6 + 6e-3)


def test_one_process_has_nothing_to_gain():
    seconds = predict(CommPolicy(), NUMEL, Link(1, float("inf"), 0.0), 0.2, 0.02)
    assert seconds["none"] == 0.0
    assert fastest(seconds) == "none"


def test_a_choice_says_its_numbers():
    seconds = predict(CommPolicy(), NUMEL, SLOW, 0.2, 0.02)
    words = str(Choice(fastest(seconds), seconds, SLOW, 0.2))
    assert "dmgc pays" in words
    assert "20 Mbps" in words
    assert "none 60006.0 ms" in words


def test_the_encoder_is_measured():
    assert 0 < encode_time(CommPolicy(), 10_000, 2, torch.device("cpu")) < 1
    assert 0 < cast_time(10_000, torch.device("cpu")) < 1


def test_a_snapshot_of_residuals_undoes_commits():
    residuals = Residuals(momentum=0.5)

    def step():
        pending = residuals.accumulate(["a"], [3], torch.tensor([1.0, 2.0, 3.0]))
        residuals.commit(pending, torch.tensor([2]), pending.corrected[2:].clone())

    step()
    before, snapshot = residuals.state_dict(), residuals.snapshot()
    step()
    assert not torch.equal(residuals.state_dict()["residual.a"], before["residual.a"])
    residuals.restore(snapshot)
    assert all(torch.equal(tensor, before[name]) for name, tensor in residuals.state_dict().items())


def test_the_public_names_are_there_without_the_frameworks_import():
    assert {"register_comm_hook", "attach", "initialize"} <= set(ds_wsi.__all__)
    assert callable(ds_wsi.register_comm_hook)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ds_wsi.nothing
    assert set(HOOK_NAMES) >= {"none", "auto"}
