"""Which attention kernels decoding may use."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def read_tokens(model: GPT, idx: Tensor, **options) -> Tensor:
    """Return the logits of GPT.forward, without cuDNN's attention. All decoding calls the model through this function.

    options: those of GPT.forward. On Hopper and newer GPUs PyTorch tries cuDNN first. It builds a plan for every new
    shape, which takes 20 to 400 ms, and every step of a beam search has a new shape. The context ends before this
    function returns, so a suspended generator does not change what its caller's attention uses. A CPU has no cuDNN, and
    saves the 0.1 ms that the context takes.
    """
    if idx.device.type == "cpu":
        return model(idx, **options)[0]
    with sdpa_kernel(KERNELS):
        return model(idx, **options)[0]
