"""S'MoRE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.scores.tree import check_sizes, num_edges


@preset(paper="2504.06426", verified="paper's equations")
def smore(
    *,
    r: int = 4,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    sizes: Sequence[int] = (4, 4),
    fan_out: Sequence[int] | None = (2, 2),
    activation: str = "tanh",
    position: str = "all",
    key_features: int = 32,
    noise: bool = False,
    balance_coef: float = 1e-2,
    **peft_words: Any,
) -> MoeLoraConfig:
    """S'MoRE (arXiv 2504.06426): a tree of low-rank residuals on every linear, routed from its root to its leaves.

        x_{l+1}^i = sum_{n of i} a_l^{i,n} act(B_l^n A_l^n x + W_l x_l^n),   y = W0 x + W_proj x_L
        a_l^{i,.} = softmax of q . k_n over the experts n of layer l,   q = MLP_l(x_down, keys of i and its ancestors)

    of which a node takes the `fan_out` largest, divided by their sum (the paper's "switch" gate, with its balance loss
    per layer of the tree); `fan_out=None` takes all, without a loss (the "dense" gate). With `noise` (the "noisy_topk"
    gate) q and k have length one, the logits are noisy in training, a single child is weighed by its logit, and the
    loss is `CV^2(importance) + CV^2(load)` per layer of the tree. `position="child"` is S'MoRE*.
    With one layer and no activation it is a mixture of LoRA with `W_proj B_e` as B. Defaults are those of the code:
    trees of 4 and 4 experts, 2 of each chosen, tanh, keys in 32 features, no scaling unless `lora_alpha` is given.

    Deviations: the position "child_v2", the pool of experts that layers
    share (S'MoRE#) and the biases of the code are not here. The hidden layer of MLP_l could not be read: one of
    `key_features` with a ReLU is ours. The loss is the mean over the layers of the tree and of the model, the code's
    the sum. The paper adapts the feed-forward linears; here the default is every linear but the head.
    """
    sizes = check_sizes("sizes", sizes)
    chosen = sizes if fan_out is None else check_sizes("fan_out", fan_out)
    loss = {"kind": "tree_cv_squared" if noise else "tree_switch", "coef": balance_coef, "sizes": sizes}
    return MoeLoraConfig(
        experts={
            "kind": "residual_tree",
            "num_experts": num_edges(sizes),
            "sizes": sizes,
            "r": r,
            "alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "activation": activation,
            "position": position,
        },
        scores={"kind": "tree_keys", "sizes": sizes, "features": key_features, "noise": noise},
        selection={"kind": "tree_top", "sizes": sizes, "fan_out": chosen, "raw_single": noise},
        balance=[loss] if balance_coef != 0 and chosen != sizes else [],
        **peft_words,
    )
