"""Which tokens of a forward are padding.

Shape suffixes: B sequences, S tokens of a sequence, D input features.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PaddingMasks:
    """The 2-D padding masks of one forward.

    Attributes:
        main: True where a token of the model (of the encoder, in an encoder-decoder model) is not padding; None if the
            forward was given no 2-D mask (packed or padding-free batches, inputs by themselves).
        decoder: The same of the decoder.
        encoded: Address of the encoder's output, by which cross-attention layers of the decoder that read it are told
            from those that read the decoder's own states.
        cached: Whether earlier tokens are in a KV cache, so that the masks are longer than the inputs.
    """

    main: Tensor | None = None
    decoder: Tensor | None = None
    encoded: int | None = None
    cached: bool = False

    @classmethod
    def of_forward(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PaddingMasks:
        """Read the masks from the arguments of a base model's forward."""
        if len(args) > 1:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        main = _mask_2d(kwargs.get("attention_mask"))
        cached = kwargs.get("past_key_values") is not None
        if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            return cls(main, main, cached=cached)
        decoder = _mask_2d(kwargs.get("decoder_attention_mask"))
        labels = kwargs.get("labels")
        if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
            decoder = labels != -100
        masks = cls(main, decoder, cached=cached)
        given = kwargs.get("encoder_outputs")
        return masks if given is None else masks.with_encoded(given)

    def with_encoded(self, encoder_output: Any) -> PaddingMasks:
        """The same, knowing the encoder's output."""
        states = encoder_output[0]
        return replace(self, encoded=states.data_ptr()) if isinstance(states, Tensor) else self

    def valid_BS(self, stream: str, x: Tensor) -> Tensor:
        """Which of the tokens in `x` [..., D] are not padding, by sequences.

        Without a mask that fits every token is valid. Inputs of two dimensions [N, D] are N tokens of the batch's
        sequences if that adds up, else N sequences of one token. With a KV cache the end of a longer mask counts.

        Args:
            stream: "main" or "decoder": where the layer sits.
            x: Its input.
        """
        mask = self.main
        if stream == "decoder" and (self.encoded is None or x.data_ptr() != self.encoded):
            mask = self.decoder
        leading = x.shape[:-1]
        if mask is not None and len(leading) == 2 and mask.shape[0] == leading[0]:
            excess = mask.shape[1] - leading[1]
            if excess == 0 or (excess > 0 and self.cached):
                return mask[:, excess:].to(x.device)
        if mask is not None and len(leading) == 1 and mask.numel() == leading[0]:
            return mask.to(x.device)
        shape = (leading[0], leading[1:].numel()) if len(leading) > 1 else (leading.numel(), 1)
        return torch.ones(shape, dtype=torch.bool, device=x.device)


def _mask_2d(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
