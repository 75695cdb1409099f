"""The model card of an adapter: what its files say, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from moelora.errors import HubError
from moelora.hub.info import AdapterInfo
from moelora.runs.tables import markdown
from moelora.runs.wording import commit_words

# task_type of PEFT: the class that loads the base, and the Hub's name of the task where there is exactly one.
TASKS: dict[str | None, tuple[str, str | None]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    None: ("AutoModel", None),
}
_ROW = {"task", "metric", "value"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a metrics.json says.

    Attributes:
        scores: Rows of task, metric, value and, where known, stderr, n and model.
        receipt: The circumstances: commit, seeds, versions.
    """

    scores: Sequence[Mapping[str, Any]]
    receipt: Mapping[str, Any]

    @classmethod
    def parse(cls, metrics: Any) -> Evaluation | None:
        """Read the content of a metrics.json; None if there is none.

        Raises:
            HubError: If it holds no scores.
        """
        if metrics is None:
            return None
        scores = metrics.get("scores") if isinstance(metrics, dict) else metrics
        if isinstance(scores, list) and scores and all(isinstance(r, dict) and r.keys() >= _ROW for r in scores):
            return cls(scores=scores, receipt=metrics.get("receipt", {}) if isinstance(metrics, dict) else {})
        raise HubError(
            f"the metrics hold no scores: expected a list of rows with {', '.join(sorted(_ROW))}, or a mapping with "
            "such a list as 'scores'. Leave metrics out, or remove metrics.json from the adapter's folder."
        )


def render_card(
    info: AdapterInfo,
    *,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    datasets: Sequence[str] | None,
    training: Mapping[str, Any] | None,
    run: Mapping[str, Any] | None,
    evaluation: Evaluation | None,
) -> str:
    """Write the card, front matter included.

    Args:
        info: The adapter.
        repo_id: The repository it goes to.
        base_model: The base model's name on the Hub, if it has one.
        license: License of the adapter.
        datasets: Names on the Hub of its training data; None takes what the run's configuration says.
        training: What `python -m train` noted: steps, seconds, log.
        run: The configuration of that run.
        evaluation: Its scores.
    """
    config = info.config
    if datasets is None and (trained_on := ((run or {}).get("dataset") or {}).get("hub")):
        datasets = [trained_on]
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        license=license,
        datasets=list(datasets) if datasets else None,
        pipeline_tag=TASKS[config.task_type][1],
        tags=_tags(info),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        _introduction(info, base_model),
        _loading(info, repo_id, base_model),
        _adapter(info),
        *_training(training, run or {}),
        *([_scores(evaluation)] if evaluation else []),
        _versions(info),
    ]
    return "\n\n".join(sections) + "\n"


def _tags(info: AdapterInfo) -> list[str]:
    routed = ["mixture-of-lora-experts"] if info.is_routed else []
    preset = info.config.preset
    return list(dict.fromkeys(["moelora", "lora", *routed, *([preset] if preset else [])]))


def _introduction(info: AdapterInfo, base_model: str | None) -> str:
    config = info.config
    what = f"a `{config.preset}` adapter" if config.preset else "an adapter"
    kind = "routed mixtures of LoRA experts" if info.is_routed else "plain LoRA"
    on = f" for [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    return (
        f"This is {what}{on}: {kind} in a frozen base model, made with `moelora`, a plug-in for PEFT. "
        f"It holds {info.num_parameters:,} values ({info.num_trainable:,} of them trained) in "
        f"{', '.join(info.dtypes)}, {info.num_bytes / 2**20:.1f} MiB."
    )


def _loading(info: AdapterInfo, repo_id: str, base_model: str | None) -> str:
    config = info.config
    auto_class = TASKS[config.task_type][0]
    arguments = [repr(base_model)] if base_model else ["BASE_MODEL"]
    if base_model and config.revision:
        arguments.append(f"revision={config.revision!r}")
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and (num_labels := _num_labels(info)):
        arguments.append(f"num_labels={num_labels}")
    base_line = "" if base_model else "BASE_MODEL = ...  # what it was trained on; its name on the Hub is not known\n"
    merging = (
        " Routing depends on the input, so the adapter cannot be merged into the base weights."
        if info.is_routed
        else ""
    )
    return (
        "## How to load it\n\n"
        "```python\n"
        "import moelora  # makes PEFT know the adapter's type\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f"{base_line}"
        f"base = {auto_class}.from_pretrained({', '.join(arguments)})\n"
        f"model = PeftModel.from_pretrained(base, {repo_id!r})\n"
        "```\n\n"
        f"Without `import moelora` PEFT fails with `KeyError: 'MOELORA'`.{merging}"
    )


def _num_labels(info: AdapterInfo) -> int | None:
    """Rows of the saved classification head."""
    heads = [t for t in info.tensors if t.name.rpartition(".")[0].endswith((".score", ".classifier"))]
    return heads[0].shape[0] if heads else None


def _adapter(info: AdapterInfo) -> str:
    sites = [
        (f"`{site.module}`", site.layer_ranges(), site.describe(), str(site.count), f"{site.num_parameters:,}")
        for site in info.sites()
    ]
    axes = [(axis, f"`{words}`") for axis, words in info.axes().items()]
    return (
        "## The adapter\n\n"
        + markdown(("axis", "setting"), axes, numbers=False)
        + "\n\n"
        + markdown(("modules", "layers", "what", "number", "values"), sites, numbers=False)
    )


def _versions(info: AdapterInfo) -> str:
    config = info.config
    versions = [f"moelora {config.moelora_version} (format {config.format_version})"]
    if config.peft_version:
        versions.append(f"PEFT {config.peft_version}")
    return "## Versions\n\nWritten by " + ", ".join(versions) + "."


def _training(training: Mapping[str, Any] | None, run: Mapping[str, Any]) -> list[str]:
    """The section on training: what the run noted of it, and its configuration."""
    facts = []
    data = run.get("dataset") or {}
    if tasks := data.get("tasks"):
        rows = f", {data['rows_per_task']} problems each" if data.get("rows_per_task") else ""
        facts.append(f"data: reasoning-gym {', '.join(f'`{task}`' for task in tasks)}{rows}")
    if data.get("hub"):
        facts.append(f"data: [{data['hub']}](https://huggingface.co/datasets/{data['hub']}), split `{data['split']}`")
    if words := run.get("training"):
        facts.append("settings: " + ", ".join(f"`{key}={value}`" for key, value in words.items()))
    if training:
        facts.append(f"{training['steps']} optimizer steps in {training['seconds']:.0f} seconds")
        losses = [entry["loss"] for entry in training.get("log", []) if "loss" in entry]
        if losses:
            facts.append(f"training loss: {losses[0]:.3f} at the first log, {losses[-1]:.3f} at the last")
    return ["## Training\n\n" + "\n".join(f"- {fact}" for fact in facts)] if facts else []


def _scores(evaluation: Evaluation) -> str:
    """The section of scores: one line per task and metric, one column per model."""
    models = list(dict.fromkeys(str(row.get("model", "value")) for row in evaluation.scores))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in evaluation.scores:
        line = (str(row["task"]), str(row["metric"]), str(row.get("n", "")))
        stderr = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
        lines.setdefault(line, {})[str(row.get("model", "value"))] = f"{row['value']:.3f}{stderr}"
    body = [(*line, *(cells.get(model, "") for model in models)) for line, cells in lines.items()]
    sections = ["## Scores", markdown(("task", "metric", "n", *models), body, numbers=False)]
    receipt = evaluation.receipt
    facts = []
    if git := receipt.get("git"):
        facts.append(f"commit {commit_words(git)}")
    facts += [f"seed of {name}: {seed}" for name, seed in receipt.get("seeds", {}).items()]
    if packages := receipt.get("packages"):
        facts.append("with " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    if facts:
        sections.append("\n".join(f"- {fact}" for fact in facts))
    return "\n\n".join(sections)
