"""Split one trained LoRA into the experts of a mixture that starts with its function.

Shape suffixes: E experts, R rank, D input features, O output features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moelora.compose.editing.edit import Edit, Size, finish
from moelora.compose.editing.stacked import (
    CONFIG_FILE,
    StackedAdapter,
    StackedSite,
    check_output,
    read_stacked,
    read_words,
)
from moelora.compose.sources import read_lora
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.peft_type import PEFT_TYPE

Into = Literal["blocks", "rank_one", "copies"]

# Experts that "rank_one" makes without being told how many: each costs a row of a router at each linear.
RANK_ONE_UNASKED = 64

# What says where an adapter goes; the same words in `peft.LoraConfig` and here.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ABOUT = ("task_type", "base_model_name_or_path", "revision", "inference_mode")


def split_lora(
    lora: str | Path,
    output: str | Path,
    *,
    into: Into = "blocks",
    num_experts: int | None = None,
    top_k: int | None = None,
    router_init_std: float = 0.02,
    seed: int = 0,
) -> Edit:
    """Make a mixture of one trained LoRA, with its function unchanged before any training.

    "blocks" cuts the rank into E equal pieces and "rank_one" into R: expert e has its rows of A and columns of B. Under
    dense softmax weights with a router of zeros each expert has the weight 1/E, and B is multiplied by E, so that the
    sum is the LoRA, exactly where E is a power of two and else up to a rounding. No top-k below E can start there: the
    experts that it leaves out are a part of the function.

    "copies" gives every expert the whole LoRA (sparse upcycling, arXiv 2212.05055). Whichever experts are chosen, their
    renormalised weights sum to one, so that the start is exact under top-k as well; the router starts at random, since
    equal experts under a router of zeros would all send their tokens to the same ones and never part.

    Args:
        lora: Folder of a PEFT LoRA, or of a moelora adapter of plain LoRAs (preset `lora`).
        output: The folder to write.
        into: What an expert gets.
        num_experts: E; of "rank_one" the rank, which has to be said only where it is above 64.
        top_k: Experts of a token, renormalised; only for "copies" (default 2, or 1 with one expert).
        router_init_std: Of the router of "copies".
        seed: Seed of that router.

    Raises:
        ComposeError: If the input is no plain LoRA of one rank, the numbers do not fit, or the output exists.
    """
    folder = check_output(output, lora)
    if into not in get_args(Into):
        raise ComposeError(f"into is {into!r}; allowed: {', '.join(map(repr, get_args(Into)))}.")
    words, scaling, sites, rest, before = _read(Path(lora))
    r = next(iter(sites.values()))[0].shape[0]
    if into == "rank_one" and num_experts is None and r > RANK_ONE_UNASKED:
        routers = r * sum(a_RD.shape[1] for a_RD, _ in sites.values())
        raise ComposeError(
            f"into='rank_one' would make {r} experts of a LoRA of rank {r}, and add {routers:,} parameters of routers "
            f"at {len(sites)} linears to its {before.num_parameters:,}; allowed unasked: {RANK_ONE_UNASKED} experts. "
            f"Say num_experts={r} (`--num-experts {r}`), or split it into blocks."
        )
    E = _num_experts(into, num_experts, r)
    if top_k is not None and into != "copies":
        raise ComposeError(
            f"top_k is {top_k} with into={into!r}; allowed: None. Top-k would leave out parts of the function from the "
            "start; use into='copies' for a mixture with top-k."
        )
    if into == "copies":
        k = min(2, E) if top_k is None else top_k
        if not (2 <= k <= E or k == E == 1):
            raise ComposeError(
                f"top_k is {k}; allowed: 2 to {E}, since a renormalised top-1 gives its router no gradient."
            )
        scores: dict[str, Any] = {"kind": "linear", "init_std": router_init_std}
        selection: dict[str, Any] = {"kind": "top_k", "k": k}
        rank = r
    else:
        scores, selection, rank = {"kind": "linear", "init_std": 0.0}, {"kind": "dense"}, r // E
    config = MoeLoraConfig(
        experts={"kind": "lora", "num_experts": E, "r": rank, "lora_alpha": scaling * rank},
        placement="linear",
        scores=scores,
        selection=selection,
        **words,
    )
    generator = torch.Generator().manual_seed(seed)
    stacked = {}
    for name, (a_RD, b_OR) in sites.items():
        if into == "copies":
            a_ERD, b_EOR = a_RD.expand(E, *a_RD.shape), b_OR.expand(E, *b_OR.shape)
            router_ED = torch.randn(E, a_RD.shape[1], generator=generator) * router_init_std
        else:
            a_ERD, b_EOR = a_RD.unflatten(0, (E, rank)), b_OR.unflatten(1, (E, rank)).transpose(0, 1) * E
            router_ED = torch.zeros(E, a_RD.shape[1])
        tensors = {"A.weight": a_ERD, "B.weight": b_EOR, "router.weight": router_ED.to(a_RD.dtype)}
        stacked[name] = StackedSite(name, True, tensors)
    return finish(lora, before, StackedAdapter(config, stacked, rest), folder)


def _num_experts(into: Into, given: int | None, r: int) -> int:
    if into == "rank_one":
        if given not in (None, r):
            raise ComposeError(f"num_experts is {given} with into='rank_one'; allowed: {r}, the LoRA's rank, or None.")
        return r
    if given is None or given < 1 or (into == "blocks" and r % given):
        divisors = [n for n in range(1, r + 1) if r % n == 0]
        allowed = f"one of {divisors}, the divisors of the LoRA's rank" if into == "blocks" else "at least 1"
        raise ComposeError(f"num_experts is {given} with into={into!r}; allowed: {allowed}.")
    return given


def _read(folder: Path) -> tuple[dict[str, Any], float, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], Size]:
    """Words of the configuration, scaling, factors by site, other tensors, and size of a LoRA."""
    if not (folder / CONFIG_FILE).is_file():
        raise ComposeError(f"{str(folder)!r} holds no adapter: {CONFIG_FILE} missing.")
    if read_words(folder).get("peft_type") == PEFT_TYPE.value:
        return _read_plain(read_stacked(folder))
    source = read_lora(folder.name, folder)
    factors = source.factors()
    scalings = {source.scaling(module) for module in factors}
    ranks = {a_RD.shape[0] for a_RD, _ in factors.values()}
    if len(ranks) > 1 or len(scalings) > 1:
        raise ComposeError(
            f"{str(folder)!r} has linears of the ranks {sorted(ranks)} and scalings {sorted(scalings)}; allowed: one "
            "of each, without rank_pattern and alpha_pattern."
        )
    size = sum(tensor.numel() for pair in factors.values() for tensor in pair)
    words = {name: getattr(source.config, name) for name in (*_TARGETS, *_ABOUT, "modules_to_save")}
    rest = {f"base_model.model.{name}": tensor for name, tensor in source.saved.items()}
    return words, scalings.pop(), factors, rest, Size(1, size, size)


def _read_plain(
    adapter: StackedAdapter,
) -> tuple[dict[str, Any], float, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], Size]:
    mixtures = [site.name for site in adapter.sites.values() if site.routed and adapter.num_experts > 1]
    if mixtures:
        raise ComposeError(
            f"the adapter has mixtures of {adapter.num_experts} experts already, at {mixtures[0]!r} and others; "
            "allowed: plain LoRAs (preset 'lora', or a PEFT LoRA)."
        )
    config = adapter.config
    blocks = [site.name for site in adapter.sites.values() if site.roles != ["weight"]]
    if blocks:
        raise ComposeError(f"the adapter wraps {blocks[0]!r} as a whole block; allowed: LoRAs on single linears.")
    factors = {name: (site.tensors["A.weight"][0], site.tensors["B.weight"][0]) for name, site in adapter.sites.items()}
    kept = ("modules_to_save", "bias", "trainable_token_indices")
    words = {name: getattr(config, name) for name in (*_TARGETS, *_ABOUT, *kept)}
    return words, config.scaling, factors, dict(adapter.rest), Size.of(adapter)
