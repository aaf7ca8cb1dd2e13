"""Other people's training code with `partition_layers` added: after a few optimizer steps it is where it was without.

Small loops in the manner of the libraries' users. Lightning and MONAI need not be installed: what their code does to a
module is written out. Each loop runs twice from the same weights, untouched and with one part partitioned, in float64.
"""

import copy
import io

import numpy as np
import pytest
import timm
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.modeling_vit import ViTLayer

from ds_wsi.partition import PartitionPolicy, partition_layers

TOLERANCE = 1e-9  # relative, in float64, after a few steps
TILES, SIDE, CLASSES, STEPS = 7, 32, 3, 3
MODES = ("lean", "recompute")


def partition(part, mode):
    """What a user adds to a loop."""
    return partition_layers(part, PartitionPolicy(mode=mode, chunk_size=3))


def network(classes=CLASSES, name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes).double().train()


def batches(count=STEPS, tiles=TILES):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(tiles, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
        yield x, torch.randint(0, CLASSES, (tiles,), generator=generator)


def sgd(model, rate=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)


def learn(model, optimizer, count=STEPS):
    for x, target in batches(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def assert_same(one, other):
    """Two modules, or state dicts, with the same numbers."""
    one, other = (item.state_dict() if isinstance(item, nn.Module) else item for item in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value.is_floating_point():
            scale = other[name].abs().max().clamp_min(1e-3)
            assert (value - other[name]).abs().max() <= TOLERANCE * scale, name
        else:
            assert torch.equal(value, other[name]), name


def assert_it_learned(before, after):
    assert max((before[name] - value).abs().max().item() for name, value in after.items()) > 1e-3


def both(model, loop, part=lambda model: model, mode="lean"):
    """The loop on an untouched copy and on a partitioned one; whatever else it returns must be the same too."""
    start = copy.deepcopy(model.state_dict())
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    partition(part(ours), mode)
    results = [loop(each) for each in (plain, ours)]
    assert_same(ours, plain)
    assert_it_learned(start, ours.state_dict())
    if results[0] is not None:
        assert_same(results[1], results[0])
    return plain, ours


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_loop(mode):
    both(network(), lambda model: learn(model, sgd(model)), mode=mode)


# Lightning


def freeze(module):
    """`BaseFinetuning.freeze(module, train_bn=False)`: a frozen BatchNorm stays in train mode, without tracking."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = False
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad = False


def unfreeze(module):
    """`BaseFinetuning.make_trainable`."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = True
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad = True


class Classifier(nn.Module):
    """A LightningModule's two parts: features of tiles, and a head."""

    def __init__(self):
        super().__init__()
        self.features = network(0)
        self.head = nn.Linear(self.features.num_features, CLASSES).double()

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("mode", MODES)
def test_finetuning_that_freezes_and_unfreezes_as_lightning_does(mode):
    def loop(model):
        freeze(model.features)
        optimizer = sgd(model)
        learn(model, optimizer)
        frozen = copy.deepcopy(model.features.state_dict())
        unfreeze(model.features)
        optimizer.add_param_group({"params": list(model.features.parameters()), "lr": 0.01})
        learn(model, optimizer)
        model.eval()  # validation between epochs
        with torch.no_grad():
            validated = model(next(batches())[0])
        model.train()
        learn(model, optimizer, 1)
        return {**frozen, "validated": validated}

    both(Classifier(), loop, lambda model: model.features, mode)


class NormsInEvaluation(nn.Module):
    """`train()` overridden so that norms stay in evaluation mode, as detection's backbones do (`norm_eval`)."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
        return self

    def forward(self, x):
        return self.body(x)


def test_norms_that_stay_in_evaluation_mode():
    plain, _ = both(NormsInEvaluation().train(), lambda model: learn(model.train(), sgd(model)))
    assert all(part.num_batches_tracked == 0 for part in plain.modules() if isinstance(part, _BatchNorm))


@pytest.mark.parametrize("mode", MODES)
def test_layers_frozen_one_epoch_and_not_the_next(mode):
    def loop(model):
        optimizer = sgd(model)
        for depth in (0, 1, 2):
            for index, part in enumerate(model.children()):
                part.requires_grad_(index >= depth)
            learn(model, optimizer, 1)

    both(network(), loop, mode=mode)


# MONAI


class MilModel(nn.Module):
    """MONAI's `MILModel` in mode "att": tiles of all bags through the encoder as one batch, then attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.net.conv1 = nn.Conv2d(3, 64, 3, 4, 1, bias=False)
        self.myfc = nn.Linear(self.net.fc.in_features, CLASSES)
        self.net.fc = nn.Identity()
        self.attention = nn.Sequential(nn.Linear(self.myfc.in_features, 16), nn.Tanh(), nn.Linear(16, 1))
        self.double()

    def forward(self, x):
        bags, tiles, *shape = x.shape
        features = self.net(x.reshape(bags * tiles, *shape)).reshape(bags, tiles, -1)
        weights = torch.softmax(self.attention(features), dim=1)
        return self.myfc((features * weights).sum(1))


def mil_loop(model):
    optimizer = sgd(model, 0.01)
    for x, target in batches(2, 8):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x.unflatten(0, (2, 4))), target[:2]).backward()
        optimizer.step()


def test_attention_mil_on_reshaped_tiles_as_monai_does():
    both(MilModel(), mil_loop, lambda model: model.net)


def test_hooks_for_feature_pyramids_inside_the_encoder_are_refused():
    """MONAI's mode "att_trans_pyramid" keeps the stages' outputs by hooks on the encoder's layers."""
    model, kept = MilModel(), {}
    for name in ("layer1", "layer4"):
        getattr(model.net, name).register_forward_hook(lambda part, args, out, name=name: kept.update({name: out}))
    partition(model.net, "lean")
    with pytest.raises(ValueError, match="a hook inside a partition must be on the partitioned module itself"):
        mil_loop(model)


def test_a_hook_on_the_partitioned_module_itself():
    def loop(model):
        kept = []
        model.features.register_forward_hook(lambda part, args, out: kept.append(out.detach().clone()))
        learn(model, sgd(model))
        return {str(index): out for index, out in enumerate(kept)}

    both(Classifier(), loop, lambda model: model.features)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [vit, resnet])
def test_keyword_inputs_and_model_outputs(build, mode):
    def loop(model):
        optimizer = sgd(model)
        for x, target in batches():
            optimizer.zero_grad()
            model(pixel_values=x, labels=target).loss.backward()
            optimizer.step()

    both(build(), loop, lambda model: model.base_model, mode)


def test_layers_of_a_transformers_encoder():
    def loop(model):
        optimizer = sgd(model)
        for x, target in batches():
            optimizer.zero_grad()
            model(pixel_values=x, labels=target).loss.backward()
            optimizer.step()

    plain, ours = vit(), vit()
    layers = [part for part in ours.modules() if isinstance(part, ViTLayer)]
    assert len(layers) == 2
    for layer in layers:
        partition(layer, "recompute")
    loop(plain)
    loop(ours)
    assert_same(ours, plain)


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


# torch


class Named(nn.Module):
    """Its forward has a name of its own for tiles, and a flag beside them."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, tiles, double=False):
        out = self.net(tiles)
        return out * 2 if double else out


@pytest.mark.parametrize("mode", MODES)
def test_tiles_by_keyword_and_a_flag(mode):
    def loop(model):
        optimizer = sgd(model)
        for index, (x, target) in enumerate(batches()):
            optimizer.zero_grad()
            F.cross_entropy(model(tiles=x, double=index == 1), target).backward()
            optimizer.step()

    both(Named(), loop, mode=mode)


def test_a_gradient_that_is_clamped_by_a_hook_on_each_parameter():
    def loop(model):
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        learn(model, sgd(model))

    both(network(), loop)


def test_accumulated_steps_under_a_schedule_with_weights_that_are_averaged():
    def loop(model):
        optimizer = sgd(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        average = AveragedModel(model)
        for index, (x, target) in enumerate(batches(4)):
            (F.cross_entropy(model(x), target) / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                average.update_parameters(model)
        update_bn([x for x, _ in batches()], average)
        return average.module

    both(network(), loop)


def test_two_views_and_a_teacher_that_follows():
    def loop(model):
        teacher = copy.deepcopy(model).requires_grad_(False)
        optimizer = sgd(model)
        for x, _ in batches():
            optimizer.zero_grad()
            one, two = model(x), model(x.flip(-1))
            with torch.no_grad():
                wanted = teacher(x)
            (F.mse_loss(one, wanted + 1) - F.cosine_similarity(one, two).mean()).backward()
            optimizer.step()
            with torch.no_grad():
                for theirs, ours in zip(teacher.parameters(), model.parameters(), strict=True):
                    theirs.lerp_(ours, 0.1)
        return teacher

    both(network(), loop)


def test_a_model_that_is_saved_whole_and_read_again():
    def loop(model):
        learn(model, sgd(model))
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
        learn(again, sgd(again))
        return again

    both(network(), loop)


def test_convolutions_with_low_rank_adapters_of_peft():
    net = network()
    names = [name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)][1:4]
    adapted = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=names)).double().train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zero by default, and then the adapters' inputs have no gradient
    both(adapted, lambda model: learn(model, sgd(model)))
