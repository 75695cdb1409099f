"""lm-eval's model around one of ours, with progress that can be read in a log file and a count of tokens."""

from __future__ import annotations

import sys
import time
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from train.console import minutes

SECONDS_BETWEEN_LINES = 30.0


class Scorer(HFLM):
    """`HFLM` that scores exactly as it does, and reports.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        batch_size: Rows at once.
        name: What is scored, for the progress.
        interactive: Whether to draw lm-eval's bar; None asks whether standard error is a terminal.

    Attributes:
        tokens: Tokens of all requests so far, prompts and answers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, name: str = "", interactive: bool | None = None
    ) -> None:
        # Summed log-probabilities in bfloat16 tie by the dozen; the softmax in float32 costs little beside the model.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self.name = name
        self.tokens = 0
        self._interactive = sys.stderr.isatty() if interactive is None else interactive
        self._total = self._done = 0
        self._started = self._last = 0.0

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self.tokens += sum(len(context) + len(answer) for _, context, answer in requests)
        self._begin(len({(tuple(context), *answer[:-1]) for _, context, answer in requests}))
        return super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm or not self._interactive, override_bs=override_bs
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits = super()._model_call(inps, attn_mask, labels)
        self._advance(len(inps))
        return logits

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
