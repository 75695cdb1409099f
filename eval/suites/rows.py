"""The rows of the commonsense tasks: from the Hub, or from a local folder with the same columns."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moelora.errors import RunError
from moelora.runs.wording import one_line

LOCAL_FOLDER = "MOELORA_DATA_DIR"
SPLITS = ("train", "validation", "test")
# SuperGLUE's copy of BoolQ puts "Title -- " before a passage, google/boolq does not.
_TITLE = re.compile(r"^.{1,100}? -- ")


def load(*, folder: str, path: str, name: str | None = None, revision: str | None = None, **_: Any) -> Any:
    """The splits of a task; lm-eval calls it with the `dataset_kwargs` and the metadata of a YAML.

    Args:
        folder: Name of the task's folder in `MOELORA_DATA_DIR`, which holds `<split>.jsonl` or `<split>.jsonl.gz`.
        path: Name on the Hub.
        name: Configuration on the Hub.
        revision: Revision on the Hub.

    Raises:
        RunError: If the rows cannot be had.
    """
    local = os.environ.get(LOCAL_FOLDER)
    if local:
        return _local(Path(local).expanduser() / folder)
    from datasets import load_dataset

    try:
        return load_dataset(path, name, revision=revision)
    except (OSError, ValueError) as error:
        raise RunError(
            f"the data set {path!r} (configuration {name!r}) cannot be loaded from the Hub: {one_line(error)} Without "
            f"the Hub, set {LOCAL_FOLDER} to a folder that holds {folder}/validation.jsonl.gz and so on, with the "
            "Hub's columns."
        ) from error


def _local(folder: Path) -> Any:
    from datasets import load_dataset

    files = {
        split: str(file)
        for split in SPLITS
        for file in (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl")
        if file.is_file()
    }
    if not files:
        raise RunError(
            f"{LOCAL_FOLDER} is {str(folder.parent)!r}, and {str(folder)!r} has none of "
            f"{', '.join(f'{split}.jsonl.gz' for split in SPLITS)} (or .jsonl). Unset it to read from the Hub."
        )
    rows = load_dataset("json", data_files=files)
    if folder.name == "boolq":
        rows = rows.map(lambda row: {"passage": _TITLE.sub("", row["passage"])}, desc=None)
    return rows
