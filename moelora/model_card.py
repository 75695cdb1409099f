"""The model card of an adapter: what its files say, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from moelora.adapter_info import AdapterInfo
from moelora.errors import HubError

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


def render_card(
    info: AdapterInfo,
    *,
    repo_id: str,
    base_model: str | None,
    license: str | None,
    datasets: Sequence[str] | None,
    metrics: Any,
) -> str:
    """Write the card, front matter included.

    Args:
        info: The adapter.
        repo_id: The repository it goes to.
        base_model: The base model's name on the Hub, if it has one.
        license: License of the adapter.
        datasets: Names on the Hub of its training data.
        metrics: Content of the metrics.json of an evaluation.
    """
    config = info.config
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
        *_scores(metrics),
        _versions(info),
    ]
    return "\n\n".join(sections) + "\n"


def _tags(info: AdapterInfo) -> list[str]:
    routed = ["mixture-of-lora-experts"] if info.is_routed else []
    preset = info.config.preset
    return list(dict.fromkeys(["moelora", "lora", *routed, *([preset] if preset else [])]))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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
    base_line = "" if base_model else "BASE_MODEL = ...  # the model it was trained on; its name was not recorded\n"
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
        + table(("axis", "setting"), axes)
        + "\n\n"
        + table(("modules", "layers", "what", "number", "values"), sites)
    )


def _versions(info: AdapterInfo) -> str:
    config = info.config
    versions = [f"moelora {config.moelora_version} (format {config.format_version})"]
    if config.peft_version:
        versions.append(f"PEFT {config.peft_version}")
    return "## Versions\n\nWritten by " + ", ".join(versions) + "."


def _scores(metrics: Any) -> list[str]:
    """The section of scores: a line a task and metric, a column a model."""
    if metrics is None:
        return []
    rows = _score_rows(metrics)
    models = list(dict.fromkeys(str(row.get("model", "value")) for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        line = (str(row["task"]), str(row["metric"]), str(row.get("n", "")))
        lines.setdefault(line, {})[str(row.get("model", "value"))] = _score(row)
    body = [(*line, *(cells.get(model, "") for model in models)) for line, cells in lines.items()]
    return ["## Scores\n\n" + table(("task", "metric", "n", *models), body)]


def _score_rows(metrics: Any) -> list[dict[str, Any]]:
    """The rows {task, metric, value, stderr, n, model}: the file itself, or the first list of them in it."""
    lists = [metrics, *metrics.values()] if isinstance(metrics, dict) else [metrics]
    for rows in lists:
        if (
            isinstance(rows, list)
            and rows
            and all(isinstance(r, dict) and {"task", "metric", "value"} <= set(r) for r in rows)
        ):
            return rows
    raise HubError(
        "the metrics hold no scores: expected a list of {task, metric, value, ...}, or a mapping with such a list in "
        "it. Leave metrics out, or remove metrics.json from the adapter's folder."
    )


def _score(row: dict[str, Any]) -> str:
    stderr = f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else ""
    return f"{row['value']:.3f}{stderr}"
