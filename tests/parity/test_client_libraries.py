"""Training code of timm, transformers and peft with `partition_layers` added is where it would be without."""

import numpy as np
import pytest
import timm
import torch
from client_cases import CLASSES, MODES, SIDE, assert_same, batches, both, learn, network, partition, sgd
from peft import LoraConfig, get_peft_model
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.modeling_vit import ViTLayer

# timm


@pytest.mark.parametrize(
    ("clip", "mode"), [("norm", "lean"), ("norm", "recompute"), ("value", "lean"), ("agc", "lean")]
)
def test_timms_train_loop_with_mixup_clipping_and_ema(clip, mode):
    def loop(model):
        np.random.seed(0)
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES, label_smoothing=0.1)
        optimizer = create_optimizer_v2(model, "sgd", lr=0.05, momentum=0.9, weight_decay=0.05)
        average = ModelEmaV3(model, decay=0.8)
        for index, (x, target) in enumerate(batches(3, 6)):  # mixup asks for an even number
            mixed, soft = mixup(x.float(), target)
            SoftTargetCrossEntropy()(model(mixed.double()), soft).backward()
            dispatch_clip_grad(model.parameters(), 0.5, mode=clip)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model, step=index)
        average.module.eval()
        with torch.no_grad():
            out = average.module(next(batches())[0])
        return {**average.module.state_dict(), "out": out}

    both(network(), loop, mode=mode)


def test_layer_decay_on_a_vit():
    def loop(model):
        optimizer = create_optimizer_v2(model, "lamb", lr=0.01, weight_decay=0.05, layer_decay=0.7)
        learn(model, optimizer)

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIDE).double()
    both(model, loop)


def test_frozen_norms_of_timm():
    def loop(model):
        learn(model, sgd(model))

    model = network()
    timm.utils.freeze(model, ["layer1"], include_bn_running_stats=True)
    both(model, loop)


# transformers


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=8,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).double().train()


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config).double().train()


def keyword_loop(model):
    optimizer = sgd(model)
    for x, target in batches():
        optimizer.zero_grad()
        model(pixel_values=x, labels=target).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [vit, resnet])
def test_keyword_inputs_and_model_outputs(build, mode):
    both(build(), keyword_loop, lambda model: model.base_model, mode)


def test_layers_of_a_transformers_encoder():
    plain, parted = vit(), vit()
    layers = [part for part in parted.modules() if isinstance(part, ViTLayer)]
    assert len(layers) == 2
    for layer in layers:
        partition(layer, "recompute")
    keyword_loop(plain)
    keyword_loop(parted)
    assert_same(parted, plain)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.target = next(batches(1, 12))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": self.target[index]}


@pytest.mark.parametrize("build", [vit, resnet])
def test_transformers_trainer(build, tmp_path):
    def loop(model):
        arguments = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=1,
            max_steps=3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        Trainer(model, arguments, train_dataset=Rows(), optimizers=(sgd(model), None)).train()

    both(build(), loop, lambda model: model.base_model)


def test_convolutions_with_low_rank_adapters_of_peft():
    net = network()
    names = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)][1:4]
    adapted = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=names)).double().train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero by default, and then the adapters' inputs have no gradient
    both(adapted, lambda model: learn(model, sgd(model)))
