"""Every setting says what it decides, and whatever decides the result is neither resumed, taken up nor pooled."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.runtime.setting import FLAG, SWITCH, Decides, setting
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training import setting_list
from ds_wsi.training.record import _group_settings
from ds_wsi.training.run_mark import identity
from ds_wsi.training.same_run import differences, of_settings
from ds_wsi.training.setting_list import SETTINGS, has_effect, needed_words, sibling, value_at
from ds_wsi.training.settings import TrainSettings

DECIDING = [place for place, one in SETTINGS.items() if one.setting.decides is Decides.RESULT]
# What a value needs to be taken at all.
COMPANIONS = {
    "optim.momentum": {"optim.optim": "sgd"},
    "policies.norm.affine": {"policies.norm.training": "frozen"},
    "model.freeze_encoder_epochs": {"model.freeze_encoder": False},
    "run.eval_runs": {"run.eval_tiles": 3},
}
WORDS = {
    "model.encoder": ["resnet10t", "resnet50"],
    "model.freeze_until": ["layer1", "layer2"],
    "policies.compression.values": ["fp32", "fp16"],
    "policies.compression.topology": ["sharded", "server"],
    "policies.compression.pull": ["auto", "weights", "means"],
}


def with_values(base, values):
    """Settings with these at their places, set together."""
    for owner in {place.rpartition(".")[0] for place in values}:
        fields = {
            place.rpartition(".")[2]: value for place, value in values.items() if place.rpartition(".")[0] == owner
        }
        group, _, policy = owner.partition(".")
        if policy:
            policies = replace(base.policies, **{policy: replace(getattr(base.policies, policy), **fields)})
            base = replace(base, policies=policies)
        else:
            base = replace(base, **{group: replace(getattr(base, group), **fields)})
    return base


def values_of(place):
    """Values that a setting may have."""
    one = SETTINGS[place]
    kind, default = one.setting.kind, one.default
    if place in WORDS:
        return st.sampled_from(WORDS[place])
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if kind in (FLAG, SWITCH):
        return st.booleans()
    if place == "optim.class_weights":
        return st.none() | st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.just(1.0))
    if place == "model.lora_targets":
        return st.sampled_from([("qkv",), ("qkv", "proj"), ("fc1",)])
    if isinstance(default, float):
        return st.sampled_from([0.0625, 0.125, 0.25, 0.5])
    return st.integers(1, 8)


def needed(place):
    """Values of other settings with which this one has an effect."""
    needs = SETTINGS[place].setting.needs
    if needs is None:
        return {}
    name, values = needs
    other = sibling(place, name)
    return {other: values[0] if values else {"model.lora_rank": 4, "policies.augment.blur": 1.0}[other]}


def as_run(given_settings):
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    config = SimpleNamespace(norm_training="step", encoder="resnet10t")
    comm = SimpleNamespace(name=given_settings.policies.compression.hook)
    layout = given_settings.step_layout(1)
    return SimpleNamespace(settings=given_settings, config=config, comm=comm, step_layout=layout, optimizer=optimizer)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = tmp_path_factory.mktemp("cohort") / "m.csv"
    path.write_text("slide_id,path,label\ns,s.svs,a\n")
    return str(path)


@pytest.mark.parametrize("place", DECIDING)
@given(data=st.data())
@of_hypothesis(max_examples=5, deadline=None)
def test_runs_that_differ_in_what_decides_are_not_resumed_taken_up_or_pooled(place, data, manifest):
    base = with_values(TrainSettings(), {"data.manifest": manifest, **needed(place), **COMPANIONS.get(place, {})})
    assert has_effect(base, place)
    one = data.draw(values_of(place))
    other = data.draw(values_of(place).filter(lambda value: value != one))
    ours, theirs = (with_values(base, {place: value}) for value in (one, other))
    as_json = [json.loads(json.dumps(of_settings(given_settings))) for given_settings in (ours, theirs)]
    assert any(place.rpartition(".")[2] in line for line in differences(*as_json)), "resumed"
    assert identity(ours, None) != identity(theirs, None), "taken up by a protocol"
    if not SETTINGS[place].setting.column:
        assert _group_settings(as_run(ours)) != _group_settings(as_run(theirs)), "pooled"


@pytest.mark.parametrize("place", [place for place, one in SETTINGS.items() if one.setting.needs])
def test_what_has_no_effect_decides_nothing(place):
    base = TrainSettings()
    assert not has_effect(base, place)
    assert needed_words(place).startswith("--")
    other = {True: False, False: True}.get(value_at(base, place))
    other = SETTINGS[place].default * 2 if isinstance(SETTINGS[place].default, int | float) else other
    if other and other != value_at(base, place) and SETTINGS[place].setting.kind is not None:
        assert of_settings(with_values(base, {place: other})) == of_settings(base)


def test_a_field_that_is_not_declared_is_refused(monkeypatch):
    @dataclass
    class Policy:
        new: int = 0

    monkeypatch.setattr(setting_list, "OWNERS", {"data": (Policy, "slides")})
    with pytest.raises(TypeError, match=r"Policy\.new must be declared by setting\(\)"):
        setting_list._declared()


def test_a_setting_that_is_resolved_says_by_what():
    with pytest.raises(TypeError, match="what it is compared by"):
        setting(0, "words", Decides.RESOLVED)
    with pytest.raises(TypeError, match="what it is compared by"):
        setting(0, "words", Decides.RESULT, resolved="slides")


def test_another_compression_is_not_resumed_without_a_word():
    base = replace(TrainSettings().policies, compression=CommPolicy(hook="dmgc"))
    other = replace(base, compression=CommPolicy(hook="dmgc", momentum=0.5))
    found = [of_settings(replace(TrainSettings(), policies=policies)) for policies in (other, base)]
    (line,) = differences(*found)
    assert line == "policies.compression.momentum must be the checkpoint's, 0.0, to continue it exactly, got 0.5"


def test_how_bags_are_dealt_is_no_part_of_the_result():
    dealt = replace(TrainSettings().policies, stacking=StackingPolicy(balance="round_robin"))
    assert of_settings(replace(TrainSettings(), policies=dealt)) == of_settings(TrainSettings())


def test_defaults_are_those_of_a_run():
    """Also of a policy whose own default, used alone, is another."""
    for place, one in SETTINGS.items():
        assert value_at(TrainSettings(), place) == one.default, place
