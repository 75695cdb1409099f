"""What is derived of a batch before the model runs: one embedding of each sequence, or the base's hidden states.

Routing by sequence must not change while an answer grows, so it looks at the prompt alone: with labels the tokens
before the first one that has a label, in generation the tokens that it starts from, else all valid tokens. Of a
conversation it may leave out the turns before the user's last.

Shape suffixes: B rows of the batch, S tokens of a row, D features, T = B * S tokens, N sequences, M tokens that open a
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moelora.errors import ConfigError
from moelora.routing.batch import Batch, Tokens

BASE_HIDDEN = "base_hidden"
"""The fact that is the last hidden states of the base model without its adapters."""
_MEANS = ("input_mean", "hidden_mean")


def prompt_mean(embedding: str, turn_start: Sequence[int] = ()) -> str:
    """The name of the fact that is a mean over each prompt.

    Args:
        embedding: "input", of the model's input embeddings; or "hidden", of the last hidden states of the base model
            without its adapters, which costs one more pass over the prompt.
        turn_start: Token ids that open a turn of the user. The turns before the last one are left out of the mean.
    """
    return " ".join([f"{embedding}_mean", *map(str, turn_start)])


def is_prompt_mean(fact: str) -> bool:
    """Whether a fact's name is one of `prompt_mean`."""
    return fact.split(" ", maxsplit=1)[0] in _MEANS


def is_derived(fact: str) -> bool:
    """Whether a fact is found by `derive`; the others are given by the user."""
    return fact == BASE_HIDDEN or is_prompt_mean(fact)


def derive(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch: Batch,
    wanted: frozenset[str],
    base_pass: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> dict[str, Tensor]:
    """The derived facts that are wanted, without gradient: means [N, D] in fp32, `BASE_HIDDEN` [B, S, D] as it is.

    Args:
        module: The model that is called.
        args, kwargs: What it is called with.
        batch: What was read of that.
        wanted: Their names, see `prompt_mean` and `BASE_HIDDEN`.
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
    once: list[Tensor] = []

    def hidden_BSD() -> Tensor:
        if not once:
            once.append(_last_hidden(module, inputs, base_pass))
        return once[0]

    def embeddings_BSD() -> Tensor:
        if "inputs_embeds" in inputs:
            return cast("Tensor", inputs["inputs_embeds"])
        embed: Any = module.get_input_embeddings()  # type: ignore[operator]
        return cast("Tensor", embed(inputs["input_ids"]))

    def mean_ND(fact: str) -> Tensor:
        name, *ids = fact.split(" ")
        turn_start, labels = [int(token) for token in ids], kwargs.get("labels")
        if name == "hidden_mean" and turn_start and "input_ids" in inputs:
            return _mean_of_last_turns(module, inputs, batch, labels, turn_start, base_pass)
        states_BSD = hidden_BSD() if name == "hidden_mean" else embeddings_BSD()
        return mean_of_prompts(states_BSD, batch, labels, inputs.get("input_ids"), turn_start)

    with torch.no_grad():
        return {fact: hidden_BSD() if fact == BASE_HIDDEN else mean_ND(fact) for fact in wanted}


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


def mean_of_prompts(
    states_BSD: Tensor,
    batch: Batch,
    labels: Any = None,
    input_ids: Tensor | None = None,
    turn_start: Sequence[int] = (),
) -> Tensor:
    """Mean of `states_BSD` over the prompt of each sequence, [N, D] in fp32.

    A sequence whose every token has a label has no prompt: all of its valid tokens count.

    Args:
        states_BSD: One vector for each token.
        batch: What tells padding and sequences.
        labels: The labels [B, S] of a causal language model, -100 where there is none; else they are not looked at.
        input_ids: The tokens [B, S]; None (a batch of `inputs_embeds`) counts whole prompts.
        turn_start: Token ids that open a turn of the user. Of a prompt that has them more than once what stands between
            the first and the last opening does not count: as if the earlier turns had not been said.
    """
    tokens = batch.tokens(states_BSD)
    sequence_T, count = tokens.sequence_T(), tokens.num_sequences
    prompt_T = _prompt_T(tokens, labels, states_BSD.shape[:2], input_ids, turn_start)
    weight_T1 = prompt_T.float().unsqueeze(-1)
    states_TD = states_BSD.reshape(-1, states_BSD.shape[-1]).float()
    # padding may hold anything, also what is not a number
    states_TD = torch.where(prompt_T.unsqueeze(-1), states_TD, torch.zeros_like(states_TD))
    sums_ND = torch.zeros(count, states_TD.shape[-1], device=states_TD.device).index_add_(0, sequence_T, states_TD)
    counts_N1 = torch.zeros(count, 1, device=states_TD.device).index_add_(0, sequence_T, weight_T1)
    return sums_ND / counts_N1.clamp_min(1)


def _mean_of_last_turns(
    module: nn.Module,
    inputs: Mapping[str, Any],
    batch: Batch,
    labels: Any,
    turn_start: Sequence[int],
    base_pass: Callable[..., Any],
) -> Tensor:
    """Mean of the base's last hidden states over prompts without their earlier turns, [N, D] in fp32.

    A hidden state has seen what stands before it. So the base runs on what counts alone, each prompt in a row of its
    own: a conversation is embedded as its last turn would be.
    """
    ids_BS: Tensor = inputs["input_ids"]
    tokens = batch.tokens(ids_BS.unsqueeze(-1))
    sequence_T, count = tokens.sequence_T(), tokens.num_sequences
    prompt_T = _prompt_T(tokens, labels, ids_BS.shape, ids_BS, turn_start).to(ids_BS.device)
    sequence_T = sequence_T.to(ids_BS.device)
    seen_T, (first_T, _) = prompt_T.long().cumsum(0), tokens.bounds_T()
    first_T = first_T.to(ids_BS.device)
    place_T = seen_T - 1 - (seen_T - prompt_T.long())[first_T]
    # no sequence is longer than its row; only packed ones need the length of the longest, for which a device is waited
    length = ids_BS.shape[1] if count <= len(ids_BS) else int(torch.where(prompt_T, place_T, 0).max()) + 1
    place_T = torch.where(prompt_T, place_T, length)  # what does not count goes to a column that is cut off

    def rows(values_BS: Tensor) -> Tensor:
        found = values_BS.new_zeros(count, length + 1)
        return found.index_put((sequence_T, place_T), values_BS.reshape(-1))[:, :length]

    mask_NL = rows(prompt_T.long().reshape(ids_BS.shape))
    names = [name for name in ("input_ids", "token_type_ids") if name in inputs]
    alone = {name: rows(inputs[name]) for name in names} | {"attention_mask": mask_NL}
    return mean_of_prompts(_last_hidden(module, alone, base_pass), Batch(mask_NL > 0))


def _prompt_T(
    tokens: Tokens, labels: Any, shape: torch.Size, input_ids: Tensor | None, turn_start: Sequence[int]
) -> Tensor:
    """Whether a token counts for the mean over its prompt, [T]; see `mean_of_prompts`."""
    sequence_T, valid_T = tokens.sequence_T(), tokens.valid_T
    count = tokens.num_sequences
    prompt_T = valid_T
    if isinstance(labels, Tensor) and labels.shape == shape:
        labelled_T = ((labels != -100).reshape(-1).to(valid_T.device) & valid_T).long()
        seen_T = labelled_T.cumsum(0)
        first_T, _ = tokens.bounds_T()
        before_T = seen_T[first_T] - labelled_T[first_T]  # labels of earlier sequences
        prompt_T = valid_T & (seen_T == before_T)
        has_prompt_N = torch.zeros(count, device=prompt_T.device).index_add_(0, sequence_T, prompt_T.float()) > 0
        prompt_T = torch.where(has_prompt_N[sequence_T], prompt_T, valid_T)
    if turn_start and input_ids is not None:
        prompt_T = prompt_T & ~_earlier_turns_T(input_ids, turn_start, prompt_T, sequence_T, count)
    return prompt_T


def _earlier_turns_T(
    input_ids: Tensor, turn_start: Sequence[int], prompt_T: Tensor, sequence_T: Tensor, count: int
) -> Tensor:
    """Whether a token lies from the first opening of a turn to before the last one in its sequence's prompt, [T]."""
    ids_T = input_ids.reshape(-1).to(prompt_T.device)
    start_M = torch.tensor(turn_start, device=ids_T.device)
    T, M = len(ids_T), len(start_M)
    place_T = torch.arange(T, device=ids_T.device)
    if M > T:
        return torch.zeros_like(prompt_T)
    windows_WM = ids_T.unfold(0, M, 1)
    end_W = place_T[M - 1 :]
    # an opening lies within one prompt: its first and last token do, and a prompt has no gaps but padding
    opens_W = (windows_WM == start_M).all(-1) & prompt_T[: T - M + 1] & prompt_T[end_W]
    opens_W = opens_W & (sequence_T[: T - M + 1] == sequence_T[end_W])
    opens_T = torch.zeros_like(prompt_T)
    opens_T[: T - M + 1] = opens_W
    first_N = torch.full((count,), T, device=ids_T.device)
    last_N = torch.full((count,), -1, device=ids_T.device)
    first_N = first_N.scatter_reduce(0, sequence_T, torch.where(opens_T, place_T, T), "amin")
    last_N = last_N.scatter_reduce(0, sequence_T, torch.where(opens_T, place_T, -1), "amax")
    return (place_T >= first_N[sequence_T]) & (place_T < last_N[sequence_T])


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
