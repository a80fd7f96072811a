"""Exchange layers of a network for others."""

from collections.abc import Callable

from torch import nn


def replace_layers(network: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put replacement(name, layer) in the place of every layer for which it is not None.

    name: the layer's own, without its parents': "qkv" for blocks.0.attention.qkv.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if (new := replacement(name, layer)) is not None:
                setattr(parent, name, new)
