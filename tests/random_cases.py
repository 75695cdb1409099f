"""Bad input, drawn by hypothesis: each case works, or ends in one line of ours and leaves everything as it was.

`python -m tests.random_cases` runs 10,000 cases; the suite runs a few. One that fails is made smaller, then shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora import MoeLoraConfig, MoeLoraError, presets
from moelora.runs.config import load_config
from moelora.runs.rows import checked_rows
from tests.adapters import SMALL, adapted, outputs, snapshot
from tests.conftest import tiny_model
from tests.reliability import write_section
from tests.runs.tiny import WORDS

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, -(10**18)),
    *(0.0, 0.5, -0.5, 1.0, 1e-300, 1e30, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "all-linear", "*", "(", "q_proj", "\0", "a\nb", "ü" * 300, "../x", "None", "1"),
    *([], [1], ["a"], [[1]], [None], [-1], ["q_proj"], {}, {"kind": "top_k"}, {"kind": 3}, {"a": {"b": 1}}, [1, 2.5]),
]


class Cases:
    """Random cases.

    Args:
        place: A folder to write in.
    """

    def __init__(self, place: Path) -> None:
        self.random = random.Random()
        self.place = place
        self.found: Counter[str] = Counter()
        self.made = ""
        self.base = tiny_model()
        self.view = _view(self.base)
        self.logits = outputs(self.base)
        adapted("sira").save_pretrained(str(place / "adapter"), save_embedding_layers=False)
        self.words = json.loads((place / "adapter" / "adapter_config.json").read_text())
        self.tensors = load_file(place / "adapter" / "adapter_model.safetensors")
        self.kinds: list[tuple[int, Callable[[], None]]] = [
            (6, self.words_of_a_preset),
            (4, self.configuration_of_an_adapter),
            (3, self.file_of_an_adapter),
            (5, self.yaml_of_a_run),
            (4, self.rows_of_a_run),
        ]

    def run(self, number: int, of_seed: int) -> Counter[str]:
        """Run so many cases of a seed; how many of each kind worked and were refused.

        Raises:
            AssertionError: Says how the smallest case was made that failed.
        """
        drawn = settings(
            max_examples=number,
            phases=[Phase.generate, Phase.shrink],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        # as numbers that hypothesis draws, so that it can make a failing case smaller
        seed(of_seed)(drawn(given(st.randoms(use_true_random=False))(self.case)))()
        return self.found

    def case(self, numbers: random.Random) -> None:
        """Make one case of these random numbers, and run it."""
        self.random = numbers
        weights, cases = zip(*self.kinds, strict=True)
        (case,) = numbers.choices(cases, weights)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case()
        except MoeLoraError as error:
            if "\n" in str(error).strip():
                raise AssertionError(f"{self.made}: more than a line: {error}") from error
            self.found[f"{case.__name__}: refused"] += 1
        except Exception as error:
            raise AssertionError(f"{self.made}: {type(error).__name__}: {error}") from error
        else:
            self.found[f"{case.__name__}: worked"] += 1

    def changed(self, words: Any, depth: int = 0) -> Any:
        """Nested words with one thing in them changed, taken away, or added."""
        words = copy.copy(words)
        keys = list(words) if isinstance(words, dict) else list(range(len(words)))
        key = self.random.choice(keys) if keys else None
        nested = key is not None and isinstance(words[key], (dict, list)) and words[key]
        if nested and depth < 3 and self.random.random() < 0.7:
            words[key] = self.changed(words[key], depth + 1)
            return words
        how = self.random.choice(["change"] * 6 + ["drop", "add"])
        value = self.random.choice(VALUES)
        if how == "add" and isinstance(words, dict):
            words[self.random.choice(["foo", "r", "k", "coef", "", "bias"])] = value
        elif how == "drop" and key is not None:
            del words[key]
        elif key is not None:
            words[key] = value
        self.made = f"{self.made} {how} {key!r}: {str(value)[:60]!r}"
        return words

    def words_of_a_preset(self) -> None:
        """A preset of any words: made, or refused."""
        preset = self.random.choice(presets.available())
        self.made = preset
        words = {**SMALL[preset], "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], "bias": "none"}
        known = [*presets.words(preset), "selection", "scores", "balance", "experts"]
        if self.random.random() < 0.5:
            words[self.random.choice(known)] = self.random.choice(VALUES)
        MoeLoraConfig.from_preset(preset, **self.changed(words))

    def configuration_of_an_adapter(self) -> None:
        """A saved adapter with a changed configuration: loaded, or refused with the base as it was."""
        self.made = "adapter_config.json"
        folder = self.copy()
        words = self.changed(self.words)
        words["inference_mode"] = True
        if isinstance(words, dict) and words.get("peft_type") != "MOELORA":
            words["peft_type"] = "MOELORA"  # what it is not, PEFT answers
        (folder / "adapter_config.json").write_text(json.dumps(words))
        self.load(folder)

    def file_of_an_adapter(self) -> None:
        """A saved adapter with a changed file of weights: loaded, or refused with the base as it was."""
        folder = self.copy()
        file = folder / "adapter_model.safetensors"
        how = self.random.choice(["cut", "flip", "tensors", "tensors", "tensors"])
        self.made = f"adapter_model.safetensors {how}"
        if how == "tensors":
            save_file(self.changed_tensors(), file, metadata={"format": "pt"})
            self.load(folder)
            return
        content = bytearray(file.read_bytes())
        place = self.random.randrange(len(content)) if self.random.random() < 0.5 else self.random.randrange(200)
        self.made += f" at {place}"
        if how == "cut":
            content = content[:place]
        else:
            content[place] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)
        self.load(folder)

    def changed_tensors(self) -> dict[str, Tensor]:
        """The tensors of a file with one of them changed, renamed, taken away, or another beside them."""
        tensors = dict(self.tensors)
        key = self.random.choice(list(tensors))
        how = self.random.choice(["dtype", "shape", "value", "rename", "drop", "base", "stranger"])
        self.made += f" {how} {key}"
        tensor = tensors[key]
        if how == "dtype":
            names = ("int64", "bool", "float8_e4m3fn", "float16", "bfloat16", "float64", "complex64", "uint8")
            tensors[key] = tensor.to(getattr(torch, self.random.choice(names)))
        elif how == "shape":
            tensors[key] = self.random.choice([tensor[:1], tensor.flatten(), tensor[None], tensor[:0]]).contiguous()
        elif how == "value":
            tensors[key] = tensor.clone()
            tensors[key].view(-1)[0] = self.random.choice([float("nan"), float("inf"), 1e30, 0.0])
        elif how in ("rename", "drop"):
            del tensors[key]
            if how == "rename":
                tensors[
                    self.random.choice(["a", key + "x", key.replace("layers.0", "layers.9"), "base_model." + key])
                ] = tensor
        else:
            state = self.base.state_dict()
            name = self.random.choice(list(state))
            tensors[f"base_model.model.{name}" if how == "base" else "foo"] = torch.randn(state[name].shape)
        return tensors

    def yaml_of_a_run(self) -> None:
        """A run's configuration: read, or refused; nothing is written."""
        self.made = "run.yaml"
        words = {**copy.deepcopy(WORDS), "model": "model", "output_dir": str(self.place / "run")}
        words["baseline"] = {"r": 2}
        file = self.place / "run.yaml"
        file.write_text(yaml.safe_dump(self.changed(words), allow_unicode=True))
        load_config(file)
        assert not (self.place / "run").exists()

    def rows_of_a_run(self) -> None:
        """Rows: taken, or refused."""
        self.made = "rows"
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        forms: list[tuple[str, dict[str, Any]]] = [
            ("sft", {"prompt": "a", "completion": "b", "task": "t"}),
            ("sft", {"text": "a"}),
            ("sft", {"messages": chat}),
            ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
            ("dpo", {"prompt": "a", "chosen": chat, "rejected": chat}),
            ("kto", {"prompt": "a", "completion": "b", "label": True}),
            ("classification", {"text": "a", "label": "b"}),
        ]
        recipe, row = self.random.choice(forms)
        try:
            rows = Dataset.from_list([row, self.changed(row), row])
        except Exception:  # what no file of one schema holds
            return
        rows = rows.select_columns([name for name in row if name in rows.column_names])
        checked_rows(rows, recipe, lambda index: f"row {index + 1}")

    def copy(self) -> Path:
        """A fresh copy of the adapter."""
        folder = self.place / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place / "adapter", folder)
        return folder

    def load(self, folder: Path) -> None:
        """Load an adapter and unload it again; the base is as it was, whatever came of it."""
        try:
            model = PeftModel.from_pretrained(self.base, str(folder))
            model.unload()
        finally:
            assert _view(self.base) == self.view, f"{self.made}: the base is not as it was"
            assert torch.equal(outputs(self.base), self.logits), f"{self.made}: the base has other outputs"


def _view(model: Any) -> Any:
    view = snapshot(model)
    view["parameters"] = {name: (known[0], known[2]) for name, known in view["parameters"].items()}
    return view


def table(found: Mapping[str, int], kinds: Sequence[Callable[[], None]]) -> list[str]:
    """How many cases of each kind worked and were refused, as lines of Markdown."""
    lines = ["| case | worked | refused |", "|---|---|---|"]
    for case in kinds:
        name, said = case.__name__, (case.__doc__ or "").rstrip(".").partition(":")
        worked, refused = (found.get(f"{name}: {end}", 0) for end in ("worked", "refused"))
        lines.append(f"| {said[0]} | {worked:,} | {refused:,} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases that the command line asks for; the first that fails ends it with how it was made."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.random_cases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page that gets a section")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        cases = Cases(Path(place))
        found = cases.run(options.cases, options.seed)
        lines = table(found, [case for _, case in cases.kinds])
    print(*lines, sep="\n")
    if options.output is not None:
        said = (
            f"{found.total():,} cases of hypothesis' seed {options.seed}. Each worked, or was refused in one line of "
            "ours; after each load the base model was as before, bit for bit. Any other end stops the program and "
            "writes nothing."
        )
        write_section(options.output, "Bad input at random", "make random-cases", [said, "", *lines])


if __name__ == "__main__":
    main()
