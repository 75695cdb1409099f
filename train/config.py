"""Read a run's YAML with `key=value` overrides, and build what PEFT and TRL take from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train.errors import RunError, one_line
from train.schema import RunConfig, build, check_keys


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and no key twice.

    PyYAML follows YAML 1.1, where `1e-3` is a text for want of a dot, and `no`, as in `save_strategy: no`, is false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML as the programs here understand it.

    Raises:
        yaml.YAMLError: If it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: The YAML file.
        overrides: `key=value` each, with dots for nested keys; the value is parsed as YAML.

    Raises:
        RunError: If the file cannot be read, or a key or value in it is not allowed.
    """
    config = build(RunConfig, read_words(path, overrides), "the configuration")
    # Everything that can be refused is refused here, before a model is loaded or a file written.
    sft_config(config, Path(config.output_dir))
    adapter_config(config)
    return config


def read_words(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's mapping, with overrides applied.

    Args:
        path: The YAML file.
        overrides: As of `load_config`.

    Raises:
        RunError: If the file cannot be read or is no mapping, or an override is not valid.
    """
    path = Path(path)
    try:
        words = parse_yaml(path.read_text())
    except OSError as error:
        raise RunError(f"cannot read the configuration {str(path)!r}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise RunError(f"{str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(words, dict):
        raise RunError(f"{str(path)!r} holds {type(words).__name__}; it must hold a mapping of keys to values.")
    for override in overrides:
        apply_override(words, override)
    return words


def apply_override(words: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the nested mapping `words`.

    Raises:
        RunError: If it has no "=", the value is not YAML, or the key leads through something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RunError(f"override {override!r} is not key=value, such as adapter.r=8 or training.max_steps=20.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RunError(f"the value of override {override!r} is not valid YAML: {one_line(error)}") from error
    *parents, last = key.split(".")
    place = words
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise RunError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is {place!r}, which has no keys.")
    place[last] = value


def save_config(config: RunConfig, path: Path) -> None:
    """Write the whole configuration, defaults included, so that `python -m train` runs it again."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120))


def adapter_config(config: RunConfig) -> Any:
    """The `MoeLoraConfig` of the section `adapter`.

    Raises:
        RunError: If the section names no preset.
        moelora.errors.ConfigError: If the preset or one of its words is unknown or not valid.
    """
    return preset_config(config.adapter)


def preset_config(words: dict[str, Any]) -> Any:
    """The `MoeLoraConfig` of a preset's name, `preset`, and its words.

    Raises:
        RunError: If no preset is named.
        moelora.errors.ConfigError: If the preset or one of its words is unknown or not valid.
    """
    from moelora import MoeLoraConfig, presets

    words = dict(words)
    preset = words.pop("preset", None)
    if not isinstance(preset, str):
        raise RunError(f"adapter.preset is {preset!r}; it must be one of {', '.join(presets.available())}.")
    return MoeLoraConfig.from_preset(preset, **{"task_type": "CAUSAL_LM", **words})


def sft_config(config: RunConfig, output_dir: Path, changes: dict[str, Any] | None = None) -> Any:
    """The `SFTConfig` of the section `training`, with defaults that suit these programs.

    Args:
        config: The run.
        output_dir: Folder of the checkpoints.
        changes: Fields to set over those of the run.

    Raises:
        RunError: If a field is unknown or its value is refused.
    """
    return sft_arguments({**config.training, **(changes or {})}, output_dir)


def sft_arguments(words: dict[str, Any], output_dir: Path) -> Any:
    """An `SFTConfig` of its fields, with defaults that suit these programs.

    Args:
        words: The fields.
        output_dir: Folder of the checkpoints.

    Raises:
        RunError: If a field is unknown or its value is refused.
    """
    import torch
    from trl import SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:  # argparse would print its whole usage and exit
            raise RunError(f"training: {one_line(message.removeprefix('argument --'))}")

    ours = {
        "output_dir": "it is the run's output_dir",
        "model_init_kwargs": "use model_kwargs at the top level",
        "push_to_hub": "use `moelora push` once the run is done",
    }
    words = dict(words)
    for key, reason in ours.items():
        if key in words:
            raise RunError(f"training.{key} cannot be set: {reason}.")
    fields = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
    check_keys("training", words, fields - set(ours))
    # transformers 5.23 warns at the old name, which TRL's own default still uses.
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in fields and old in words:
            words.setdefault(new, words.pop(old))
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    defaults = {
        "report_to": "none",
        # TRL recomputes activations by default, which costs a third of the speed.
        checkpointing: False,
        # TRL turns autocast on by default; here `dtype` and `adapter_dtype` say what is computed in what.
        "bf16": False,
        # transformers refuses bf16 on CPU unless told that CPU is meant.
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 5,
        "save_total_limit": 2,
    }
    parser = Parser((SFTConfig,))
    parser.set_defaults_with_config(**{**defaults, **words}, output_dir=str(output_dir))
    try:
        (parsed,) = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, RunError) else RunError(f"training: {one_line(error)}") from error
    return parsed
