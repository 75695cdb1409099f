"""The card of what is uploaded: what its files say, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from moelora.errors import HubError
from moelora.export.mixing import ignores_input
from moelora.export.native_moe import card as native_moe
from moelora.export.record import adapter_words
from moelora.hub.info import AdapterInfo
from moelora.runs.tables import markdown
from moelora.runs.wording import code, commit_words, text
from moelora.share import export_cards
from moelora.share.composition import data_names, exports, made_of
from moelora.share.contents import Contents
from moelora.share.wording import load_base, origin_link
from moelora.validation import is_real

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
        receipt = metrics.get("receipt", {}) if isinstance(metrics, dict) else {}
        if isinstance(scores, list) and scores and all(map(_is_row, scores)) and isinstance(receipt, dict):
            return cls(scores=scores, receipt=receipt)
        raise HubError(
            f"the metrics hold no scores: expected a list of rows with {', '.join(sorted(_ROW))}, or a mapping with "
            "such a list as 'scores'. Leave metrics out, or remove metrics.json from the adapter's folder."
        )


def _is_row(row: Any) -> bool:
    """Whether it is a score: a task, a metric, and numbers."""
    if not isinstance(row, dict) or not row.keys() >= _ROW:
        return False
    return is_real(row["value"]) and (row.get("stderr") is None or is_real(row["stderr"]))


def check_training(training: Any) -> None:
    """Refuse what is no record of a training.

    Raises:
        HubError: With what is expected.
    """
    if training is None:
        return
    whole = isinstance(training, dict) and is_real(training.get("steps")) and is_real(training.get("seconds"))
    log = training.get("log", []) if isinstance(training, dict) else None
    losses = isinstance(log, list) and all(isinstance(e, dict) and is_real(e.get("loss", 0.0)) for e in log)
    if not (whole and losses):
        raise HubError(
            "training.json in the adapter's folder is no record of a training: expected a mapping with the numbers "
            "steps and seconds, and a list log of mappings. Remove the file; nothing was uploaded."
        )


def render_card(
    contents: Contents,
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
        contents: What is uploaded.
        repo_id: The repository it goes to.
        base_model: The base model's name on the Hub, if it has one.
        license: License of what is uploaded.
        datasets: Names on the Hub of its training data; None takes what the run's configuration and a composition say.
        training: What `moelora train` noted: steps, seconds, log.
        run: The configuration of that run.
        evaluation: Its scores.
    """
    adapter = adapter_words(contents.info.config) if contents.info else contents.record.get("adapter")
    if datasets is None:
        trained_on = ((run or {}).get("dataset") or {}).get("hub")
        datasets = [trained_on] if trained_on else data_names(adapter) if adapter else None
    scores = [_scores(evaluation)] if evaluation else []
    if contents.kind == "native-moe":
        return native_moe.render_card(
            contents.record,
            title=repo_id.rpartition("/")[2],
            load_from=repo_id,
            base_model=base_model,
            license=license,
            datasets=datasets,
            more=scores,
        )
    library, tags = ("peft", _tags(contents.info)) if contents.info else export_cards.library_and_tags(contents)
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        license=license,
        datasets=list(datasets) if datasets else None,
        pipeline_tag=TASKS[contents.task_type][1],
        tags=tags,
    )
    if contents.info:
        info = contents.info
        body = [
            _introduction(info, base_model),
            _loading(info, repo_id, base_model),
            *made_of(adapter_words(info.config), contents.thresholds(), trained=training is not None),
            _adapter(info),
            exports(info.config, is_routed=info.is_routed),
            *_training(training, run or {}),
            *scores,
            _versions(info),
        ]
    else:
        body = [*export_cards.sections(contents, repo_id, base_model, TASKS[contents.task_type][0]), *scores]
    head = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.rpartition('/')[2]}"]
    return "\n\n".join([*head, *body]) + "\n"


def _tags(info: AdapterInfo) -> list[str]:
    routed = ["mixture-of-lora-experts"] if info.is_routed else []
    preset = info.config.preset
    return list(dict.fromkeys(["moelora", "lora", *routed, *([preset] if preset else [])]))


def _introduction(info: AdapterInfo, base_model: str | None) -> str:
    config = info.config
    what = f"a {code(config.preset)} adapter" if config.preset else "an adapter"
    if getattr(config.experts, "names", []):
        what = "a composition of LoRAs that were trained apart"
    kind = "routed mixtures of LoRA experts" if info.is_routed else config.experts.site_phrase(1, routed=False)
    on = f" for [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    return (
        f"This is {what}{on}: {kind} in a frozen base model, made with `moelora`, a plug-in for PEFT. "
        f"It holds {info.num_parameters:,} values ({info.num_trainable:,} of them trained) in "
        f"{', '.join(info.dtypes)}, {info.num_bytes / 2**20:.1f} MiB."
    )


def _loading(info: AdapterInfo, repo_id: str, base_model: str | None) -> str:
    config = info.config
    auto_class = TASKS[config.task_type][0]
    more = []
    if base_model and config.revision:
        more.append(f"revision={config.revision!r}")
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and (num_labels := _num_labels(info)):
        more.append(f"num_labels={num_labels}")
    notes = ["Without `import moelora` PEFT fails with `KeyError: 'MOELORA'`."]
    if info.is_routed and (config.needs or not ignores_input(config)):
        notes.append("Routing depends on the input, so the adapter cannot be merged into the base weights.")
    if "task_ids" in config.needs:
        base = ", -1 for the base model" if config.scores.kind == "task" else ""
        notes.append(
            "Give each sequence its task: `with moelora.batch_facts(task_ids=[0]): model(**inputs)`, or "
            f"`model.generate(**inputs, task_ids=[0])`; numbers from 0 in their order{base}."
        )
    return (
        "## How to load it\n\n"
        "```python\n"
        "import moelora  # makes PEFT know the adapter's type\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f"{load_base(auto_class, base_model, *more)}"
        f"model = PeftModel.from_pretrained(base, {repo_id!r})\n"
        "```\n\n" + " ".join(notes)
    )


def _num_labels(info: AdapterInfo) -> int | None:
    """Rows of the saved classification head."""
    heads = [t for t in info.tensors if t.name.rpartition(".")[0].endswith((".score", ".classifier"))]
    return heads[0].shape[0] if heads else None


def _adapter(info: AdapterInfo) -> str:
    sites = [
        (code(site.module), site.layer_ranges(), site.describe(), str(site.count), f"{site.num_parameters:,}")
        for site in info.sites()
    ]
    axes = [(axis, code(words)) for axis, words in info.axes().items()]
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
        facts.append(f"data: reasoning-gym {', '.join(map(code, tasks))}{rows}")
    if data.get("hub"):
        facts.append(f"data: {origin_link(data['hub'], kind='datasets/')}, split {code(data['split'])}")
    if words := run.get("training"):
        facts.append("settings: " + ", ".join(code(f"{key}={value}") for key, value in words.items()))
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
        line = (text(row["task"]), text(row["metric"]), text(row.get("n", "")))
        stderr = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
        lines.setdefault(line, {})[str(row.get("model", "value"))] = f"{row['value']:.3f}{stderr}"
    body = [(*line, *(cells.get(model, "") for model in models)) for line, cells in lines.items()]
    sections = ["## Scores", markdown(("task", "metric", "n", *map(text, models)), body, numbers=False)]
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
