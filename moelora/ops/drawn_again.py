"""Dropout whose mask is drawn again in the backward pass, not kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawnAgain:
    """Inverted dropout without its factor, `1 / (1 - p)`, which rides on a scaling of the caller's.

    The mask is a function of the seed: a GPU's generator counts rather than steps from number to number (Philox, Salmon
    et al., SC 2011), so that drawing again costs what reading the mask would.

    Attributes:
        p: Probability of a zero.
        seed: What the mask is made of.
    """

    p: float
    seed: int

    @classmethod
    def of(cls, p: float) -> DrawnAgain | None:
        """With a new seed of the CPU's generator, which no device waits for; None where p is 0."""
        return cls(p, int(torch.randint(2**62, (), device="cpu"))) if p > 0 else None

    def mask(self, like: Tensor) -> Tensor:
        """1 with probability 1 - p, else 0, of the shape and dtype of `like`."""
        # a meta tensor has no values to draw, and its device no generator
        generator = None if like.is_meta else torch.Generator(like.device).manual_seed(self.seed)
        mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return mask.bernoulli_(1 - self.p, generator=generator)


def keep_scale(dropout: DrawnAgain | None) -> float:
    """`1 / (1 - p)`."""
    return 1.0 if dropout is None else 1 / (1 - dropout.p)
