"""Every setting says what it decides, and whatever decides the result is neither resumed, taken up nor pooled."""

import json
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as of_hypothesis
from hypothesis import strategies as st

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.config import DsWsiConfig
from ds_wsi.runtime.setting import FLAG, SWITCH, Decides, setting
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.training import record, run_mark, setting_list
from ds_wsi.training.record import _group_settings
from ds_wsi.training.run_mark import identity
from ds_wsi.training.same_run import differences, known_early, of_settings
from ds_wsi.training.setting_list import SETTINGS, has_effect, needed_words, sibling, value_at
from ds_wsi.training.settings import TrainSettings

DECIDING = [field_path for field_path, one in SETTINGS.items() if one.setting.decides is Decides.RESULT]
# Settings that decide by what they stand for, with others, on which tiles a model is tested, or a run's name.
INDIRECT = (Decides.RESOLVED, Decides.STEP, Decides.TEST, Decides.NAME)
# A demo is known by the manifest that it writes; of the ways to see tissue there is one version so far.
OF_ONE_VALUE = ("data.demo", "policies.tiling.tissue_version")
# What stands for a setting is known before a slide is opened; the rest needs slides, features or an encoder.
EARLY = ("tiling", "dropout", "aggregator_options", "encoder_learning_rate", "from_tile_store", "encoder_weights")
# What a value needs to be taken at all.
COMPANIONS = {
    "optim.momentum": {"optim.optim": "sgd"},
    "policies.norm.affine": {"policies.norm.training": "frozen"},
    "model.freeze_encoder_epochs": {"model.freeze_encoder": False},
    "run.eval_runs": {"run.eval_tiles": 3},
    **{
        f"task.{name}": {"task.task": "survival"}
        for name in ("time_column", "event_column", "censorship_column", "strata_column", "time_unit")
    },
}
WORDS = {
    "model.encoder": ["resnet10t", "resnet50"],
    "model.freeze_until": ["layer1", "layer2"],
    "policies.compression.values": ["fp32", "fp16"],
    "policies.compression.topology": ["sharded", "server"],
    "policies.compression.pull": ["auto", "weights", "means"],
    "data.manifest": ["a.csv", "b.csv"],
    "data.classes": [("a", "b"), ("b", "a")],
    "data.positive_class": ["a", "b"],
    "data.slide_mpp": [None, 0.25, 0.5],
    "data.tissue_masks": [None, "masks", "corrected"],
    "data.features_dir": [None, "uni", "gigapath"],
    "data.dataset_name": ["panda", "lung"],
    "data.split_name": ["0", "1"],
    "policies.tiling.grey_range": [(3, 230), (3, 220)],
    "policies.reading.tile_store": ["", "store"],
    "policies.partition.axis": ["batch", "spatial"],
    "policies.partition.bn_population": ["stack", "bag"],
    "model.encoder_weights": [None, "a.safetensors", "b.safetensors"],
    "model.dropout": [None, 0.1, 0.25],
    "model.aggregator_options": [(), (("hidden_dim", 64),), (("hidden_dim", 32),)],
    "model.encoder_options": [(), (("width", 64),), (("width", 32),)],
    "optim.encoder_learning_rate": [1e-5, 1e-4],
    "optim.distill": [None, "frozen", "older"],
    "run.deepspeed": ["a.json", "b.json"],
    "task.time_bins": [2, 4, 6],
    "task.label_column": [("score",), ("grade",)],
    "task.time_column": ["months", "days"],
    "task.event_column": ["died", "relapsed"],
    "task.censorship_column": ["alive", "lost"],
    "task.strata_column": [None, "center"],
    "run.eval_tiles": [None, 64, 256],
}


def with_values(base, values):
    """Settings with these at their places, set together."""
    for owner in {field_path.rpartition(".")[0] for field_path in values}:
        fields = {
            field_path.rpartition(".")[2]: value
            for field_path, value in values.items()
            if field_path.rpartition(".")[0] == owner
        }
        group, _, policy = owner.partition(".")
        if policy:
            policies = replace(base.policies, **{policy: replace(getattr(base.policies, policy), **fields)})
            base = replace(base, policies=policies)
        else:
            base = replace(base, **{group: replace(getattr(base, group), **fields)})
    return base


def values_of(field_path):
    """Values that a setting may have."""
    one = SETTINGS[field_path]
    kind, default = one.setting.kind, one.default
    if field_path in WORDS:
        return st.sampled_from(WORDS[field_path])
    if isinstance(kind, tuple):
        return st.sampled_from(kind)
    if kind in (FLAG, SWITCH):
        return st.booleans()
    if field_path == "optim.class_weights":
        return st.none() | st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.just(1.0))
    if field_path == "data.mpps":
        return st.sampled_from([(0.5, 2.0), (0.25, 1.0), (0.5, 1.0, 2.0)])
    if field_path == "data.scale_ratio":
        return st.sampled_from([(4, 1), (1, 1), (2, 3)])
    if field_path == "model.lora_targets":
        return st.sampled_from([("qkv",), ("qkv", "proj"), ("fc1",)])
    if isinstance(default, float):
        return st.sampled_from([0.0625, 0.125, 0.25, 0.5])
    return st.integers(1, 8)


def needed(field_path):
    """Values of other settings with which this one has an effect."""
    needs = SETTINGS[field_path].setting.needs
    if needs is None:
        return {}
    name, values = needs
    other = sibling(field_path, name)
    return {
        other: values[0]
        if values
        else {
            "model.lora_rank": 4,
            "policies.augment.blur": 1.0,
            "data.mpps": (0.5, 2.0),
            "optim.distill": "frozen",
        }[other]
    }


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


@pytest.mark.parametrize("field_path", DECIDING)
@given(data=st.data())
@of_hypothesis(max_examples=5, deadline=None)
def test_runs_that_differ_in_what_decides_are_not_resumed_taken_up_or_pooled(field_path, data, manifest):
    base = with_values(
        TrainSettings(), {"data.manifest": manifest, **needed(field_path), **COMPANIONS.get(field_path, {})}
    )
    assert has_effect(base, field_path)
    one = data.draw(values_of(field_path))
    other = data.draw(values_of(field_path).filter(lambda value: value != one))
    run_one, run_other = (with_values(base, {field_path: value}) for value in (one, other))
    as_json = [json.loads(json.dumps(of_settings(given_settings))) for given_settings in (run_one, run_other)]
    assert any(field_path.rpartition(".")[2] in line for line in differences(*as_json)), "resumed"
    assert identity(run_one, None) != identity(run_other, None), "taken up by a protocol"
    if not SETTINGS[field_path].setting.column:
        assert _group_settings(as_run(run_one)) != _group_settings(as_run(run_other)), "pooled"


@pytest.mark.parametrize(
    "field_path",
    [
        field_path
        for field_path, one in SETTINGS.items()
        if one.setting.decides in INDIRECT and field_path not in OF_ONE_VALUE
    ],
)
@given(data=st.data())
@of_hypothesis(max_examples=5, deadline=None)
def test_runs_that_differ_in_what_decides_indirectly_are_not_taken_up_or_pooled(field_path, data, manifest):
    one = SETTINGS[field_path].setting
    base = with_values(TrainSettings(), {"data.manifest": manifest, **COMPANIONS.get(field_path, {})})
    first = data.draw(values_of(field_path))
    other = data.draw(values_of(field_path).filter(lambda value: value != first))
    run_one, run_other = (with_values(base, {field_path: value}) for value in (first, other))
    if field_path not in run_mark._ELSEWHERE:
        assert identity(run_one, None) != identity(run_other, None), "taken up by a protocol"
    if one.decides is Decides.RESOLVED and not one.column and field_path not in record._ELSEWHERE:
        assert _group_settings(as_run(run_one)) != _group_settings(as_run(run_other)), "pooled"
    if one.resolved in EARLY:
        assert differences(known_early(run_one, 1), known_early(run_other, 1)), "resumed"
    sizes = [given_settings.step_layout(1).bags_per_step for given_settings in (run_one, run_other)]
    if sizes[0] != sizes[1]:
        assert _group_settings(as_run(run_one)) != _group_settings(as_run(run_other)), "pooled"
        assert differences(known_early(run_one, 1), known_early(run_other, 1)), "resumed"


def test_what_is_compared_elsewhere_is_a_setting_and_compared():
    cuts = {f"policies.partition.{name}" for name in ("mode", "axis", "chunk_size")}
    mark, pooled = set(run_mark._ELSEWHERE), set(record._ELSEWHERE)
    assert mark - cuts == {"data.manifest", "run.deepspeed", "run.validate_beside"}
    resolved = {field_path for field_path, one in SETTINGS.items() if one.setting.decides is Decides.RESOLVED}
    assert not pooled - {*resolved, "run.eval_precision", "run.early_stopping_patience"}
    base = with_values(TrainSettings(), {"run.early_stopping_patience": 3})
    beside = with_values(base, {"run.validate_beside": True})
    assert of_settings(base)["early_stopping"] != of_settings(beside)["early_stopping"]
    assert _group_settings(as_run(base)) != _group_settings(as_run(beside))


def test_another_table_and_another_deepspeed_json_are_another_protocol(manifest, tmp_path):
    base = with_values(TrainSettings(), {"data.manifest": manifest})
    (tmp_path / "m.csv").write_text("slide_id,path,label\ns,s.svs,b\n")
    other = with_values(TrainSettings(), {"data.manifest": str(tmp_path / "m.csv")})
    assert identity(base, None) != identity(other, None)
    assert identity(base, {"optimizer": {"type": "Adam"}}) != identity(base, {"optimizer": {"type": "AdamW"}})


def test_every_group_and_policy_of_a_run_is_one_whose_fields_are_declared():
    groups = {f"policies.{entry.name}" for entry in fields(DsWsiConfig)}
    groups |= {entry.name for entry in fields(TrainSettings) if entry.name != "policies"}
    assert groups == setting_list.OWNERS.keys()


def test_a_setting_must_say_what_it_decides():
    with pytest.raises(TypeError, match="decides"):
        setting(0, "words")


@pytest.mark.parametrize("field_path", [field_path for field_path, one in SETTINGS.items() if one.setting.needs])
def test_what_has_no_effect_decides_nothing(field_path):
    base = TrainSettings()
    assert not has_effect(base, field_path)
    assert needed_words(field_path).startswith("--")
    other = {True: False, False: True}.get(value_at(base, field_path))
    other = SETTINGS[field_path].default * 2 if isinstance(SETTINGS[field_path].default, int | float) else other
    if other and other != value_at(base, field_path) and SETTINGS[field_path].setting.kind is not None:
        assert of_settings(with_values(base, {field_path: other})) == of_settings(base)


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
    settings = [of_settings(replace(TrainSettings(), policies=policies)) for policies in (other, base)]
    (line,) = differences(*settings)
    assert line == "policies.compression.momentum must be the checkpoint's, 0.0, to continue it exactly, got 0.5"


def test_how_bags_are_dealt_is_no_part_of_the_result():
    dealt = replace(TrainSettings().policies, stacking=StackingPolicy(balance="round_robin"))
    assert of_settings(replace(TrainSettings(), policies=dealt)) == of_settings(TrainSettings())


def test_defaults_are_those_of_a_run():
    """Also of a policy whose own default, used alone, is another."""
    for field_path, one in SETTINGS.items():
        assert value_at(TrainSettings(), field_path) == one.default, field_path
