"""What a forward knows of its batch beyond the hidden states: one record, filled at the model's entry and handed down.

Shape suffixes: B rows of the batch, S tokens of a row, T = B * S tokens, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import ConfigError

FACTS = ("task_ids", "instance_embedding")
"""Facts that a user gives beside the model's own inputs: one for each sequence of the batch."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one layer's input.

    Attributes:
        valid_BS: True where a token is not padding.
        sequence_BS: Which sequence of the batch each token is in: numbers that rise along the batch, each sequence
            without a gap. None where each row is a sequence.
        facts: What the user gave beside the inputs, one for each sequence.
        prepared: What the routers of adapters made of the batch at the model's entry, [B, S, ...] by adapter.
    """

    valid_BS: Tensor
    sequence_BS: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def valid_T(self) -> Tensor:
        """The same of the flattened tokens."""
        return self.valid_BS.reshape(-1)

    def repeated(self, times: int) -> Tokens:
        """Each token so many times, one after the other: what routing of its parts, such as attention heads, sees."""
        if self.sequence_BS is None:
            return Tokens(self.valid_BS.repeat_interleave(times, 1), None, self.facts)
        return Tokens(
            self.valid_BS.repeat_interleave(times, 1), self.sequence_BS.repeat_interleave(times, 1), self.facts
        )

    def sequence_T(self) -> Tensor:
        """Number of the sequence of each token, from 0."""
        B, S = self.valid_BS.shape
        if self.sequence_BS is not None:
            return self.sequence_BS.reshape(-1)
        return torch.arange(B, device=self.valid_BS.device).repeat_interleave(S)

    @property
    def sequences_key(self) -> Any:
        """Equal for the inputs of two layers if the sequences of their tokens and the facts of these are the same."""
        sequence, facts = self.sequence_BS, [(name, id(value)) for name, value in self.facts.items()]
        return self.valid_BS.shape, *facts, None if sequence is None else (sequence.data_ptr(), sequence.stride())

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has; where rows hold several, an accelerator is waited for."""
        if self.sequence_BS is None:
            return len(self.valid_BS)
        return int(self.sequence_BS.reshape(-1)[-1]) + 1 if self.sequence_BS.numel() else 0

    def bounds_T(self) -> tuple[Tensor, Tensor]:
        """Index of the first and of the last token of each token's sequence, among the flattened tokens."""
        sequence_T = self.sequence_T()
        return torch.searchsorted(sequence_T, sequence_T), torch.searchsorted(sequence_T, sequence_T, right=True) - 1

    def fact_T(self, name: str) -> Tensor:
        """A fact of each token's sequence: its first dimension is T.

        Args:
            name: One of `FACTS`.

        Raises:
            ConfigError: If it was not given, or does not fit the number of sequences.
        """
        self._check_fact(name)
        sequence_T = self.sequence_T()
        return self._of_sequences(name, sequence_T)[sequence_T]

    def _check_fact(self, name: str) -> None:
        if name not in self.facts:
            raise ConfigError(
                f"the adapter routes by {name}, which the batch does not have; allowed: one for each sequence. Pass "
                f"`{name}=` to the model, put it in a column of that name, or use `with moelora."
                f"batch_facts({name}=...)` around the call (PEFT's classes for a task type drop an argument of the "
                "name task_ids).",
                anchor="task-ids" if name == "task_ids" else None,
            )

    def has_fact(self, name: str) -> bool:
        """Whether a fact is known."""
        return name in self.facts

    def fact_N(self, name: str) -> Tensor:
        """A fact of each sequence: its first dimension is N, and `sequence_T` tells the tokens of each.

        Raises:
            ConfigError: As `fact_T`.
        """
        self._check_fact(name)
        return self._of_sequences(name, self.sequence_T())

    def _of_sequences(self, name: str, sequence_T: Tensor) -> Tensor:
        """A fact of each sequence."""
        given = self.facts[name].to(sequence_T.device)
        count = self.num_sequences
        if len(given) == 0 or count % len(given):
            raise ConfigError(f"{name} has {len(given)} entries for {count} sequences; allowed: one for each.")
        # generation expands each prompt to its beams and returned sequences, next to each other
        return given.repeat_interleave(count // len(given), 0)

    def prepared_T(self, adapter: str) -> Tensor | None:
        """What the router of an adapter made of each token, [T, ...]; None if it made nothing.

        Raises:
            ConfigError: If the layer's tokens are not those of the model's entry.
        """
        found = self.prepared.get(adapter)
        if found is None:
            return None
        known_T = found.flatten(0, 1)
        if self.valid_BS.numel() != len(known_T):
            raise ConfigError(
                f"the adapter decides for each of the {len(known_T)} tokens that the model was called with, and a "
                f"layer has {self.valid_BS.numel()} others (of images, sound, experts of the base); allowed: layers of "
                "the text. Leave the layer out with exclude_modules."
            )
        return known_T.to(self.valid_BS.device)

    def rows(self, rows: list[int]) -> Tokens:
        """The tokens of some rows of the batch, with their sequences and the facts of these."""
        prepared = {adapter: made[rows] for adapter, made in self.prepared.items()}
        if self.sequence_BS is None and not self.facts:
            return Tokens(self.valid_BS[rows], prepared=prepared)
        sequence_T = self.sequence_T()
        picked, sequence_RS = sequence_T.view(self.valid_BS.shape)[rows].unique_consecutive(return_inverse=True)
        facts = {name: self._of_sequences(name, sequence_T)[picked] for name in self.facts}
        return Tokens(self.valid_BS[rows], sequence_RS, facts, prepared)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of a model, or of a part of it with inputs of its own, was given.

    Attributes:
        mask_BS: The 2-D padding mask; None if every token counts (packed or padding-free rows, inputs by themselves).
        decoder_mask_BS: The same of the decoder's tokens, at the entry of an encoder-decoder model.
        sequence_BS: Which sequence each token is in, where rows may hold several; see `Tokens`.
        shape: [B, S] of the tokens; None of pixels, sound, or where it is not known.
        encoded: What cross-attention layers of a decoder read, and its batch.
        cached: Whether earlier tokens are in a KV cache, so that the mask is longer than the input.
        facts, prepared: See `Tokens`.
    """

    mask_BS: Tensor | None = None
    decoder_mask_BS: Tensor | None = None
    sequence_BS: Tensor | None = None
    encoded: tuple[Tensor, Batch] | None = None
    cached: bool = False
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    shape: torch.Size | None = None

    def leading(self, x: Tensor) -> torch.Size:
        """[B, S] of a layer's input `x` [..., D], also where the model has flattened it to [N, D], as OPT does."""
        if self.shape is not None and x.dim() == 2 and self.shape.numel() == len(x):
            return self.shape
        return x.shape[:-1]

    def tokens(self, x: Tensor) -> Tokens:
        """The tokens of a layer's input `x` [..., D].

        Without a mask that fits every token is valid. An input of two dimensions [N, D] is N tokens of the batch's
        rows if that adds up, else N rows of one token. With a KV cache the end of a longer mask counts.
        """
        if self.encoded is not None and _is_same(x, self.encoded[0]):
            return self.encoded[1].tokens(x)
        leading, mask, sequence = self.leading(x), self.mask_BS, self.sequence_BS
        known = sequence if mask is None else mask
        if known is not None and len(leading) == 2 and known.shape[0] == leading[0]:
            excess = known.shape[1] - leading[1]
            if excess == 0 or (excess > 0 and self.cached and mask is not None):
                return self._at(x.device, slice(excess, None))
        if known is not None and len(leading) == 1 and known.numel() == leading[0]:
            return self._at(x.device, slice(None))
        shape = (leading[0], leading[1:].numel()) if len(leading) > 1 else (leading.numel(), 1)
        return Tokens(torch.ones(shape, dtype=torch.bool, device=x.device), None, self.facts, self.prepared)

    def _at(self, device: torch.device, columns: slice) -> Tokens:
        mask, sequence = self.mask_BS, self.sequence_BS
        if mask is None:
            assert sequence is not None
            valid = torch.ones_like(sequence, dtype=torch.bool, device=device)
            return Tokens(valid, sequence.to(device), self.facts, self.prepared)
        same = sequence is not None and sequence.shape == mask.shape
        found = sequence[:, columns].to(device) if sequence is not None and same else None
        return Tokens(mask[:, columns].to(device), found, self.facts, self.prepared)

    @classmethod
    def of_call(
        cls,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outer: Batch | None,
        facts: Mapping[str, Tensor],
    ) -> Batch:
        """Read it from the arguments of a model's forward.

        Args:
            module: The model, or a part of it that is a model of its own (a backbone, an encoder, a vision tower).
            args, kwargs: What it is called with.
            outer: The batch of the model around it.
            facts: What the user gave beside the inputs.
        """
        if len(args) > 1:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        mask = _mask(kwargs.get("attention_mask"))
        cached = kwargs.get("past_key_values") is not None
        shape = _token_shape(module, args, kwargs)
        sequence = None if cached else find_sequences(kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"), mask)
        if outer is None:
            decoder_mask = None
            if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
                decoder_mask, labels = _mask(kwargs.get("decoder_attention_mask")), kwargs.get("labels")
                if decoder_mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
                    decoder_mask = labels != -100
            return cls(mask, decoder_mask, sequence, cached=cached, facts=facts, shape=shape)
        states, encoded = kwargs.get("encoder_hidden_states"), None
        if isinstance(states, Tensor):
            encoded = states, cls(_mask(kwargs.get("encoder_attention_mask")), facts=facts)
            mask = outer.decoder_mask_BS if mask is None else mask
        elif mask is None and sequence is None:
            # a mask that was made 4-D on the way, or none: that of the model around it, if it is about these tokens
            known = outer.sequence_BS if outer.mask_BS is None else outer.mask_BS
            if known is not None and known.shape == shape:
                mask, sequence = outer.mask_BS, outer.sequence_BS
        return cls(mask, outer.decoder_mask_BS, sequence, encoded, cached, facts, outer.prepared, shape)


def _mask(value: Any) -> Tensor | None:
    return value.bool() if isinstance(value, Tensor) and value.dim() == 2 else None


def find_sequences(positions: Any, ends: Any, mask_BS: Tensor | None) -> Tensor | None:
    """The number of each token's sequence, from position ids that start again or from `cu_seq_lens`; else None."""
    if isinstance(ends, Tensor):
        tokens = torch.arange(int(ends[-1]), device=ends.device)
        return torch.searchsorted(ends[1:].long().contiguous(), tokens, right=True).view(1, -1)
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        return None
    # of several kinds of positions the first counts the text; there an image may have many zeros, a start only falls
    of_images = positions.dim() == 3
    positions = positions[0] if of_images else positions
    valid_BS = torch.ones_like(positions, dtype=torch.bool) if mask_BS is None else mask_BS
    if valid_BS.shape != positions.shape or positions.shape[1] == 0:
        return None
    falls_BS = torch.zeros_like(valid_BS)
    falls_BS[:, 1:] = positions[:, 1:] < positions[:, :-1]
    # the positions of padding mean nothing, and padding before a row's first token belongs to its sequence
    first_valid_BS = valid_BS & (valid_BS.cumsum(1) == 1)
    starts_BS = (falls_BS if of_images else (positions == 0) | falls_BS) & valid_BS & ~first_valid_BS
    starts_BS[:, 0] = True
    return (starts_BS.reshape(-1).cumsum(0) - 1).view(starts_BS.shape)


def _token_shape(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size | None:
    """[B, S] of a model of tokens; None for one of pixels or sound."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape
    if isinstance(embeds, Tensor):
        return embeds.shape[:2]
    first = args[0] if args and getattr(module, "main_input_name", "") == "input_ids" else None
    return first.shape[:2] if isinstance(first, Tensor) else None


def _is_same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory: reentrant checkpointing hands on another object of it."""
    if x is other:
        return True
    if torch.compiler.is_compiling() or x.shape != other.shape:
        return False
    return x.data_ptr() == other.data_ptr() and x.numel() > 0
