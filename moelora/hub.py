"""Adapters and the Hugging Face Hub: read what one is, and upload one with a model card that is true."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, constants, errors, hf_hub_download
from safetensors import SafetensorError, safe_open

from moelora.adapter_info import AdapterInfo, TensorHeader
from moelora.config import MoeLoraConfig
from moelora.errors import HubError
from moelora.model_card import Evaluation, render_card
from moelora.peft_plugin import PEFT_TYPE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What `python -m train` and `python -m eval` leave in an adapter's folder, and the run's configuration above it. The
# card is made from them; they themselves stay here, since they may name files of this machine.
TRAINING_FILE = "training.json"
RUN_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
# A checkpoint folder also holds optimizer states and pickles, which nobody who loads the adapter needs.
UPLOADED = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


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
    """Upload an adapter with a model card that says what is known of it, and nothing else.

    The card replaces the repository's README.md. `PeftModel.from_pretrained(base, repo_id)` loads the adapter back.

    Args:
        adapter: A model with a moelora adapter, or the folder of a saved one.
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
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging)
        records = _stage(adapter, adapter_name, folder)
        if metrics is not None:
            if not Path(metrics).is_file():
                raise HubError(f"there is no file {str(metrics)!r} to read metrics from.")
            records[METRICS_FILE] = _read_json(Path(metrics))
        evaluation = Evaluation.parse(records.get(METRICS_FILE))
        info = read_adapter(folder)
        # Whatever can be refused is refused before anything is made on the Hub.
        base_model = _base_on_hub(api, base_model, info.config.base_model_name_or_path)
        _record_base(folder / CONFIG_FILE, base_model)
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
            info,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            datasets=datasets,
            training=records.get(TRAINING_FILE),
            run=records.get(RUN_FILE),
            evaluation=evaluation,
        )
        (folder / "README.md").write_text(card)
        with hub_errors(repo_id, "write"):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload moelora adapter",
                revision=revision,
                create_pr=create_pr,
            )


def _stage(adapter: Any, adapter_name: str, folder: Path) -> dict[str, Any]:
    """Put the files to upload into `folder`; what lies beside them on training and evaluation, by file name."""
    if isinstance(adapter, (str, os.PathLike)):
        source = Path(adapter)
        if not source.is_dir():
            raise HubError(
                f"there is no folder {str(adapter)!r}; give an adapter's folder, or the model that holds it."
            )
        read_adapter(source)
    else:
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
        source = folder / ".saved"
        adapter.save_pretrained(source, selected_adapters=[adapter_name])
        # PEFT puts every adapter but "default" into a folder of its name, where from_pretrained(repo) would not look.
        if adapter_name != "default":
            source = source / adapter_name
    for name in UPLOADED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    records = {name: _read_json(source / name) for name in (TRAINING_FILE, METRICS_FILE) if (source / name).is_file()}
    # Without a record of training the folder above is not known to be the run that made this adapter.
    if TRAINING_FILE in records and (source.resolve().parent / RUN_FILE).is_file():
        records[RUN_FILE] = yaml.safe_load((source.resolve().parent / RUN_FILE).read_text())
    shutil.rmtree(folder / ".saved", ignore_errors=True)
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


def _record_base(config_file: Path, base_model: str | None) -> None:
    """Name the base in the uploaded configuration as the card does: a path of this machine helps nobody else."""
    words = json.loads(config_file.read_text())
    words["base_model_name_or_path"] = base_model
    config_file.write_text(json.dumps(words, indent=2, sort_keys=True))


def read_adapter(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> AdapterInfo:
    """Read what an adapter is.

    Args:
        source: A folder that holds adapter_config.json and adapter_model.safetensors, or the name of a Hub repository.
        revision: Branch, tag or commit of the repository; None is its main branch.
        token: Token for a private repository; None is the one logged in with.

    Raises:
        HubError: If there is no such adapter, it cannot be reached, or it is not one of moelora's.
        FormatVersionError: If it was written in a newer format than this version reads.
        ConfigError: If its configuration is not valid.
    """
    source = str(source)
    if Path(source).is_dir():
        folder = Path(source)
        tensors = _local_headers(folder)
    elif source.count("/") > 1 or source.startswith((".", "/", "~")) or Path(source).exists():
        raise HubError(f"there is no folder {source!r}; give an adapter's folder, or a Hub repository as 'owner/name'.")
    else:
        with hub_errors(source, "read"):
            metadata = HfApi(token=token).parse_safetensors_file_metadata(source, WEIGHTS_FILE, revision=revision)
            config_file = hf_hub_download(source, CONFIG_FILE, revision=revision, token=token)
        tensors = [TensorHeader(name, t.dtype, tuple(t.shape)) for name, t in metadata.tensors.items()]
        folder = Path(config_file).parent
    return AdapterInfo(source=source, config=_read_config(folder, source), tensors=tuple(tensors))


def _read_config(folder: Path, source: str) -> MoeLoraConfig:
    words = _read_json(folder / CONFIG_FILE)
    if words.get("peft_type") != PEFT_TYPE.value:
        raise HubError(
            f"{source!r} is not a moelora adapter: its {CONFIG_FILE} says peft_type {words.get('peft_type')!r}, not "
            f"{PEFT_TYPE.value!r}. Use PEFT itself for adapters of its own methods."
        )
    config: MoeLoraConfig = MoeLoraConfig.from_pretrained(str(folder))
    return config


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise HubError(
            f"{str(path)!r} is not valid JSON ({error}); it may be cut off. Save or download it again."
        ) from error


def _local_headers(folder: Path) -> list[TensorHeader]:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        inside = sorted(str(path.parent) for path in folder.rglob(CONFIG_FILE))
        hint = f" Adapters inside it: {', '.join(inside)}." if inside else " Save one with `model.save_pretrained`."
        raise HubError(f"{str(folder)!r} holds no adapter: {' and '.join(missing)} missing.{hint}")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return [TensorHeader(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
    except SafetensorError as error:
        raise HubError(
            f"{str(folder / WEIGHTS_FILE)!r} is not a readable safetensors file ({error}); it may be cut off. Save or "
            "download it again."
        ) from error


@contextmanager
def hub_errors(repo_id: str, action: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError that says the cause and the fix.

    Args:
        repo_id: The repository in question.
        action: "read" or "write".
    """
    where = f"{action} {repo_id!r} on {constants.ENDPOINT}"
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository name: {error}. Give it as 'owner/name'.") from error
    except errors.GatedRepoError as error:
        raise HubError(f"cannot {where}: access to it is gated. Ask for access on its page, then log in.") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"cannot {where}: there is no such repository, or it is private and the token does not open it. Check the "
            "name; log in with `hf auth login` or pass token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"cannot {where}: it has no such branch, tag or commit. {error.server_message or ''}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(
            f"cannot {where}: it has no {CONFIG_FILE} and {WEIGHTS_FILE}, so it is not an adapter."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"cannot {where}: there is no token. Log in with `hf auth login` or pass token=.") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"cannot {where}: {_cause_of(error)}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(f"cannot {where}: no connection ({error}). Is HF_HUB_OFFLINE set?") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the client's own base, whichever library it uses
        raise HubError(f"cannot {where}: no connection ({error}). Check the network and HF_ENDPOINT.") from error


def _cause_of(error: errors.HfHubHTTPError) -> str:
    said = error.server_message or str(error)
    match error.response.status_code:
        case 401:
            return (
                f"the token was refused ({said}). Make one with write permission and `hf auth login`, or pass token=."
            )
        case 403:
            return f"the token may not do that ({said}). It needs write permission for that owner's repositories."
        case status:
            return f"the Hub answered {status} ({said})."
