"""SlideModels as Transformers models: saved, loaded, converted, collated; what cannot be right is refused."""

import gc
from dataclasses import asdict, replace

import datasets
import pytest
import torch
from transformers import TrainingArguments

from ds_wsi.engines.hf.models import SlideCollator, SlideModelConfig, SlideModelForSlideClassification
from ds_wsi.engines.hf.step_batches import StepBatches
from ds_wsi.engines.hf.trainer import SlideTrainer
from ds_wsi.engines.machine import cpu
from ds_wsi.models import ModelConfig, build_model, load_model, save_model
from ds_wsi.models.loss import stack_loss
from ds_wsi.norms import NormPolicy
from ds_wsi.slides import TilingPolicy
from ds_wsi.stacking import stack_bags
from ds_wsi.stacking.policy import StackingPolicy

CONFIG = ModelConfig("test_resnet", "clam_sb", ("normal", "tumour"), asdict(TilingPolicy(tile_size_px=32)))
# Not the defaults, so that values that were lost are noticed.
OTHER = ModelConfig("test_resnet", "abmil", ("a", "b", "c"), CONFIG.tiling, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.1)


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make(config=CONFIG):
    torch.manual_seed(0)
    return SlideModelForSlideClassification(SlideModelConfig.of(config))


def tiles(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator) for n in lengths]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_are_those_of_build_model():
    state = make().slide_model.state_dict()
    torch.manual_seed(0)
    assert same(state, build_model(CONFIG).state_dict())


def test_a_saved_model_is_loaded_whole(tmp_path):
    model = make(OTHER)
    model.save_pretrained(tmp_path)
    loaded, info = SlideModelForSlideClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    batch = SlideCollator()([{"tiles": bag} for bag in tiles(3, 2)])
    # The channels' mean and deviation are no weights: they come from the configuration.
    assert same(dict(loaded.named_buffers()), dict(model.named_buffers()))
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["slide_model.aggregator.classifier.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing_keys \['slide_model.aggregator.classifier.bias'\]"):
        SlideModelForSlideClassification.from_pretrained(tmp_path)


def test_both_kinds_of_folders_are_converted_and_told_apart(tmp_path):
    torch.manual_seed(2)
    run = build_model(OTHER)
    save_model(tmp_path / "run", OTHER, run.state_dict())
    model = SlideModelForSlideClassification.from_run(tmp_path / "run")
    assert same(model.slide_model.state_dict(), run.state_dict())
    model.save_pretrained(tmp_path / "hf")
    SlideModelForSlideClassification.from_pretrained(tmp_path / "hf").export_run(tmp_path / "back")
    back, config = load_model(tmp_path / "back")
    assert same(back.state_dict(), run.state_dict())
    assert config.mean == OTHER.mean
    for call, words in (
        (lambda: model.save_pretrained(tmp_path / "run"), r"save_pretrained's folder must hold"),
        (lambda: model.export_run(tmp_path / "hf"), r"export_run's folder must hold"),
        (lambda: SlideModelForSlideClassification.from_pretrained(tmp_path / "run"), r"HINT: .*from_run"),
        (lambda: load_model(tmp_path / "hf"), r"HINT: what save_pretrained wrote"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_loss_counts_the_bags_of_the_step():
    model = make().eval()
    bags, labels = tiles(3, 2, 4), torch.tensor([1, -100, 0])
    stack = stack_bags(bags)
    counted = stack_bags([bags[0], bags[2]])
    expected = stack_loss(model.slide_model(counted, labels[[0, 2]]), labels[[0, 2]])
    assert model.slide_model(counted, labels[[0, 2]]).auxiliary_loss is not None
    torch.testing.assert_close(model(*stack, labels, num_items_in_batch=7).loss, expected / 7)
    torch.testing.assert_close(model(*stack, labels).loss, expected / 2)


def test_a_rank_without_a_bag_takes_part_and_changes_nothing():
    model = make().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    empty = torch.zeros(0, dtype=torch.int64)
    model(*stack_bags(tiles(1)), empty, num_items_in_batch=4).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(part.training for part in model.modules())


def test_a_stack_that_was_cut_is_refused():
    stack = stack_bags(tiles(2, 2))
    with pytest.raises(ValueError, match=r"labels must be one per bag, int64 \[2\], got shape \[1\].*dispatch_batches"):
        make()(*stack, torch.tensor([1]))


def test_items_become_a_stack():
    bags = tiles(3, 2)
    batch = SlideCollator()([{"tiles": bag.tolist(), "label": 1} for bag in bags])
    assert list(batch) == ["labels", "cu_seqlens", "values"]  # the Trainer counts examples by the first
    assert batch["values"].dtype == torch.uint8
    assert torch.equal(batch["values"], torch.cat(bags))
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    features = [torch.randn(4, 8), torch.randn(1, 8)]
    batch = SlideCollator()([(bag, 1, "slide") for bag in features])
    assert torch.equal(batch["values"], torch.cat(features))
    assert SlideCollator()([{"features": [[0.5, 1.0]]}])["values"].dtype == torch.float32
    for items, words in (
        ([{"pixels": bags[0]}], r"item 0 must hold either tiles or features, got \['pixels'\]"),
        ([{"tiles": bags[0].long() * 2}], r"tiles must be 0 to 255"),
        ([{"tiles": bags[0], "labels": 1}, {"tiles": bags[1]}], r"items must have a label each"),
    ):
        with pytest.raises(ValueError, match=words):
            SlideCollator()(items)


@pytest.mark.parametrize("stacking", [None, StackingPolicy(bags_per_step=7, balance="lpt")])
def test_every_bag_is_dealt_once_an_epoch(stacking):
    layout = {"seed": 3, "world_size": 3, "bags_per_rank": 2, "accumulation": 2, "stacking": stacking}
    layout["lengths"] = [1 + index % 9 for index in range(23)]
    ranks = [StepBatches(23, rank=rank, **layout) for rank in range(3)]
    orders = []
    for epoch in (0, 1):
        for batches in ranks:
            batches.set_epoch(epoch)
        dealt = [list(batches) for batches in ranks]
        assert {len(of_rank) for of_rank in dealt} == {len(ranks[0])}
        assert sorted(bag for of_rank in dealt for micro in of_rank for bag in micro) == list(range(23))
        orders.append(dealt)
    assert orders[0] != orders[1]
    dropped = StepBatches(23, rank=0, drop_last=True, **layout)
    assert len(dropped) == 2 * (23 // (7 if stacking else 12))
    with pytest.raises(ValueError, match=r"must hold a step's bags, (7|12), got 5"):
        StepBatches(5, rank=0, drop_last=True, **layout)


def arguments(folder, **options):
    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd", **options}
    return TrainingArguments(str(folder), **cpu.trainer_arguments(), **options)


def test_a_dataset_of_columns_trains(tmp_path):
    gc.collect()
    rows = datasets.Dataset.from_dict({"tiles": [bag.numpy() for bag in tiles(3, 2, 4)], "label": [0, 1, 0]})
    model = make()
    before = model.slide_model.encoder.conv1[0].weight.clone()
    trainer = SlideTrainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows, eval_dataset=rows)
    assert trainer.train().global_step == 1
    assert not torch.equal(model.slide_model.encoder.conv1[0].weight, before)
    assert trainer.predict(rows).predictions.shape == (3, 2)


def test_a_count_of_each_rank_alone_is_refused_where_there_are_several(tmp_path, monkeypatch):
    rows = [{"tiles": bag, "labels": 1} for bag in tiles(2, 2)]
    SlideTrainer(make(), arguments(tmp_path, average_tokens_across_devices=False), train_dataset=rows)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    with pytest.raises(ValueError, match=r"average_tokens_across_devices must be True"):
        SlideTrainer(make(), arguments(tmp_path, average_tokens_across_devices=False), train_dataset=rows)


def test_what_would_be_another_gradient_is_refused(tmp_path):
    rows = [{"tiles": bag, "labels": 1} for bag in tiles(2, 2)]
    for options, keywords, words in (
        ({"label_smoothing_factor": 0.1}, {}, r"label_smoothing_factor must be 0, got 0.1"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, r"dispatch_batches: they cut batches by rows"),
        ({}, {"compute_loss_func": lambda *_: None}, r"compute_loss_func must be None"),
    ):
        with pytest.raises(ValueError, match=words):
            SlideTrainer(make(), arguments(tmp_path, **options), train_dataset=rows, **keywords)
    with pytest.raises(ValueError, match=r"model must be a SlideModelForSlideClassification, got SlideModel"):
        SlideTrainer(make().slide_model, arguments(tmp_path), train_dataset=rows)
    trainer = SlideTrainer(make(), arguments(tmp_path, max_steps=1), train_dataset=iter(rows))
    with pytest.raises(ValueError, match=r"train_dataset must have a length and rows"):
        trainer.get_train_dataloader()


class Arguments:
    """What of TrainingArguments the policies read."""

    class deepspeed_plugin:  # noqa: N801
        deepspeed_config: dict = {}  # noqa: RUF012


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"partition": {"mode": "auto"}}, r'ds_wsi.partition.mode must not be "auto" under the HF Trainer'),
        ({"tile_parallel": {"size": 2}}, r"ds_wsi.tile_parallel.size must be 1 under the HF Trainer"),
        ({"stacking": {"framework": "padding"}}, r"ds_wsi.stacking.framework must be dpgs or classic"),
        ({"stackin": {}}, r"ds_wsi.stackin must be one of"),
    ],
)
def test_sections_that_the_trainer_cannot_follow_are_refused(section, words):
    from ds_wsi.engines.hf.trainer import apply_policies

    given = Arguments()
    given.deepspeed_plugin.deepspeed_config = {"ds_wsi": section}
    with pytest.raises(ValueError, match=words):
        apply_policies(make(), given)


def test_a_deepspeed_config_that_would_do_something_else_is_refused(tmp_path):
    rows = [{"tiles": bag, "labels": 1} for bag in tiles(2, 2)]

    def refused(config, words, hf_deepspeed_config=None, **options):
        given = arguments(tmp_path, **options)
        given.hf_deepspeed_config = hf_deepspeed_config
        given.deepspeed_plugin = type("Plugin", (), {"deepspeed_config": config})
        with pytest.raises(ValueError, match=words):
            SlideTrainer(make(), given, train_dataset=rows)

    refused({}, r"label_smoothing_factor", label_smoothing_factor=0.1)
    stage = {"zero_optimization": {"stage": 2}}
    refused(stage, r"gradient_clipping of the DeepSpeed config must be there", max_grad_norm=0)
    halving = type("Config", (), {"dtype": lambda _: torch.float16, "is_true": lambda *_: False})()
    refused(stage, r"fp16 of the DeepSpeed config must be there, got none.*HINT", hf_deepspeed_config=halving)
    refused(stage | {"bf16": {"enabled": True}}, r"bf16 must be off for BatchNorm under DeepSpeed.*torch_autocast")


def test_a_stacking_policy_needs_lengths_and_its_workers(tmp_path):
    rows = [{"tiles": bag, "labels": 1} for bag in tiles(2, 2)]
    trainer = SlideTrainer(make(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=rows)
    for stacking, words in (
        (StackingPolicy(bags_per_step=2), r"train_dataset must have an attribute lengths, or a column 'length'"),
        (StackingPolicy(virtual_workers=3), r"virtual_workers must be gradient_accumulation_steps, 2, got 3"),
    ):
        trainer.policies = replace(trainer.policies, stacking=stacking)
        with pytest.raises(ValueError, match=words):
            trainer.get_train_dataloader()


def test_norms_are_trained_and_kept_as_the_policy_says(tmp_path):
    """Fresh statistics: the step's bags, or those of a micro-step; loaded ones stay; the configuration says so."""
    rows = [{"tiles": bag, "labels": index} for index, bag in enumerate(tiles(2, 2))]

    def trained(model, norm=None, **options):
        trainer = SlideTrainer(model, arguments(tmp_path, **options), train_dataset=rows, norm=norm)
        assert trainer.args.ddp_broadcast_buffers is False
        return tuple(model.config.slide_model[f"norm_{name}"] for name in ("training", "evaluation"))

    assert trained(make()) == ("step", "running")  # of eight bags
    assert trained(make(), gradient_accumulation_steps=2) == ("stack", "running")
    assert trained(make(), gradient_accumulation_steps=2, per_device_train_batch_size=1) == ("stack", "bag")
    loaded = make()
    next(part for part in loaded.modules() if isinstance(part, torch.nn.BatchNorm2d)).running_mean.add_(1)
    assert trained(loaded) == ("frozen", "running")
    assert trained(make(), NormPolicy("bag")) == ("bag", "bag")
    for options, words in (
        (
            {"norm": NormPolicy("step"), "gradient_accumulation_steps": 2},
            "norm.training must not be step with gradient",
        ),
        ({"norm": NormPolicy(evaluation="recalibrated")}, "norm.evaluation must not be recalibrated"),
        ({"ddp_broadcast_buffers": True}, "ddp_broadcast_buffers must not be True"),
    ):
        with pytest.raises(ValueError, match=words):
            trained(make(), **options)
    model = make()
    trained(model, NormPolicy("bag"))
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").slide_model
    assert (again.norm_training, again.norm_evaluation) == ("bag", "bag")
