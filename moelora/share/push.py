"""Upload an adapter, or what it was exported to, to the Hugging Face Hub with a card that is true."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, errors

from moelora.errors import HubError
from moelora.hub.client import hub_errors
from moelora.hub.read import read_json
from moelora.peft_type import PEFT_TYPE
from moelora.share.card import Evaluation, check_training, render_card
from moelora.share.contents import read_contents

# What `moelora train` and `moelora eval` leave in an adapter's folder, and the run's configuration above it. The
# card is made from them; they themselves stay here, since they may name files of this machine.
TRAINING_FILE = "training.json"
RUN_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
# By these a reader tells what a repository holds.
_TELLING = {
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "router.json",
}


def push_to_hub(
    adapter: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    adapter_name: str = "default",
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    metrics: str | Path | None = None,
) -> CommitInfo:
    """Upload an adapter, or what one was exported to, with a card that says what is known of it, and nothing else.

    The card replaces the repository's README.md. An adapter, a PEFT LoRA, LoRAs with a router, a folder of MixLoRA's
    authors and a native MoE are told by their files, and only files of theirs (and a tokenizer's) are uploaded. What
    is not whole is refused before anything is made on the Hub.

    Args:
        adapter: A model with a moelora adapter, or the folder of a saved one or of an export.
        repo_id: The repository as "owner/name"; it is made if it does not exist.
        private: Whether the repository is to be private; None makes a new one as the owner's settings say, and takes an
            existing one as it is.
        token: A token with write permission; None is the one logged in with.
        commit_message: Message of the commit.
        revision: Branch to commit to, made from the main branch if it does not exist; None is the main branch.
        create_pr: Whether to open a pull request instead of committing.
        adapter_name: Which adapter of a model to upload.
        base_model: The base model's name on the Hub; None takes the one recorded in the adapter. A recorded name that
            is not on the Hub (a local folder) is left out of everything uploaded.
        license: License of the adapter as the Hub abbreviates it ("apache-2.0"); None states none.
        datasets: Names on the Hub of the data it was trained on; None takes what the run's
            configuration says.
        metrics: The metrics.json of an evaluation; None takes the one in the adapter's folder, if any.

    Returns:
        The commit; it is also the commit's URL.

    Raises:
        HubError: If there is no such adapter, or the Hub refuses or cannot be reached; the message says which and what
            to do.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _folder_of(adapter, adapter_name, Path(temporary))
        contents = read_contents(folder)
        records = _records(folder)
        if metrics is not None:
            if not Path(metrics).is_file():
                raise HubError(f"there is no file {str(metrics)!r} to read metrics from.")
            records[METRICS_FILE] = read_json(Path(metrics))
        evaluation = Evaluation.parse(records.get(METRICS_FILE))
        check_training(records.get(TRAINING_FILE))
        # Whatever can be refused is refused before anything is made on the Hub.
        base_model = _base_on_hub(api, base_model, contents.base_model)
        files = contents.published(base_model)
        with hub_errors(repo_id, "write"):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private is not None and api.model_info(repo_id).private != private:
                raise HubError(
                    f"{repo_id!r} exists and private is {not private}, not {private} as asked for; nothing was "
                    "uploaded. Change its visibility in its settings, or leave private out."
                )
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = render_card(
            contents,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            datasets=datasets,
            training=records.get(TRAINING_FILE),
            run=records.get(RUN_FILE),
            evaluation=evaluation,
        )
        files["README.md"] = card.encode()
        _check_rest(api, repo_id, revision, files)
        with hub_errors(repo_id, "write"):
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=commit_message or "Upload moelora adapter",
                revision=revision,
                create_pr=create_pr,
            )


def _check_rest(api: HfApi, repo_id: str, revision: str | None, files: Mapping[str, Any]) -> None:
    """Refuse to leave files beside ours that say that the repository is something else.

    Raises:
        HubError: If there are any.
    """
    with hub_errors(repo_id, "write"):
        there = set(api.list_repo_files(repo_id, revision=revision))
    left = sorted(there & _TELLING - set(files))
    if left:
        raise HubError(
            f"{repo_id!r} holds {', '.join(left)} of something that was uploaded before, which would be read in place "
            "of this; nothing was uploaded. Take another repository, or delete these files there."
        )


def _folder_of(adapter: Any, adapter_name: str, temporary: Path) -> Path:
    """The folder to upload from; an adapter in memory is saved into `temporary`."""
    if isinstance(adapter, (str, os.PathLike)):
        return Path(adapter)
    adapters = getattr(adapter, "peft_config", None)
    if not isinstance(adapters, dict):
        raise HubError(
            f"a {type(adapter).__name__} holds no adapter; give a model made by peft.get_peft_model or "
            "PeftModel.from_pretrained, or an adapter's folder."
        )
    if adapter_name not in adapters:
        raise HubError(f"there is no adapter {adapter_name!r}; the model has {', '.join(map(repr, adapters))}.")
    if adapters[adapter_name].peft_type != PEFT_TYPE:
        raise HubError(
            f"adapter {adapter_name!r} is of type {adapters[adapter_name].peft_type!r}, not {PEFT_TYPE.value!r}; "
            "upload it with its own `push_to_hub`."
        )
    saved = temporary / "saved"
    adapter.save_pretrained(saved, selected_adapters=[adapter_name])
    # PEFT puts every adapter but "default" into a folder of its name, where from_pretrained(repo) would not look.
    return saved if adapter_name == "default" else saved / adapter_name


def _records(folder: Path) -> dict[str, Any]:
    """What lies beside an adapter on training and evaluation, by file name."""
    records = {name: read_json(folder / name) for name in (TRAINING_FILE, METRICS_FILE) if (folder / name).is_file()}
    # Without a record of training the folder above is not known to be the run that made this adapter.
    if TRAINING_FILE in records and (folder.resolve().parent / RUN_FILE).is_file():
        records[RUN_FILE] = yaml.safe_load((folder.resolve().parent / RUN_FILE).read_text())
    return records


def _base_on_hub(api: HfApi, given: str | None, recorded: str | None) -> str | None:
    """The base model's name if the Hub knows it."""
    name = given or recorded
    if name is None:
        return None
    if given is None and Path(name).exists():
        known = False
    else:
        with hub_errors(name, "read"):
            try:
                known = api.repo_exists(name)
            except errors.HFValidationError:
                known = False
    if known:
        return name
    if given is not None:
        raise HubError(
            f"base_model {given!r} is not on the Hub, or the token does not open it; nothing was uploaded. Check the "
            "name, or leave base_model out."
        )
    warnings.warn(
        f"the base model is recorded as {recorded!r}, which is not on the Hub; the uploaded card and configuration do "
        "not name it. Pass base_model= with its name there so that others can load the adapter.",
        stacklevel=3,
    )
    return None
