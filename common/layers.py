"""Exchange layers of a network for others, and make networks that have shapes and no numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def shapes_only() -> Iterator[None]:
    """Have networks that are made in the block allocate nothing: their tensors are on PyTorch's meta device.

    Nothing is drawn for them either. On the meta device, drawing imports PyTorch's compiler, which takes two seconds.
    """
    draw = nn.init.normal_
    nn.init.normal_ = lambda tensor, *args, **kwargs: tensor
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = draw


def replace_layers(network: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put replacement(name, layer) in the place of every layer for which it is not None.

    name: the layer's own, without its parents': "qkv" for blocks.0.attention.qkv.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if (new := replacement(name, layer)) is not None:
                setattr(parent, name, new)
