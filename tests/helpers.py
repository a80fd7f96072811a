"""What several test files share: the options to try, inputs from a seed, and a strict comparison."""

import torch

POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
LOSS_OPTIONS = [{}, {"label_smoothing": 0.1}, {"max_z_loss": 0.01}, {"label_smoothing": 0.2, "max_z_loss": 0.1}]


def label(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(B, T, seed=2):
    return torch.randint(23, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
