"""Our task definitions and lm-eval's own, on the same rows of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Our task, the file of lm-eval's, and what the columns of its data set are called there.
OFFICIAL = {
    "moelora_arc_easy": "arc/arc_easy.yaml",
    "moelora_arc_challenge": "arc/arc_challenge.yaml",
    "moelora_boolq": "super_glue/boolq/default.yaml",
    "moelora_openbookqa": "openbookqa/openbookqa.yaml",
    "moelora_social_i_qa": "siqa/siqa.yaml",
    "moelora_winogrande": "winogrande/default.yaml",
    "moelora_piqa": "piqa/piqa.yaml",
    "moelora_hellaswag": "hellaswag/hellaswag.yaml",
}


def official_task(ours: Any) -> Any:
    """lm-eval's own definition of one of our tasks, on our rows."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    words = load_yaml(Path(lm_eval.tasks.__file__).parent / OFFICIAL[ours.config.task])
    words = {key: value for key, value in words.items() if key not in ("tag", "dataset_path", "dataset_name")}
    rows = ours.config.custom_dataset(**ours.config.dataset_kwargs)
    if ours.config.task == "moelora_boolq":  # SuperGLUE's column for google/boolq's `answer`
        rows = rows.map(lambda row: {"label": int(row["answer"])}, desc=None)
    missing = [key for key in ("training_split", "validation_split", "test_split") if words.get(key) not in rows]
    words = {key: value for key, value in words.items() if key not in missing}
    return ConfigurableTask(config={**words, "custom_dataset": lambda **_: rows})


def compare(model: Any, tokenizer: Any, limit: int | None, batch_size: int) -> list[dict[str, Any]]:
    """Score a model by both definitions.

    Returns:
        One row per task: all metrics of both, and whether metrics, requests and each row's results are identical.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from eval.scoring.scorer import Scorer
    from eval.scoring.suite_scores import lean_lm_eval
    from eval.suites.registry import load_suite

    suite = load_suite("commonsense", "loglik")
    theirs = {name: official_task(task) for name, task in suite.tasks.items()}
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    scorer = Scorer(model, tokenizer, batch_size=batch_size, name="base")
    words: dict[str, Any] = {"limit": limit, "bootstrap_iters": 0, "task_manager": suite.manager}
    with lean_lm_eval():
        found = simple_evaluate(model=scorer, tasks=list(suite.tasks.values()), **words)
        official = simple_evaluate(model=plain, tasks=list(theirs.values()), **words)
    rows = []
    for name, task in theirs.items():
        metrics = [_metrics(results) for results in (found["results"][name], official["results"][task.config.task])]
        samples = [found["samples"][name], official["samples"][task.config.task]]
        keys = ("arguments", "resps", *metrics[0])
        rows.append(
            {
                "task": name,
                "official": task.config.task,
                "n": len(samples[0]),
                "ours": metrics[0],
                "theirs": metrics[1],
                "identical": metrics[0] == metrics[1]
                and len(samples[0]) == len(samples[1])
                and all(a[key] == b[key] for a, b in zip(*samples, strict=True) for key in keys),
            }
        )
    return rows


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    shown = [key for key in results if key.endswith(",none") and "_stderr" not in key]
    return {key.removesuffix(",none"): results[key] for key in shown}
