"""What is evaluated: the base model, and adapters of a run, a folder or the Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelora.config import MoeLoraConfig
from moelora.errors import MoeLoraError, RunError
from moelora.runs.config import DatasetConfig, RunConfig, load_config
from moelora.runs.folder import ADAPTER, BASELINE, RunDir
from moelora.runs.models import ModelSource, load_adapter, load_model
from moelora.runs.recipes import RECIPES
from moelora.runs.schema import build
from moelora.runs.wording import one_line
from moelora.runs.yaml_file import apply_override

BESIDE = "beside"
# What tables call a preset.
TITLES = {
    "mixlora": "MixLoRA",
    "sira": "SiRA",
    "smora": "SMoRA",
    "molora": "MoLoRA",
    "random_router": "random router",
}


@dataclass(frozen=True)
class Contestant:
    """One of the models that are compared.

    Args:
        name: Its name in tables.
        role: "base", "baseline", "adapter", or `BESIDE` for one that was asked for beside them.
        adapter: Folder or Hub name of its adapter; None for the base model.
        training: What the run noted of its training, if it was trained by one.
    """

    name: str
    role: str
    adapter: str | None = None
    training: dict[str, Any] | None = None

    def load(self, config: RunConfig | ModelSource) -> Any:
        """The model in evaluation mode; the adapter computes in the data types that it was trained and saved in.

        Raises:
            RunError: If the base cannot be loaded, or the adapter is not one of it.
        """
        base = load_model(config)
        if self.adapter is None:
            return base.eval()
        try:
            return load_adapter(base, self.adapter).eval()
        except (OSError, ValueError, RuntimeError) as error:  # PEFT's own, for an adapter that is not ours
            if isinstance(error, MoeLoraError):
                raise
            raise RunError(
                f"adapter {self.adapter!r} cannot be loaded on {config.model!r}: {one_line(error)[:300]} Allowed: an "
                "adapter of this base model."
            ) from error


def find_contestants(source: str, config_file: str | None) -> tuple[RunConfig, list[Contestant], Path]:
    """What to evaluate, by which configuration, and where the results go.

    Args:
        source: Folder of a run, folder of an adapter, or an adapter's name on the Hub.
        config_file: The run's YAML where `source` is an adapter.

    Raises:
        RunError: If there is nothing to evaluate, or no configuration that says on what.
    """
    run = RunDir(source)
    if run.config_file.is_file():
        if config_file is not None:
            raise RunError(f"{source!r} is a run and has its own config.yaml; leave --config out.")
        if not run.is_finished(ADAPTER):
            raise RunError(f"the run {source!r} has no finished adapter; `moelora train {run.config_file}` resumes it.")
        config = load_config(run.config_file)
        if RECIPES[config.recipe].task_type != "CAUSAL_LM":
            raise RunError(
                f"the run {source!r} is of recipe {config.recipe!r}; allowed: one of a causal language model."
            )
        contestants = [Contestant("base", "base")]
        if run.is_finished(BASELINE):
            baseline = _of_run(run, BASELINE)
            in_turn = " in turn" if config.recipe == "sequential" else ""
            contestants.append(replace(baseline, name=f"{baseline.name}{in_turn}"))
        return config, [*contestants, _of_run(run, ADAPTER)], run.root
    results = _results_of_adapter(source)
    if config_file is None:
        raise RunError(
            f"{source!r} is not the folder of a run. If it is an adapter, say what to evaluate it on: pass --config "
            "with the YAML of a run, such as --config configs/quickstart.yaml, or --suite commonsense."
        )
    config = load_config(config_file)
    return config, [Contestant("base", "base"), Contestant(_name(source), "adapter", source)], results


def find_suite_models(
    source: str, config_file: str | None, model: str | None
) -> tuple[RunConfig | ModelSource, list[Contestant], Path]:
    """What to score on a suite: the base, the baseline of a run, and the adapter.

    Args:
        source: Folder of a run, folder of an adapter, or an adapter's name on the Hub.
        config_file: The run's YAML where `source` is an adapter, for its base model and its data type.
        model: The base model where `source` is an adapter; None takes the one that the adapter names.

    Returns:
        The base model, the models, and the folder of the run or adapter, where results go.

    Raises:
        RunError: If there is nothing to evaluate.
    """
    if RunDir(source).config_file.is_file() or config_file is not None:
        if model is not None:
            raise RunError(f"--model {model!r} is given, and so is a configuration with a model. Leave one out.")
        return find_contestants(source, config_file)
    results = _results_of_adapter(source)
    base = model or read_adapter_config(source).base_model_name_or_path
    if not base:
        raise RunError(f"adapter {source!r} does not say what its base model is; say it with --model.")
    return ModelSource(base), [Contestant("base", "base"), Contestant(_name(source), "adapter", source)], results


def run_on_rows(config: RunConfig | ModelSource, source: str, files: Sequence[str]) -> RunConfig:
    """The run whose models are scored on rows of files.

    Args:
        config: The run, or the base model of an adapter that has none.
        source: The run or adapter.
        files: The files; columns and system message are the run's.
    """
    if isinstance(config, RunConfig):
        words: dict[str, Any] = {"tasks": None, "hub": None, "files": list(files), "held_out": 0.0, "limit": None}
        return replace(config, recipe="sft", sequential=None, dataset=replace(config.dataset, **words))
    dataset = DatasetConfig(files=list(files))
    words = {"dtype": config.dtype, "model_kwargs": config.model_kwargs}
    return RunConfig(model=config.model, output_dir=source, dataset=dataset, adapter={"path": source}, **words)


def with_overrides(config: RunConfig, overrides: Sequence[str], sections: Sequence[str]) -> RunConfig:
    """The configuration with values changed by `key=value`.

    Args:
        config: What is scored, and how.
        overrides: As on the command line.
        sections: What may be changed; the rest is as in training.

    Raises:
        RunError: If an override is of another section, or not valid.
    """
    words = dataclasses.asdict(config)
    for override in overrides:
        if override.partition(".")[0] not in sections:
            raise RunError(
                f"override {override!r}; allowed: keys of {' and '.join(sections)}, such as "
                "evaluation.max_new_tokens=64. The rest is as the adapter was trained."
            )
        apply_override(words, override)
    return build(RunConfig, words, "the configuration") if overrides else config


def distinct(contestants: Sequence[Contestant]) -> list[Contestant]:
    """With the end of its folder's name behind the name of a model where two would have the same.

    Raises:
        RunError: If one is given twice.
    """
    given = [Path(each.adapter).as_posix() for each in contestants if each.adapter is not None]
    twice = next((adapter for adapter in given if given.count(adapter) > 1), None)
    if twice is not None:
        raise RunError(f"the adapter {twice!r} is given twice; leave one out.")
    names = [each.name for each in contestants]
    found, depth = list(contestants), 0
    while len({each.name for each in found}) < len(found):
        depth += 1
        found = [
            replace(each, name=f"{each.name} ({'/'.join(Path(each.adapter).parts[-depth:])})")
            if each.adapter is not None and names.count(each.name) > 1
            else each
            for each in contestants
        ]
    return found


def _results_of_adapter(source: str) -> Path:
    """The folder of an adapter, where its results go; for one on the Hub a folder in `runs`.

    Raises:
        RunError: If there is such a folder, but without an adapter.
    """
    folder = Path(source)
    if not folder.exists():
        return Path("runs") / source.replace("/", "--")
    if not (folder / "adapter_config.json").is_file():
        raise RunError(f"{source!r} is neither a run (no config.yaml) nor an adapter (no adapter_config.json).")
    return folder


def beside(adapter: str) -> Contestant:
    """An adapter to compare with."""
    return Contestant(_name(adapter), BESIDE, adapter)


def read_adapter_config(adapter: str) -> Any:
    """An adapter's configuration.

    Raises:
        RunError: If it cannot be read.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise RunError(f"adapter {adapter!r} cannot be read: {error}") from error


def _of_run(run: RunDir, stage: str) -> Contestant:
    folder = run.stage(stage)
    record = json.loads((folder / "training.json").read_text()) if (folder / "training.json").is_file() else None
    return Contestant(_name(str(folder)), stage, str(folder), record)


def _name(adapter: str) -> str:
    """What a table calls an adapter: its preset; of a mixture without one the experts and the router."""
    config = read_adapter_config(adapter)
    preset = getattr(config, "preset", None)
    if preset:
        return TITLES.get(preset, preset)
    if isinstance(config, MoeLoraConfig):
        E, kind = config.experts.num_experts, config.experts.kind
        return f"{E} {'LoRA' if kind == 'lora_composed' else 'expert'}{'s' * (E > 1)} by {config.scores.kind}"
    return f"LoRA r={config.r}" if hasattr(config, "r") else str(config.peft_type)
