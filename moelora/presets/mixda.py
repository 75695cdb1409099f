"""MixDA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2306.05406", verified="official code's formula")
def mixda(
    *,
    num_adapters: int = 1,
    reduction: int = 16,
    lora_dropout: float = 0.0,
    gate_size: int = 768,
    gate_depth: int = 4,
    gate_dropout: float = 0.2,
    per: str = "sequence",
    frozen_adapters: int = 0,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixDA (Mixture-of-Domain-Adapters, arXiv 2306.05406): adapters beside the end of each feed-forward block.

        y = sum_n g_n U_n gelu(D_n h) + g_E W h,   g = softmax of an MLP of h at the sequence's last token

    h are the hidden features of a frozen block, W its last linear, which is one of the gate's choices. U starts at 0,
    so that the adapter starts at a share of W h, not at the base. Defaults of the code: reduction 16, a gate of four
    linear maps with 768 features between them and dropout 0.2.

    The last token decides for those before it, so that decoders are refused; there `per="token"` lets each token decide
    for itself, which is the last token that it may see.

    Two stages, as in the paper. First the adapters learn a domain, one or several: train this preset on it. Then the
    gate and the task: load the folder with a configuration whose adapters are frozen,

        config = MoeLoraConfig.from_preset("mixda", num_adapters=2, frozen_adapters=2)
        model = PeftModel.from_pretrained(base, "stage-1", config=config, is_trainable=True)

    and train on the task; the paper's adapter of the task is a second adapter of any preset on other modules.

    Deviations: the paper's first stage has a loss of masked knowledge and the distance of the adapted layers' outputs
    from the base's on Wikipedia; here it is the trainer's loss. The code's last token may be padding; here it is the
    last valid one. Its adapters are in layers 7 and 11 of RoBERTa-large, here in all (see `layers_to_transform`). The
    block's own dropout behind W falls on the sum. The gate's activation could not be read, and is a ReLU.
    """
    return MoeLoraConfig(
        experts={
            "kind": "bottleneck",
            "num_experts": num_adapters + 1,
            "reduction": reduction,
            "lora_dropout": lora_dropout,
            "num_frozen": frozen_adapters,
        },
        placement={"kind": "parts", "parts": ["down"]},
        scores={"kind": "mlp", "depth": gate_depth, "size": gate_size, "dropout": gate_dropout, "per": per},
        selection="dense",
        **peft_words,
    )
