"""The file that `moelora init` writes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from moelora.errors import RunError
from moelora.files import is_hub_name, write_atomically
from moelora.runs.config import RunConfig, adapter_config, load_config
from moelora.runs.data import SUFFIXES
from moelora.runs.estimate import estimate
from moelora_cli.programs import load_program

# Rows of an optimizer step; how many of them at once depends on the memory.
_BATCH = 16
# What is left for kernels and the allocator.
_SHARE = 0.9
# Parameters below which a base is small, and learning rates of a LoRA and of a mixture with the reason for the first.
_SMALL = 5e8
_RATES_OF_SMALL = ("1e-3", "2e-3", "the best of five for a LoRA on SmolLM2-135M, see docs/training.md")
_RATES = ("2e-4", "4e-4", "usual for a LoRA on models of billions of parameters")
_ADAPTERS = {
    "lora": "{preset: lora, r: 16, lora_alpha: 32}",
    "mixlora": "{preset: mixlora, r: 8, lora_alpha: 16, num_experts: 8, top_k: 2}",
}
_GPU = "dtype: bfloat16  # of the base's weights\n"
_CPU = """\
# The next three are for a CPU, on which they halve the time of a step; for a GPU leave `dtype: bfloat16` alone.
dtype: fastest  # of the base's weights: bfloat16, or float32 where the CPU computes bfloat16 slower
adapter_dtype: base
model_kwargs: {attn_implementation: eager}  # with long rows sdpa is faster
"""
_TEMPLATE = """\
# A run of moelora. Next:
#
#   moelora params {file}    # sizes, memory and operations, before anything is loaded
#   moelora train {file}     # the same again after a stop resumes it
#
# The keys are those of `moelora.runs.config.RunConfig`; any of them can be changed for one call, as in
# `moelora train {file} adapter.r=8 training.max_steps=20`.
{recipe}model: {model}
{device}dataset:
  {source}
  # Rows have prompt and completion, messages, or text{task}. Where your columns have other names:
  # columns: {{prompt: question, completion: answer, task: subject}}
  held_out: 0.1  # share of each task's prompts that is not trained on; `moelora eval` scores on them
adapter: {adapter}  # {about}
{more}training:  # any field of trl.SFTConfig
  learning_rate: {rate}  # {about_rate}
  lr_scheduler_type: cosine
  warmup_steps: 0.1  # share of the steps
  num_train_epochs: 1
  per_device_train_batch_size: {micro}  # with the next two lines about {needed:.1f} GiB, estimated for full sequences
  gradient_accumulation_steps: {accumulation}
  activation_checkpointing: {checkpointing}  # true computes activations again in the backward pass: less memory, slower
  max_length: 1024  # tokens of a row; what is longer is cut
  logging_steps: 5
  save_steps: 100
  seed: 0
output_dir: {output}
"""


def device_memory() -> float:
    """GiB of the device that training would take."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def write_run_file(
    file: str, *, model: str, data: str, tasks: str, memory: float, preset: str | None = None
) -> list[str]:
    """Write the YAML file of a run, once it is known that it can be read.

    Args:
        file: Where.
        model: The base model.
        data: Files with commas between, or a data set on the Hub.
        tasks: "one", "together", or names with commas between.
        memory: GiB for training.
        preset: The method; None for the one that suits the tasks.

    Returns:
        What to tell the user.

    Raises:
        MoeLoraError: If the file exists, an answer does not do, or the model cannot be read.
    """
    import torch

    if Path(file).exists():
        raise RunError(f"the file {file!r} exists; allowed: a new one, by -o.")
    order = [] if tasks in ("one", "together") else [name.strip() for name in tasks.split(",") if name.strip()]
    if tasks not in ("one", "together") and len(order) < 2:
        raise RunError(f"the tasks are {tasks!r}; allowed: one, together, or two or more names with commas between.")
    if order and preset not in (None, "lora"):
        raise RunError(f"the preset is {preset!r} with tasks in turn; allowed: lora, of which each task gets one.")
    name = preset or ("mixlora" if tasks == "together" else "lora")
    words: dict[str, Any] = {
        "file": file,
        "model": json.dumps(model),
        "device": _GPU if torch.cuda.is_available() else _CPU,
        "source": _source(data),
        "task": ", and here a column task" if order else "",
        "adapter": _ADAPTERS.get(name, f"{{preset: {name}}}"),
        "output": f"runs/{Path(file).stem}",
        **_method(name, tasks, order, _RATES),
    }
    fitted = _fit(words, memory)
    if fitted["base"] < _SMALL:
        words |= _method(name, tasks, order, _RATES_OF_SMALL)
    config = _read(_TEMPLATE.format(**words, **fitted))
    if config.baseline is not None and not _has_rank(config):
        words["more"] = (
            "# No plain LoRA has as many trainable parameters to within 2 %, so that none is trained beside.\n"
        )
    write_atomically(Path(file), _TEMPLATE.format(**words, **fitted))
    lines = [f"Wrote {file}: {config.adapter['preset']} on {model}"]
    if fitted["needed"] > memory:
        lines.append(
            f"It needs about {fitted['needed']:.1f} GiB, and {memory:g} are given. A smaller training.max_length or "
            "model, or a quantised base (`model_kwargs: {quantization_config: {load_in_4bit: true}}`), takes less."
        )
    return [*lines, f"Next: moelora train {file}"]


def _source(data: str) -> str:
    parts = [part.strip() for part in data.split(",") if part.strip()]
    missing = [part for part in parts if not Path(part).expanduser().exists()]
    if len(parts) == len(missing) == 1 and is_hub_name(parts[0]) and Path(parts[0]).suffix not in SUFFIXES:
        return f"hub: {json.dumps(parts[0])}"
    if missing or not parts:
        names = ", ".join(missing) or repr(data)
        raise RunError(f"the rows {names} are not there; allowed: files, or owner/name on the Hub.")
    return f"files: {json.dumps(parts if len(parts) > 1 else parts[0])}"


def _method(name: str, tasks: str, order: list[str], rates: tuple[str, str, str]) -> dict[str, Any]:
    """What depends on the method, on how the tasks come, and on which learning rates suit the base model."""
    of_lora, of_mixture, why = rates
    about = f"`moelora presets {name}` has its words"
    words = {
        "recipe": "",
        "more": "",
        "about": about,
        "rate": of_lora,
        "about_rate": why,
    }
    if order:
        words["recipe"] = "recipe: sequential  # the tasks one after the other, each into an expert of its own\n"
        words["about"] = "each expert"
        words["more"] = (
            "sequential:\n"
            f"  order: {json.dumps(order)}  # the names in the column task\n"
            "  router: centroids  # a prompt goes to the expert whose training prompts it is nearest to\n"
        )
    elif name != "lora":
        words["rate"], words["about_rate"] = of_mixture, "twice that of the LoRA, see docs/training.md"
        words["more"] = (
            "# A plain LoRA with as many trainable parameters on the same rows, which is hard to beat; null for none.\n"
            f"baseline: {{training: {{learning_rate: {of_lora}}}}}  # {why}\n"
        )
    elif tasks == "together":
        words["about"] += "; `moelora diagnose` finds out whether a mixture would be better"
    return words


def _fit(words: dict[str, Any], memory: float) -> dict[str, Any]:
    """The largest micro-batch that fits, without recomputation of activations if possible, else what needs least."""
    found: list[dict[str, Any]] = []
    for checkpointing in ("false", "true"):
        one = {"micro": 1, "accumulation": _BATCH, "checkpointing": checkpointing, "needed": 0.0}
        estimated = estimate(_read(_TEMPLATE.format(**words, **one)))
        needed = estimated.memory
        # activations grow with the rows at once, and nothing else does
        fixed = sum(needed.values()) - needed["activations"]
        for micro in (16, 8, 4, 2, 1):
            gib = (fixed + micro * needed["activations"]) / 2**30
            fits = {"micro": micro, "accumulation": _BATCH // micro, "needed": gib, "base": estimated.parameters.base}
            found.append({**one, **fits})
    return next((each for each in found if each["needed"] <= _SHARE * memory), found[-1])


def _has_rank(config: RunConfig) -> bool:
    """Whether a plain LoRA can have the adapter's number of trainable parameters."""
    try:
        load_program("train.baseline").baseline_config(config, config.baseline, adapter_config(config))
    except RunError:
        return False
    return True


def _read(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text)
        return load_config(file)
