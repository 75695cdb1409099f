"""MoS."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2410.00938", verified="official code's formula")
def mos(
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    use_rslora: bool = False,
    equivalent_rank: int = 2,
    shards: int = 4,
    private: int = 1,
    seed: int = 0,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoS, Mixture of Shards (arXiv 2410.00938): LoRAs of rank `r` for the parameters of `equivalent_rank`, no router.

        A_k = rows of l shards each, taken from a pool that all layers share;   B_k likewise
        y   = W0 x + (alpha / r) B_k A_k x

    The linears of one sort share a pool of e L l shards of A and one of B (e the equivalent rank, L layers, l shards of
    a vector). Layer k draws (r - p) l of the public shards at random, for A and B apart, and has p l of its own. With
    e = p = r and l = 1 it is plain LoRA. The pool of A starts as A of a LoRA would, with the bound of the full number
    of features; B at 0. `moelora export --to lora` writes it as an ordinary LoRA, which merges.

    Deviations: the draws are made by Python's generator from `seed` and the names of the linears, not by
    `torch.randperm`, so that the same configuration gives the same shards in every version; the adapter stores the
    pools alone. alpha 16 and dropout 0.1 are the paper's; r, e, l and p could not be read there, and the defaults here
    are ours.
    """
    return MoeLoraConfig(
        experts={
            "kind": "shards",
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "equivalent_rank": equivalent_rank,
            "shards": shards,
            "private": private,
            "seed": seed,
        },
        placement={"kind": "linear", "unrouted_modules": ".*"},
        selection={"kind": "top_k", "k": 1},
        **peft_words,
    )
