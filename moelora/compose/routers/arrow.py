"""Arrow: a prototype of each expert from its weights alone.

Shape suffixes: E experts, R rank, D input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import register
from moelora.compose.routers.base import Composition, RouterRecipe, check_top_k, top_k_of
from moelora.progress import track
from moelora.validation import check, is_real


@register
@dataclass(frozen=True, kw_only=True)
class Arrow(RouterRecipe):
    """Arrow (arXiv 2405.11157): a token goes to the experts whose weights it would be changed by most.

        z_e = |v_e . x|,  v_e the first right singular vector of B_e A_e;  softmax over the top k of z / temperature

    With `general` (GenKnowSub, arXiv 2505.10939) what all tasks share is taken from each LoRA first: the mean A of the
    general LoRAs from its A, and their mean B from its B, each for itself as PEFT's `use_gks` does:

        A_e <- A_e - mean_g A_g,  B_e <- B_e - mean_g B_g

    That is not the difference of the products, and the scalings of the general LoRAs do not count.

    Deviation: PEFT finds v_e by 15 power iterations from a random start, here it is exact. An expert that is not at a
    linear has v_e = 0 there, hence z_e = 0, the lowest there is.

    Args:
        top_k: Experts of a token; None is 3, PEFT's default, or all where there are fewer.
        temperature: Divides z.
        general: Folders of the general LoRAs, or their names on the Hub; of the experts' ranks and sites.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "arrow"

    top_k: int | None = None
    temperature: float = 1.0
    general: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        check(is_real(self.temperature) and self.temperature > 0, "router.temperature", self.temperature, "above 0")
        given = self.general
        names = isinstance(given, (list, tuple)) and all(isinstance(each, (str, Path)) and str(each) for each in given)
        check(names, "router.general", given, "a list of folders or of names on the Hub")
        object.__setattr__(self, "general", [str(each) for each in given])

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Prototypes, the top k of them.

        Raises:
            ComposeError: If `top_k` is above the number of experts.
        """
        return {
            "scores": {"kind": "prototypes", "absolute": True, "temperature": self.temperature},
            "selection": {"kind": "top_k", "k": top_k_of(self.kind, self.top_k, 3, num_experts)},
        }

    def subtracted(self) -> list[str]:
        """The general LoRAs."""
        return self.general

    def fit(self, composition: Composition) -> None:
        """Write the prototypes of each layer."""
        for layer in track(list(composition.layers()), "finding prototypes"):
            a_ERD, b_EOR = composition.factors(layer)
            prototypes = layer.routers[composition.adapter].get_parameter("prototypes")
            prototypes.data.copy_(first_right_singular_vectors(a_ERD, b_EOR))


def first_right_singular_vectors(a_ERD: Tensor, b_EOR: Tensor) -> Tensor:
    """The first right singular vector of each `B_e A_e`, [E, D] in fp32; 0 for an expert that is 0.

    The product has D times O elements, its factors few: with A^T = Q R, B A = (B R^T) Q^T, and the singular vectors of
    the small B R^T, turned by Q, are those of the product.
    """
    q_EDR, r_ERR = torch.linalg.qr(a_ERD.float().transpose(1, 2))
    small_EOR = b_EOR.float() @ r_ERR.transpose(1, 2)
    # of the inner product rather than of small itself: R times R instead of O times R
    _, vectors_ERR = torch.linalg.eigh((small_EOR.transpose(1, 2) @ small_EOR).double())
    first_ED = (q_EDR @ vectors_ERR[..., -1:].to(q_EDR.dtype)).squeeze(-1)
    exists_E = small_EOR.flatten(1).any(1)
    return first_ED * exists_E.unsqueeze(1)
