"""Soft-MoA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2402.00828", verified="official code's formula")
def soft_moa(
    *,
    num_adapters: int = 4,
    slots: int = 1,
    bottleneck: int = 16,
    lora_dropout: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """Soft-MoA (arXiv 2402.00828): adapters beside each feed-forward block of an encoder, fed with soft slots.

        z = x Phi,  D = softmax of z over the tokens of a sequence,  C = softmax of z over all slots
        y_s = block(x)_s + sum_e C_se adapter_e(sum_s D_se x_s),     adapter(v) = Up gelu(Down v)

    Every token reads the whole sequence, so that causal models, and decoders, are refused. Up starts at 0, Down and Phi
    kaiming-uniform.

    Deviations: Phi is xavier-normal in the code, and it may normalise x and Phi, which is not here; padding is left out
    of D (the code has none: its spectrograms are of one length). The number of adapters, of slots and the bottleneck
    could not be read, and the defaults here are ours. The paper puts them beside attention blocks as well.
    """
    return MoeLoraConfig(
        experts={
            "kind": "slots",
            "num_experts": num_adapters * slots,
            "slots": slots,
            "bottleneck": bottleneck,
            "lora_dropout": lora_dropout,
        },
        placement="block",
        scores={"kind": "linear", "init_std": router_init_std},
        selection="dense",
        **peft_words,
    )
