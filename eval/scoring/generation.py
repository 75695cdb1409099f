"""Greedy answers in batches, and the routing of the questions that led to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelora import record_routing
from moelora.progress import track


@dataclass
class RoutingCounts:
    """How many choices of the counted tokens fell on each expert, by routed layer.

    Args:
        counts: Layer name to a vector of E counts.
        tokens: Number of counted tokens.
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, layer: str, counts_E: Tensor) -> None:
        """Add the counts of one forward."""
        self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E

    def loads(self) -> dict[str, Tensor]:
        """Shares that sum to 1 in each layer."""
        return {layer: counts_E / counts_E.sum() for layer, counts_E in self.counts.items()}


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    shared: tuple[int, int] | None = None,
) -> tuple[list[str], list[RoutingCounts]]:
    """Answer every prompt greedily.

    Prompts of like length are answered together, padded on the left.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        batch_size: Prompts at once.
        max_new_tokens: Longest answer.
        shared: Number of first and of last tokens of every prompt whose routing is not counted; None counts nothing.

    Returns:
        The answers, without special tokens and white space around, and the routing of the odd and the even prompts (two
        halves show how much of a difference is chance); empty without `shared`.
    """
    model.eval()
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(_contiguous)
    try:
        return _answer(model, tokenizer, prompts, batch_size, max_new_tokens, shared)
    finally:
        hook.remove()


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what the model says ends a turn of its chats."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))


def _contiguous(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last position of each prompt, cut out of all positions, makes torch copy a frozen head once for each row."""
    return tuple(x.contiguous() for x in inputs)


def _answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    shared: tuple[int, int] | None,
) -> tuple[list[str], list[RoutingCounts]]:
    answers = [""] * len(prompts)
    halves = [RoutingCounts(), RoutingCounts()] if shared is not None else []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in track(range(0, len(order), batch_size), "answering in batches"):
        batch = order[start : start + batch_size]
        inputs = _pad_left([prompts[index] for index in batch], tokenizer.pad_token_id, model.device)
        width = inputs["input_ids"].shape[1]
        with torch.no_grad(), record_routing(model) if halves else nullcontext() as routing:
            generated = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # sampling settings of the model's own generation_config would only warn
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=_ends(model, tokenizer),
            )
            if routing is not None and shared is not None:
                _count(routing.records, halves, batch, inputs["attention_mask"], shared)
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text.strip()
    return answers, halves


def _pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _count(
    records: Sequence[Any], halves: Sequence[RoutingCounts], batch: Sequence[int], mask: Tensor, shared: tuple[int, int]
) -> None:
    """Add the routing of the prompts; the forwards of the generated tokens are told apart by their number of tokens."""
    first, last = shared
    rows, width = mask.shape
    position = torch.arange(width, device=mask.device)
    begins = width - mask.sum(1, keepdim=True) + first
    counted = (position >= begins) & (position < width - last)
    for half in (0, 1):
        chosen = torch.tensor([index % 2 == half for index in batch], device=mask.device)
        tokens_T = (counted & chosen.unsqueeze(1)).reshape(-1)
        halves[half].tokens += int(tokens_T.sum())
        for record in records:
            load_TE = record.routing.load_TE()
            if len(load_TE) == rows * width:
                halves[half].add(record.layer, (load_TE * tokens_T.unsqueeze(1).to(load_TE.device)).sum(0).cpu())


def shared_tokens(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Number of first and of last tokens in which all prompts agree: those of the chat template and system message.

    Of one prompt alone, or where one is the beginning of all others, they cannot be told apart, so that all counts.
    """
    shortest = min(map(len, prompts))
    first = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)
    if first == shortest:
        return 0, 0
    rest = shortest - first
    last = next((i for i in range(rest) if len({prompt[-1 - i] for prompt in prompts}) > 1), rest)
    return first, last
