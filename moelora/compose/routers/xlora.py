"""X-LoRA: a small network, fed by a first pass of the base model, weighs the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.compose.routers.base import Composition, RouterRecipe, check_top_k, top_k_of
from moelora.validation import check, check_bool, is_real


@register
@dataclass(frozen=True, kw_only=True)
class XLora(RouterRecipe):
    """X-LoRA (arXiv 2402.07148) as in PEFT, to be trained afterwards: `moelora train` does.

    Each token's weights come of the base model's last hidden state of that token: see `ClassifierScores`, where the
    fields are explained. The first pass is the base alone, which is PEFT's `scaling_pass_value=0`, its default.
    Deviation: the network computes in fp32 whatever the model's dtype is.

    Args:
        depth, size, dropout, softmax, temperature, layerwise: Of the network; PEFT's `xlora_depth`, `xlora_size`,
            `xlora_dropout_p`, `enable_softmax`, `softmax_temperature` and `layerwise_scalings`.
        top_k: The experts of a token, with their weights as they are; None is all (`top_k_lora`).
        renormalize: Whether the weights of the `top_k` are divided by their sum, which with `softmax` is a softmax over
            their logits (`enable_softmax_topk` without `enable_softmax`).
        scale: Multiplies each expert, once for all in its B (`global_scaling_weight`).
    """

    kind: ClassVar[str] = "xlora"

    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    softmax: bool = True
    temperature: float = 1.0
    layerwise: bool = False
    top_k: int | None = None
    renormalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        k = self.top_k
        check_top_k(k)
        check_bool("router.renormalize", self.renormalize)
        fits = not self.renormalize or (k is not None and self.softmax is True)
        check(fits, "router.renormalize", self.renormalize, "False without a top_k or without softmax")
        check(is_real(self.scale), "router.scale", self.scale, "a finite number")

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Classifier scores; all experts, or the top k.

        Raises:
            ComposeError: If `top_k` is above the number of experts.
        """
        words = ("depth", "size", "dropout", "softmax", "temperature", "layerwise")
        scores = {name: getattr(self, name) for name in words}
        top_k = {
            "kind": "top_k",
            "k": top_k_of(self.kind, self.top_k, num_experts, num_experts),
            "renormalize": self.renormalize,
        }
        return {
            "scores": {"kind": "classifier", "features": base.config.get_text_config().hidden_size, **scores},
            "selection": "dense" if self.top_k is None else top_k,
            "placement": {"kind": "linear", "routers": "per_model"},
        }

    @torch.no_grad()
    def fit(self, composition: Composition) -> None:
        """Scale the experts; the network is trained afterwards."""
        for layer in composition.layers():
            layer.parts[composition.adapter]["B"].get_parameter("weight").data.mul_(self.scale)
