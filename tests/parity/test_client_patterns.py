"""Other people's training code with `partition_layers` added: after a few optimizer steps it is where it was without.

Small loops in the manner of the libraries' users. Lightning and MONAI need not be installed: what their code does to a
module is written out. Each loop runs twice from the same weights, untouched and with one part partitioned, in float64.
"""

import copy
import io

import pytest
import torch
import torchvision
from client_cases import CLASSES, MODES, batches, both, learn, network, partition, sgd
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn


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


# torch


class Named(nn.Module):
    """A module whose forward has a name of its own for tiles, and a flag beside them."""

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
                target = teacher(x)
            (F.mse_loss(one, target + 1) - F.cosine_similarity(one, two).mean()).backward()
            optimizer.step()
            with torch.no_grad():
                for averaged, trained in zip(teacher.parameters(), model.parameters(), strict=True):
                    averaged.lerp_(trained, 0.1)
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
