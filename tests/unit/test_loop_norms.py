"""What norms average over in loops that are not ours: a model is evaluated as it was trained, or somebody is told."""

import logging
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainingArguments

from ds_wsi.config import DsWsiConfig
from ds_wsi.engines.hf.models import SlideModelConfig, SlideModelForSlideClassification
from ds_wsi.engines.hf.trainer import SlideTrainer
from ds_wsi.engines.machine import cpu
from ds_wsi.engines.policies import section
from ds_wsi.engines.policies.loops import Calls, Norms, decide_norms, require_whole_norms
from ds_wsi.models import ModelConfig, SlideModel, build_aggregator, build_model, load_model, save_model
from ds_wsi.norms import NormPolicy, batch_norms, natural_evaluation
from ds_wsi.partition import PartitionPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.slides import TilingPolicy
from ds_wsi.stacking import stack_bags

CONFIG = ModelConfig("test_resnet", "gated_abmil", ("a", "b"), asdict(TilingPolicy(tile_size_px=32)))
AUTO = NormPolicy()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def told():
    """What is logged, one text a record: its level and its words."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")
    level = logger.level
    logger.addHandler(handler), logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler), logger.setLevel(level)


def loaded(model: SlideModel) -> SlideModel:
    """The model, as if its encoder came with weights."""
    for norm in batch_norms(model.encoder):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    return model


def model_of(origin: str, pair: tuple[str, str], folder) -> SlideModel:
    torch.manual_seed(0)
    config = replace(CONFIG, norm_training=pair[0], norm_evaluation=pair[1])
    if origin == "run":
        save_model(folder, config, loaded(build_model(config)).state_dict())
        return load_model(folder)[0]
    if origin == "user":
        return build_model(CONFIG).set_norms(*pair)
    return loaded(build_model(CONFIG)) if origin == "weights" else build_model(CONFIG)


def calls(bags, accumulation=1, processes=1):
    return Calls(bags, accumulation, processes, "here", "more bags")


def warnings(told):
    return [words for words in told if words.startswith("WARNING")]


BAG, STEP = ("bag", "running"), ("step", "running")
CASES = {
    # Nobody said anything: by the weights, and by how many bags the norms see together.
    "scratch, one bag": ("scratch", None, AUTO, calls(1), ("step", "bag"), 1),
    "scratch, accumulation": ("scratch", None, AUTO, calls(1, 4), ("stack", "bag"), 1),
    "scratch, two ranks": ("scratch", None, AUTO, calls(1, 1, 2), ("step", "running"), 1),
    "scratch, two ranks, accumulation": ("scratch", None, AUTO, calls(1, 4, 2), ("stack", "bag"), 1),
    "scratch, eight bags": ("scratch", None, AUTO, calls(8), ("step", "running"), 0),
    "weights, one bag": ("weights", None, AUTO, calls(1), ("frozen", "running"), 0),
    "weights, accumulation": ("weights", None, AUTO, calls(1, 4), ("frozen", "running"), 0),
    # A policy's words stay, with a warning where the model that is exported is another one.
    "asked: by bag": ("scratch", None, NormPolicy("bag"), calls(8), ("bag", "bag"), 1),
    "asked: by bag, running": ("scratch", None, NormPolicy("bag", "running"), calls(8), ("bag", "running"), 2),
    "asked: step, running": ("scratch", None, NormPolicy("step", "running"), calls(1), ("step", "running"), 2),
    "asked: running": ("scratch", None, NormPolicy(evaluation="running"), calls(1), ("step", "running"), 2),
    "asked: frozen, by bag": ("weights", None, NormPolicy("frozen", "bag"), calls(1), ("frozen", "bag"), 1),
    "asked: a stack, by bag": ("scratch", None, NormPolicy("stack", "bag"), calls(8), ("stack", "bag"), 1),
    # What set_norms said stays too.
    "user: by bag, running": ("user", BAG, AUTO, calls(1), BAG, 2),
    "user: step, one bag": ("user", STEP, AUTO, calls(1), STEP, 2),
    "user: by bag": ("user", ("bag", "bag"), AUTO, calls(4), ("bag", "bag"), 1),
    # A run's model is evaluated as before, whatever the loop gives its norms.
    "run: by bag": ("run", ("step", "bag"), AUTO, calls(1), ("step", "bag"), 1),
    "run: by bag, accumulation": ("run", ("step", "bag"), AUTO, calls(1, 4), ("stack", "bag"), 1),
    "run: by bag, eight bags": ("run", ("step", "bag"), AUTO, calls(8), ("step", "bag"), 0),
    "run: step, eight bags": ("run", STEP, AUTO, calls(8), STEP, 0),
    "run: step, one bag": ("run", STEP, AUTO, calls(1), ("frozen", "running"), 0),
    "run: taken anew": ("run", ("step", "recalibrated"), AUTO, calls(1), ("frozen", "running"), 0),
    "run: of before there was a policy": ("run", BAG, AUTO, calls(1), ("frozen", "running"), 0),
    "run: asked for frozen": ("run", ("step", "bag"), NormPolicy("frozen"), calls(1), ("frozen", "running"), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_evaluated_as_it_is_trained_or_somebody_is_told(case, told, tmp_path):
    origin, pair, policy, loop, expected, n_warnings = CASES[case]
    model = model_of(origin, pair or BAG, tmp_path)
    mode = model.training
    assert decide_norms(replace(DsWsiConfig(), norm=policy), model, loop) == Norms(*expected)
    assert model.training == mode
    assert len(warnings(told)) == n_warnings, told
    if expected[0] != "frozen" and n_warnings and case != "asked: a stack, by bag":  # of few bags
        assert "HINT: more bags, norm.training" in warnings(told)[0], told
        assert "GroupNorm" in warnings(told)[0], told
    if n_warnings == 2 or case in ("asked: a stack, by bag", "asked: frozen, by bag"):
        assert "the model that is exported is not the model that is trained" in warnings(told)[-1], told
    if policy == AUTO:
        assert any(words.startswith("INFO norm.") and expected[0] in words for words in told), told


def test_a_model_that_was_saved_as_it_was_built_is_decided_for_as_a_new_one(tmp_path):
    """The folder says bag and running, the defaults; frozen norms of it would normalise nothing."""
    built = SlideModelForSlideClassification(SlideModelConfig.of(CONFIG), build_model(CONFIG))
    built.save_pretrained(tmp_path)
    read = SlideModelForSlideClassification.from_pretrained(tmp_path).slide_model
    assert read.norms_from == "config.json"
    assert decide_norms(DsWsiConfig(), read, calls(8)) == Norms("step", "running")
    assert decide_norms(DsWsiConfig(), loaded(read), calls(8)).training == "frozen"


@pytest.mark.parametrize(
    ("config", "world", "expected"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 1, (4, 8)),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, 2, (4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 2, (4, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": None}, 2, (16, 1)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, 2, (3, 2)),
    ],
)
def test_the_size_that_a_config_leaves_out_is_computed_as_deepspeed_does(config, world, expected):
    assert section._micro_batches(config, world) == expected


def test_one_bag_is_that_bag_whatever_the_population_is_called():
    assert [natural_evaluation(training, 1) for training in ("bag", "stack", "step", "frozen")] == [
        *("bag", "bag", "bag", "running")
    ]
    assert [natural_evaluation(training, 2) for training in ("bag", "stack", "step", "frozen")] == [
        *("bag", "running", "running", "running")
    ]


def test_a_partition_that_plans_each_call_takes_a_stack_on_several_processes():
    policies = replace(DsWsiConfig(), partition=PartitionPolicy(mode="auto"))
    model = model_of("scratch", BAG, None)
    assert decide_norms(policies, model, calls(1, 1, 2)) == Norms("stack", "bag")
    with pytest.raises(ValueError, match=r"norm.training must not be step on several processes.*HINT: name a mode"):
        decide_norms(replace(policies, norm=NormPolicy("step")), model, calls(1, 1, 2))


def test_a_word_that_a_call_cannot_hold_is_refused():
    model = model_of("scratch", BAG, None)
    for policy, words in (
        (
            NormPolicy("step"),
            r"step with gradient_accumulation_steps > 1 here, which calls the model once .*got 4\. HI",
        ),
        (NormPolicy(evaluation="recalibrated"), r"must not be recalibrated here, got .*HINT: `ds-wsi train` does"),
    ):
        with pytest.raises(ValueError, match=words):
            decide_norms(replace(DsWsiConfig(), norm=policy), model, calls(1, 4))


def test_half_precision_of_deepspeed_is_refused_for_batch_norm():
    with pytest.raises(ValueError, match=r"bf16 must be off for BatchNorm under DeepSpeed.*HINT: \"torch_autocast\""):
        require_whole_norms(model_of("scratch", BAG, None), {"bf16": {"enabled": True}})
    require_whole_norms(model_of("scratch", BAG, None), {"bf16": {"enabled": False}})
    require_whole_norms(nn.Sequential(nn.LayerNorm(3)), {"fp16": {"enabled": True}})


def arguments(folder, **options):
    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", **options}
    return TrainingArguments(str(folder), **cpu.trainer_arguments(), **options)


def stained(n_bags=8):
    """A stain each; every second bag has darker spots."""
    generator, bags = torch.Generator().manual_seed(0), []
    for index in range(n_bags):
        tiles = torch.rand(3, 1, 1, generator=generator) * 150 + 60 + torch.randn(6, 3, 32, 32, generator=generator) * 9
        tiles[:, :, 8:16, 8:16] -= 50 * (index % 2)
        bags.append({"tiles": tiles.clamp(0, 255).to(torch.uint8), "labels": index % 2})
    return bags


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_the_hf_trainer_exports_by_default_is_what_it_trained(accumulation, tmp_path):
    torch.manual_seed(0)
    model = SlideModelForSlideClassification(SlideModelConfig.of(CONFIG))
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    given = arguments(tmp_path, num_train_epochs=4, learning_rate=3e-3, **options)
    trainer = SlideTrainer(model, given, train_dataset=stained(), eval_dataset=stained())
    trainer.train()
    exported = trainer.evaluate()["eval_loss"]
    losses = {}
    for evaluation in ("bag", "running"):
        plain = model.slide_model.set_norms(evaluation=evaluation).eval()
        with torch.no_grad():
            logits = torch.cat([plain(stack_bags([bag["tiles"]])).logits for bag in stained()])
        losses[evaluation] = float(F.cross_entropy(logits, torch.tensor([bag["labels"] for bag in stained()])))
    assert exported == pytest.approx(losses["bag"], rel=1e-3)
    assert losses["running"] > losses["bag"] + 0.1, "a cohort that shows it"
    assert model.config.slide_model["norm_evaluation"] == "bag"


def test_the_hf_trainer_evaluates_and_exports_a_run_as_its_config_says(tmp_path):
    """The Trainer does so until it trains the run, whatever it would train."""
    run_model = model_of("run", ("step", "bag"), tmp_path / "run")
    rows = stained(4)
    expected = torch.cat([run_model(stack_bags([bag["tiles"]])).logits for bag in rows])
    for norm in (None, NormPolicy(), NormPolicy("frozen")):
        model = SlideModelForSlideClassification.from_run(tmp_path / "run")
        trainer = SlideTrainer(
            model, arguments(tmp_path, num_train_epochs=1, learning_rate=0.0), train_dataset=rows, norm=norm
        )
        logits = torch.from_numpy(trainer.predict(rows).predictions)
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
        model.export_run(tmp_path / f"back {norm}")
        again = load_model(tmp_path / f"back {norm}")[1]
        assert (again.norm_training, again.norm_evaluation) == ("step", "bag")
        trainer.train()
        frozen = norm is not None and norm.training == "frozen"
        pair = ("frozen", "running") if frozen else ("step", "bag")
        assert (model.slide_model.norm_training, model.slide_model.norm_evaluation) == pair
        assert (model.config.slide_model["norm_training"], model.config.slide_model["norm_evaluation"]) == pair
    model = SlideModelForSlideClassification.from_run(tmp_path / "run")
    SlideTrainer(model, arguments(tmp_path), norm=NormPolicy(evaluation="running"))
    assert model.slide_model.norm_evaluation == "running", "a word is followed at once"


def test_a_saved_transformers_model_keeps_its_pair(tmp_path):
    """Also where the pair is the one that new models have."""
    model = SlideModelForSlideClassification(SlideModelConfig.of(CONFIG))
    SlideTrainer(model, arguments(tmp_path), norm=NormPolicy("bag", "running"))
    model.save_pretrained(tmp_path / "saved")
    again = SlideModelForSlideClassification.from_pretrained(tmp_path / "saved").slide_model
    assert (again.norms_from, again.norm_training, again.norm_evaluation) == ("config.json", "bag", "running")
    assert build_model(CONFIG).norms_from is None


class OneValue(nn.Module):
    """A model whose norm sees one value per channel of each tile."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.net(x)


def test_a_process_without_a_bag_takes_running_statistics_for_its_blank_tile():
    model = SlideModel(OneValue(), build_aggregator("gated_abmil", 4, 2)).set_norms("bag", "bag").train()
    blank = stack_bags([torch.zeros(1, 3, 2, 2)])
    norm = model.encoder.net[2]
    before = norm.running_mean.clone()
    with model.idling():
        assert model(blank).logits.shape == (1, 2)
    assert torch.equal(norm.running_mean, before)
    model(stack_bags([torch.randn(3, 3, 2, 2)]))
    assert not torch.equal(norm.running_mean, before), "it trains as before"
    assert norm.track_running_stats
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.eval()(blank)
