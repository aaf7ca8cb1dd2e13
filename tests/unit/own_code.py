"""A module as a user would bring it: encoders and aggregators, right ones and wrong ones."""

CODE = """
from os import system
from pathlib import Path

import torch
from torch import nn

from ds_wsi import SlideOutput

Path(__file__).with_suffix(".imported").touch()


class Net(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, width=8, tile_size_px=0):
        super().__init__()
        self.tile_size_px = tile_size_px
        self.body = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, tiles):
        return self.body(tiles)


class Mean(nn.Module):
    def __init__(self, in_dim, num_classes, scale=1.0, dropout=0.0):
        super().__init__()
        self.scale, self.last = scale, nn.Linear(in_dim, num_classes)

    def forward(self, bags):
        return SlideOutput(self.last(torch.stack([bag.mean(0) for bag in bags.split()])) * self.scale, None)


class MeanOfAll(Mean):
    def forward(self, bags):
        return SlideOutput(self.last(bags.values.mean(0, keepdim=True)).expand(len(bags.cu_seqlens) - 1, -1), None)


class OneLogit(Mean):
    def forward(self, bags):
        return SlideOutput(super().forward(bags).logits[:, :1], None)


class Logits(Mean):
    def forward(self, bags):
        return super().forward(bags).logits


class BagAttention(Mean):
    def forward(self, bags):
        return super().forward(bags)._replace(attention=torch.ones(len(bags.cu_seqlens) - 1))


class Colour(nn.Module):
    def forward(self, tiles):
        return tiles.mean((2, 3))


class Map(Net):
    def forward(self, tiles):
        return self.body[0](tiles)


class Pair(Net):
    def forward(self, tiles):
        return self.body(tiles), None


class Wrong(Net):
    num_features = 9


class Nothing(nn.Module):
    def __init__(self, in_dim, num_classes):
        super().__init__()


class Grey(Net):
    std = (0.25, 0.0, 0.25)


def needs(path):
    return Net()


def fails():
    raise TypeError("no such thing")


def no_module():
    return 3


number = 3
"""
