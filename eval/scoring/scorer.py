"""lm-eval's model around one of ours, with progress that can be read in a log file and a count of tokens."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from moelora.forward import takes_logits_to_keep
from moelora.runs.wording import minutes

SECONDS_BETWEEN_LINES = 30.0


class Scorer(HFLM):
    """`HFLM` that scores as it does, and reports.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        batch_size: Rows at once.
        name: What is scored, for the progress.
        short_logits: Whether to compute logits only from the first answer of a batch on, where the model can: saves a
            third of the time with a vocabulary of 49,152. In bfloat16 a sum may be rounded otherwise than in lm-eval.
        interactive: Whether to draw lm-eval's bar; None asks whether standard error is a terminal.

    Attributes:
        tokens: Tokens of all requests so far, prompts and answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        name: str = "",
        short_logits: bool = False,
        interactive: bool | None = None,
    ) -> None:
        # Summed log-probabilities in bfloat16 tie by the dozen; the softmax in float32 costs little beside the model.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self.name = name
        self.tokens = 0
        self._answers: dict[tuple[int, ...], int] = {}
        self._short_logits = short_logits and takes_logits_to_keep(model)
        self._interactive = sys.stderr.isatty() if interactive is None else interactive
        self._total = self._done = 0
        self._started = self._last = 0.0

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.tokens += sum(len(context) + len(answer) for _, context, answer in requests)
        self._answers = {}
        for _, context, answer in requests:
            row = tuple((context + answer)[-(self.max_length + 1) :][:-1])
            self._answers[row] = max(len(answer), self._answers.get(row, 0))
        self._begin(len(self._answers))
        return super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm or not self._interactive, override_bs=override_bs
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        last = self._positions(inps) if attn_mask is None and labels is None else None
        if last is None:
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            # as indices, for the sake of the CPU: of a slice torch would multiply each row by its own copy of the head
            kept = torch.arange(inps.shape[1] - last, inps.shape[1], device=inps.device)
            with torch.no_grad():
                logits = self.model(inps, logits_to_keep=kept, use_cache=False).logits
        self._advance(len(inps))
        return logits

    def _positions(self, inps: Tensor) -> int | None:
        """How many of the last positions of a padded batch hold all its answers; None if that cannot be told.

        lm-eval reads an answer's log-probabilities at its distance from the end, so that logits before the first answer
        need not be there.
        """
        if not self._short_logits:
            return None
        width, last = inps.shape[1], 1
        for row in inps.tolist():
            length = width
            while length and row[length - 1] == 0:  # what lm-eval pads with
                length -= 1
            answer = self._answers.get(tuple(row[:length]))
            if answer is None:
                return None
            last = max(last, width - length + answer)
        return last

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers in lm-eval's way; see `HFLM.generate_until`."""
        self._begin(len(requests))
        return super().generate_until(requests, disable_tqdm or not self._interactive)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **words: Any) -> Tensor:
        generated = super()._model_generate(context, max_length, stop, **words)
        pad = self.tokenizer.pad_token_id
        self.tokens += int((generated != pad).sum())
        self._advance(len(context))
        return generated

    def _begin(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._last = time.monotonic()

    def _advance(self, rows: int) -> None:
        """Print a line now and then where no bar is drawn."""
        self._done += rows
        now = time.monotonic()
        if self._interactive or now - self._last < SECONDS_BETWEEN_LINES or self._done >= self._total:
            return
        self._last = now
        # Requests come longest first, so that this errs on the side of too much.
        left = (now - self._started) / self._done * (self._total - self._done)
        print(f"{self.name}  scored {self._done}/{self._total} requests, {minutes(left)} left at most", flush=True)
