"""The program `moelora compose`: from a file or words to the folder of a composition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from moelora.compose.assemble import from_loras
from moelora.compose.pool import named_sources
from moelora.compose.routers.base import Example
from moelora.compose.sources import LoraSource, read_lora
from moelora.compose.tokens import tokenize
from moelora.errors import RunError
from moelora.files import written_folder
from moelora.runs.config import DatasetConfig
from moelora.runs.console import say
from moelora.runs.data import load_rows
from moelora.runs.models import ModelSource, load_model, load_tokenizer
from moelora.runs.schema import build
from moelora.runs.wording import one_line
from moelora.runs.yaml_file import parse_yaml, read_words


@dataclass(kw_only=True)
class ComposeConfig:
    """A composition.

    Args:
        loras: Folders or Hub names of the LoRAs, by the name of the expert.
        output_dir: Folder of the new adapter; it must not exist.
        model: The base model: a name on the Hub, a folder, or the demo model; None takes the one that the first LoRA
            names.
        router: The kind of a recipe, or a mapping of its kind and words.
        dataset: Rows for recipes that are fitted; the column `task` names the expert.
        trainable: Whether training moves the experts too.
        modules_to_save: Modules of the base that are trained whole; see `from_loras`.
        dtype: Data type of the base model's weights.
        model_kwargs: More arguments of `from_pretrained`.
    """

    loras: dict[str, str]
    output_dir: str
    model: str | None = None
    router: str | dict[str, Any] = "uniform"
    dataset: DatasetConfig | None = None
    trainable: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    model_kwargs: dict[str, Any] = field(default_factory=dict)


def compose_config(options: Any) -> ComposeConfig:
    """What the command line says, over what its file says.

    Raises:
        MoeLoraError: If the file cannot be read, or a key or value is not allowed or missing.
    """
    words: dict[str, Any] = read_words(options.config, ()) if options.config else {}
    if options.loras:
        words["loras"] = named_sources(_named(options.loras))
    given = {"router": options.router and _router(options.router), "model": options.base, "output_dir": options.output}
    given |= {"trainable": options.trainable, "dataset": options.data and {"files": list(options.data)}}
    words |= {key: value for key, value in given.items() if value is not None}
    for key, flag in (("loras", "LORA ..."), ("output_dir", "-o FOLDER")):
        if not words.get(key):
            raise RunError(f"{key} is missing; give {flag}, or a file with --config.")
    config: ComposeConfig = build(ComposeConfig, words, "the configuration")
    return config


def _named(given: list[str]) -> Mapping[str, str] | list[str]:
    pairs = [item.partition("=") for item in given]
    if not any(equals for _, equals, _ in pairs):
        return given
    if not all(equals for _, equals, _ in pairs):
        raise RunError(
            f"some LoRAs have a name and some do not ({' '.join(given)}); allowed: NAME=LORA for all, or none."
        )
    named = {name: source for name, _, source in pairs}
    if len(named) < len(pairs):
        raise RunError(f"two LoRAs have the same name ({' '.join(given)}); allowed: a name of its own for each.")
    return named


def _router(text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise RunError(
            f"--router {text!r} is no YAML ({one_line(error)}); for example '{{kind: arrow, top_k: 2}}'."
        ) from error


def compose(config: ComposeConfig, *, any_base_name: bool = False) -> None:
    """Make a composition and save it with the base's tokenizer.

    Args:
        config: What to compose.
        any_base_name: Whether LoRAs may name another base model.

    Raises:
        MoeLoraError: If it cannot be made; nothing is left behind.
    """
    output = Path(config.output_dir)
    if output.exists() or output.is_symlink():
        raise RunError(
            f"the output {str(output)!r} exists; allowed: a folder that does not. Remove it, or name another."
        )
    source = ModelSource(config.model or _stated_base(config), config.dtype, config.model_kwargs)
    tokenizer = load_tokenizer(source)
    examples = {} if config.dataset is None else examples_by_task(config.dataset, tokenizer)
    base = load_model(source, _first_lora(config).config.task_type)
    say(f"Base      {source.model} in {config.dtype}")
    model = from_loras(
        base,
        config.loras,
        config.router,
        examples=examples,
        trainable=config.trainable,
        modules_to_save=config.modules_to_save,
        check_base_name=not any_base_name,
        tokenizer=tokenizer,
    )
    composed = model.peft_config["default"]
    composed.base_model_name_or_path = source.model
    if config.dataset is not None and "rows" in composed.experts.recipe:
        recipe = {**composed.experts.recipe, "data": _names_of(config.dataset)}
        composed.experts = replace(composed.experts, recipe=recipe)
    for name, rank in zip(composed.experts.names, composed.experts.ranks, strict=True):
        say(
            f"Expert    {name}: rank {rank}, {config.loras[name]}"
            + (f", {len(examples[name])} rows" if name in examples else "")
        )
    with written_folder(output, RunError) as ready:
        model.save_pretrained(str(ready))
        tokenizer.save_pretrained(str(ready))
    trainable, _ = model.get_nb_trainable_parameters()
    stored = sum(tensor.numel() for name, tensor in model.state_dict().items() if ".moelora_" in name)
    say(f"Router    {composed.scores.describe()}, {composed.selection.describe()}")
    say(f"Saved     {output}: {stored:,} parameters, {trainable:,} of them to be trained further")
    say(f"Next      moelora inspect {output}")


def _names_of(data: DatasetConfig) -> list[str]:
    """What others may know of where rows came from."""
    if data.tasks:
        return [f"reasoning-gym {task}" for task in data.tasks]
    files = [data.files] if isinstance(data.files, str) else data.files or []
    return [data.hub] if data.hub else [Path(file).name for file in files]


def _first_lora(config: ComposeConfig) -> LoraSource:
    name, source = next(iter(config.loras.items()))
    return read_lora(name, source)


def _stated_base(config: ComposeConfig) -> str:
    """The base model that the first LoRA names.

    Raises:
        RunError: If it names none.
    """
    lora = _first_lora(config)
    if not lora.config.base_model_name_or_path:
        raise RunError(f"the LoRA {lora.source!r} does not name its base model; give --base MODEL.")
    return str(lora.config.base_model_name_or_path)


def examples_by_task(config: DatasetConfig, tokenizer: Any) -> dict[str, list[Example]]:
    """Tokenised rows by their column `task`.

    Raises:
        RunError: If the rows have no such column.
    """
    rows = load_rows(config, tokenizer)
    if "task" not in rows.column_names:
        raise RunError("the rows have no column task, which names the expert of each; map it: `columns: {task: ...}`.")
    by_task: dict[str, list[Example]] = {}
    for row in rows:
        by_task.setdefault(str(row["task"]), []).extend(tokenize([row], tokenizer))
    return by_task
