"""What the partitioned layers are compared with: other ways of training through activations that do not fit.

A peer takes an encoder and returns its forward; the caller back-propagates what that returns with `.backward()`, and
the gradients are found in the encoder's own parameters.
"""

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[[Tensor], Tensor]


def native(encoder: nn.Module) -> Forward:
    """The encoder as it is."""
    return encoder


def torch_checkpoint(encoder: nn.Module) -> Forward:
    """Activation checkpoints where timm puts them (a block each, in most encoders), else one over the whole encoder.

    BatchNorm in training mode updates its running statistics twice a step; the gradients are right.
    """
    if not hasattr(encoder, "set_grad_checkpointing"):
        return lambda images: checkpoint(encoder, images, use_reentrant=False)
    switch: Callable[[bool], None] = encoder.set_grad_checkpointing  # type: ignore[assignment]

    def forward(images: Tensor) -> Tensor:
        switch(True)
        try:
            return encoder(images)
        finally:
            switch(False)  # only the forward reads it, so that the other peers find the encoder as it was

    return forward


def save_on_cpu(encoder: nn.Module) -> Forward:
    """Every tensor that autograd saves goes to host memory and comes back in backward, without overlap."""

    def forward(images: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return encoder(images)

    return forward


def lightstream_module(stages: int = 4) -> nn.Module:
    """A ResNet-18 without its head, with the first `stages` of its layers and its norms frozen, as lightstream needs.

    The norms' own weights are frozen too: lightstream adds their gradients up over overlapping tiles.
    """
    net = torchvision.models.resnet18(weights=None)
    layers = (net.layer1, net.layer2, net.layer3, net.layer4)[:stages]
    encoder = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *layers).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return encoder


def lightstream_stream(encoder: nn.Module, image_px: int, tile_px: int) -> Forward:
    """One image [1, 3, image_px, image_px] through lightstream's StreamingCNN, in tiles of tile_px.

    With frozen norms it equals `native` in output and in the convolutions' gradients, in the encoder's dtype (autocast
    is off): to 1e-13 in float64, to 1e-2 in float32, where a ReLU near zero may take the other side. Tiles, and what
    the image is larger than them by, are multiples of the encoder's stride. ResNet-18 needs tiles of 104, 240, 496 or
    1,024 px up to layer 1, 2, 3 or 4; a tile covers new ground only by what it is larger than 100, 232, 480 and 992, so
    that small ones are slow. The image gets no gradient.

    Raises:
        ImportError: lightstream or what it imports is not installed.
        ValueError: lightstream would be wrong with this encoder, image or tile, most often without saying so.
    """
    if any(_learns(module) for module in encoder.modules()):
        raise ValueError(
            "the encoder's BatchNorm must be frozen, got one that learns. HINT: take lightstream_module()."
        )
    if not 0 < tile_px <= image_px:
        raise ValueError(f"tile_px must be in [1, image_px={image_px}], got {tile_px}. HINT: smaller tiles.")
    stream = _streaming_cnn(encoder, tile_px)
    stride, lost, unlearned = int(stream.output_stride[1]), stream.tile_output_lost, stream.tile_gradient_lost
    if tile_px % stride or (image_px - tile_px) % stride:
        raise ValueError(
            f"image_px and tile_px must be multiples of the encoder's stride {stride}, got {image_px} and {tile_px}. "
            f"HINT: {image_px // stride * stride} and {tile_px // stride * stride}."
        )
    # In too small a tile every pixel sees a border, and the widths that lightstream measures are wrong: the gradient
    # then seems to lose less than the output does.
    if unlearned.top < lost.top * stride or tile_px - unlearned.top - unlearned.bottom < stride:
        raise ValueError(f"tile_px must exceed the encoder's receptive field, got {tile_px}. HINT: larger tiles.")

    def forward(image: Tensor) -> Tensor:
        if image.shape != (1, 3, image_px, image_px):
            raise ValueError(
                f"the image must be [1, 3, {image_px}, {image_px}], got {list(image.shape)}. HINT: crop it."
            )
        with torch.autocast(image.device.type, enabled=False):
            output = stream(image)

        def backward(gradient: Tensor) -> None:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that its autocast is off, in every tile
                stream.backward(image, gradient)

        # Its backward is a method of its own: it runs when the caller's backward reaches the output.
        output.requires_grad_().register_hook(backward)
        return output

    return forward


def _learns(module: nn.Module) -> bool:
    if not isinstance(module, nn.BatchNorm2d):
        return False
    return module.training or any(parameter.requires_grad for parameter in module.parameters())


def _streaming_cnn(encoder: nn.Module, tile_px: int) -> Any:
    """The package's StreamingCNN over a copy of the encoder that shares its parameters."""
    try:
        constructor_module = importlib.import_module("lightstream.core.constructor")
    except ImportError as error:
        raise ImportError(
            f"lightstream must be installed, got: {error}. "
            "HINT: pip install lightstream lightning (it imports the latter without asking for it)."
        ) from error
    device = next(encoder.parameters()).device
    # It measures on the CPU, in full precision, what a tile loses at its borders; its own option to do so then calls
    # .cuda(), and without the option the constructor does: hence the attribute. It prints, and leaves gradients on.
    with redirect_stdout(io.StringIO()), torch.set_grad_enabled(torch.is_grad_enabled()):
        constructor = constructor_module.StreamingConstructor(
            copy.deepcopy(encoder).cpu(), tile_px, verbose=False, statistics_on_cpu=True, normalize_on_gpu=False
        )
        constructor.statistics_on_cpu = False
        constructor.add_modules_to_keep([nn.BatchNorm2d])  # its ResNets do so too; residual sums fail without
        stream = constructor.prepare_streaming_model()
    stream.to(device)
    stream.device = device
    for name, parameter in encoder.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(stream.stream_module.get_submodule(owner), leaf, parameter)
    return stream
