"""What is derived of a batch before the model runs: one embedding of each sequence, or the base's hidden states.

Routing by sequence must not change while an answer grows, so it looks at the prompt alone: with labels the tokens
before the first one that has a label, in generation the tokens that it starts from, else all valid tokens.

Shape suffixes: B rows of the batch, S tokens of a row, D features, T = B * S tokens, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import ConfigError
from moelora.routing.batch import Batch

INPUT_MEAN = "input_mean"
HIDDEN_MEAN = "hidden_mean"
BASE_HIDDEN = "base_hidden"
MEANS = (INPUT_MEAN, HIDDEN_MEAN)
DERIVED = (*MEANS, BASE_HIDDEN)
"""The facts that are derived: the mean over the prompt of the model's input embeddings, or of the last hidden states of
the base model without its adapters (one more pass over the prompt); and these hidden states themselves."""


def derive(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: Batch,
    wanted: frozenset[str],
    base_pass: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> dict[str, Tensor]:
    """The facts of `DERIVED` that are wanted, without gradient: [N, D] in fp32, `BASE_HIDDEN` [B, S, D] as it is.

    Args:
        module: The model that is called.
        args, kwargs: What it is called with.
        batch: What was read of that.
        wanted: Their names.
        base_pass: Runs a part of the base model without adapters.

    Raises:
        ConfigError: If the call continues a KV cache, whose prompt is not known any more, or has no tokens; or if
            `BASE_HIDDEN` is wanted of an encoder-decoder model, whose two halves have tokens of their own.
    """
    inputs = _inputs(module, args, kwargs)
    if BASE_HIDDEN in wanted:
        _check_whole_call(module, kwargs)
    if _cached_length(kwargs.get("past_key_values")) > 0:
        raise ConfigError(
            f"the adapter routes each sequence by its prompt ({', '.join(sorted(wanted))}), and this call continues a "
            "KV cache, so that the prompt is not known; allowed: `generate` of the PEFT model, a call without a cache, "
            "or `with moelora.batch_facts(instance_embedding=...)` around all calls of a sequence."
        )
    states: dict[str, Tensor] = {}
    with torch.no_grad():
        if INPUT_MEAN in wanted:
            embed: Any = module.get_input_embeddings()  # type: ignore[operator]
            states[INPUT_MEAN] = inputs["inputs_embeds"] if "inputs_embeds" in inputs else embed(inputs["input_ids"])
        if wanted & {HIDDEN_MEAN, BASE_HIDDEN}:
            states[HIDDEN_MEAN] = states[BASE_HIDDEN] = _last_hidden(module, inputs, base_pass)
        labels = kwargs.get("labels")
        means = {name: mean_of_prompts(states[name], batch, labels) for name in MEANS if name in wanted}
        return means | {name: states[name] for name in wanted & {BASE_HIDDEN}}


def _check_whole_call(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            "the adapter routes each token by a first pass of the base model, and "
            f"{type(module).__name__} has an encoder and a decoder with tokens of their own; allowed: a model of one "
            "stack."
        )
    if _cached_length(kwargs.get("past_key_values")) > 0:
        raise ConfigError(
            "the adapter routes each token by a first pass of the base model over the whole sequence, and this call "
            "continues a KV cache; allowed: `generate` of the PEFT model, which runs without one, or a call without "
            "past_key_values."
        )


def prompt_of(example: Mapping[str, Sequence[int]]) -> list[int]:
    """The tokens before an example's answer.

    Args:
        example: `input_ids`, and `labels` (-100 for the prompt) where there is an answer.
    """
    labels = example.get("labels")
    ids = list(example["input_ids"])
    prompt = ids if labels is None else [token for token, label in zip(ids, labels, strict=True) if label == -100]
    return prompt or ids


def mean_of_prompts(states_BSD: Tensor, batch: Batch, labels: Any = None) -> Tensor:
    """Mean of `states_BSD` over the prompt of each sequence, [N, D] in fp32.

    A sequence whose every token has a label has no prompt: all of its valid tokens count.

    Args:
        states_BSD: One vector for each token.
        batch: What tells padding and sequences.
        labels: The labels [B, S] of a causal language model, -100 where there is none; else they are not looked at.
    """
    tokens = batch.tokens(states_BSD)
    sequence_T, valid_T = tokens.sequence_T(), tokens.valid_T
    count = tokens.num_sequences
    prompt_T = valid_T
    if isinstance(labels, Tensor) and labels.shape == states_BSD.shape[:2]:
        labelled_T = ((labels != -100).reshape(-1).to(valid_T.device) & valid_T).long()
        seen_T = labelled_T.cumsum(0)
        first_T, _ = tokens.bounds_T()
        before_T = seen_T[first_T] - labelled_T[first_T]  # labels of earlier sequences
        prompt_T = valid_T & (seen_T == before_T)
        has_prompt_N = torch.zeros(count, device=prompt_T.device).index_add_(0, sequence_T, prompt_T.float()) > 0
        prompt_T = torch.where(has_prompt_N[sequence_T], prompt_T, valid_T)
    weight_T1 = prompt_T.float().unsqueeze(-1)
    states_TD = states_BSD.reshape(-1, states_BSD.shape[-1]).float()
    # padding may hold anything, also what is not a number
    states_TD = torch.where(prompt_T.unsqueeze(-1), states_TD, torch.zeros_like(states_TD))
    sums_ND = torch.zeros(count, states_TD.shape[-1], device=states_TD.device).index_add_(0, sequence_T, states_TD)
    counts_N1 = torch.zeros(count, 1, device=states_TD.device).index_add_(0, sequence_T, weight_T1)
    return sums_ND / counts_N1.clamp_min(1)


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the base pass takes: the tokens, and what tells padding and positions."""
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
    inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if args and getattr(module, "main_input_name", "") == "input_ids" and isinstance(args[0], Tensor):
        inputs.setdefault("input_ids", args[0])
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise ConfigError(
            f"the adapter routes each sequence by its prompt, and {type(module).__name__} was called without "
            "input_ids; allowed: token ids, inputs_embeds, or `instance_embedding=` [sequences, features]."
        )
    return inputs


def _last_hidden(module: nn.Module, inputs: Mapping[str, Any], base_pass: Callable[..., Any]) -> Tensor:
    """The last hidden states [B, S, D] of the base: of the encoder, where there is one with a decoder."""
    config = getattr(module, "config", None)
    part: Any = module.get_encoder() if getattr(config, "is_encoder_decoder", False) else module  # type: ignore[operator]
    backbone = getattr(part, "base_model", part)
    taken = {"use_cache": False} if _takes_cache(config) else {}
    if getattr(config, "is_encoder_decoder", False):
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
        taken = {}
    hidden: Tensor = base_pass(backbone, {**inputs, **taken, "return_dict": True}).last_hidden_state
    return hidden


def _takes_cache(config: Any) -> bool:
    return hasattr(config, "use_cache")


def _cached_length(cache: Any) -> int:
    """Number of tokens in a KV cache; that of an encoder-decoder counts those of its decoder."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 1
