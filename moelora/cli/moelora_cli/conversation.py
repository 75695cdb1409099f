"""The conversation that `moelora chat` holds."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from moelora import MoeLoraConfig, batch_facts, record_routing
from moelora.errors import MoeLoraError, RunError
from moelora.runs.models import add_adapter, load_tokenizer
from moelora_cli.programs import load_program

COMMANDS = "/adapter NAME, /off, /new, /quit"
# What the adapter that a conversation begins with is called in the model.
_FIRST = "default"


@dataclass(eq=False)
class Conversation:
    """A model, and what was said so far.

    Attributes:
        model: The base model with its adapters.
        tokenizer: Its tokenizer.
        adapters: Adapters as the user calls them, to their names in the model.
        options: The words of the command.
        is_on: Whether an adapter answers, and not the base model alone.
        messages: What was said, as messages of a chat.
    """

    model: Any
    tokenizer: Any
    adapters: dict[str, str]
    options: argparse.Namespace
    is_on: bool = True
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, options: argparse.Namespace) -> Conversation:
        """Load what the command says.

        Raises:
            MoeLoraError: If it cannot be loaded, or a word does not do.
        """
        if options.max_new_tokens < 1 or options.temperature < 0:
            raise RunError(
                f"--max-new-tokens is {options.max_new_tokens} and --temperature {options.temperature}; allowed: at "
                "least 1 and at least 0."
            )
        sources = load_program("eval.scoring.sources")
        base, contestants, _ = sources.find_suite_models(options.adapter, None, options.model)
        model = contestants[-1].load(base)
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        found = cls(model, load_tokenizer(base), {options.adapter: _FIRST}, options)
        found.facts()  # what is wrong with the task is said before anything is asked
        found.forget()
        return found

    def hold(self) -> None:
        """Answer each line of the input until it ends."""
        is_terminal = sys.stdin.isatty()
        print(f"{self.options.adapter}. Commands: {COMMANDS}", flush=True)
        while True:
            if is_terminal:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                break
            words = line.strip()
            if words == "/quit":
                break
            try:
                if words.startswith("/"):
                    print(self.command(words), flush=True)
                elif words:
                    print(self.answer(words), flush=True)
            except MoeLoraError as error:  # the conversation goes on
                print(f"moelora chat: {error}", file=sys.stderr, flush=True)

    def command(self, words: str) -> str:
        """Do what a line that begins with a slash says.

        Raises:
            MoeLoraError: If it is no command, or the adapter cannot be loaded.
        """
        verb, _, rest = words.partition(" ")
        rest = rest.strip()
        if verb == "/off":
            self.is_on = False
            return "The base model answers."
        if verb == "/new":
            self.forget()
            return "A new conversation."
        if verb == "/adapter" and rest:
            if rest not in self.adapters:
                name = f"adapter_{len(self.adapters)}"
                add_adapter(self.model, rest, name)
                self.adapters[rest] = name
            self.model.set_adapter(self.adapters[rest])
            self.is_on = True
            return f"{rest} answers."
        raise RunError(f"{words!r} is no command; allowed: {COMMANDS}. Loaded: {', '.join(self.adapters)}.")

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [] if self.options.system is None else [{"role": "system", "content": self.options.system}]

    def answer(self, question: str) -> str:
        """Print the answer while it is made; which experts made it, in words."""
        self.messages.append({"role": "user", "content": question})
        inputs = self._inputs(question)
        length = inputs["input_ids"].shape[1]
        sampling = self.options.temperature > 0
        words: dict[str, Any] = dict.fromkeys(
            ("temperature", "top_p", "top_k")
        )  # not those of the model's own settings
        if sampling:
            words["temperature"] = self.options.temperature
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        routed = self.is_on and isinstance(self._config(), MoeLoraConfig)
        with (
            torch.no_grad(),
            contextlib.nullcontext() if self.is_on else self.model.disable_adapter(),
            batch_facts(**self.facts()),
            record_routing(self.model) if routed else contextlib.nullcontext() as listener,
        ):
            made = self.model.generate(
                **inputs,
                streamer=streamer,
                max_new_tokens=self.options.max_new_tokens,
                do_sample=sampling,
                pad_token_id=self.tokenizer.pad_token_id,
                **words,
            )
        text = self.tokenizer.decode(made[0, length:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return self._who(listener.records if listener is not None else [])

    def facts(self) -> dict[str, Tensor]:
        """What the routing of the active adapter needs beside the text.

        Raises:
            RunError: If it needs the task, and --task does not say one of its tasks.
        """
        config = self._config()
        if "task_ids" not in getattr(config, "needs", ()):
            return {}
        names = list(getattr(config.experts, "names", None) or [])
        count = getattr(config.scores, "num_tasks", None) or config.experts.num_experts
        task, allowed = self.options.task, names or [str(number) for number in range(count)]
        if task not in allowed:
            raise RunError(f"the adapter routes by the task, and --task is {task!r}; allowed: {', '.join(allowed)}.")
        return {"task_ids": torch.tensor([allowed.index(task)], device=self.model.device)}

    def _config(self) -> Any:
        return self.model.peft_config[self.model.active_adapter]

    def _inputs(self, question: str) -> dict[str, Tensor]:
        if self.tokenizer.chat_template:
            found = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:  # a base model that knows no turns goes on with the text
            found = self.tokenizer(question, return_tensors="pt")
        return {key: found[key].to(self.model.device) for key in ("input_ids", "attention_mask")}

    def _who(self, records: list[Any]) -> str:
        """The experts' shares in an answer: at the token that each token of it was predicted from, over all layers."""
        if not self.is_on:
            return "[the base model]"
        if not records:
            return "[an adapter without a router]"
        num_experts = max(record.num_experts for record in records)
        shares = torch.zeros(num_experts)
        for record in records:
            load_E = record.routing.load_TE()[-1].float().cpu()
            shares[: len(load_E)] += load_E / max(float(load_E.sum()), 1.0)
        shares /= len(records)
        config = self._config()
        names = list(getattr(config.experts, "names", None) or map(str, range(num_experts)))
        order = [index for index in shares.argsort(descending=True).tolist() if shares[index] >= 0.005]
        parts = [f"{names[index]} {shares[index]:.0%}" for index in order]
        if (rest := 1 - float(shares.sum())) >= 0.005:
            parts.append(f"base model {rest:.0%}")
        return f"[experts: {', '.join(parts)}]"
