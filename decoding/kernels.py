"""Which attention kernels decoding may use."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def read_tokens(model: GPT, idx: Tensor, **options) -> Tensor:
    """The logits of a model that reads tokens while decoding: GPT.forward without cuDNN's attention.

    On Hopper and newer, PyTorch tries cuDNN first. It builds a plan for every new shape, which takes tens of
    milliseconds or more, and while decoding every step has a new shape.
    """
    with sdpa_kernel(KERNELS):
        return model(idx, **options)[0]
