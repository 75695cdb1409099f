"""What a folder to upload holds, and whether all of it is there. Nothing of a base model is needed for that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from moelora.errors import HubError
from moelora.export.record import RECORD_FILE, public_origin, read_record
from moelora.export.tudb.names import PICKLE_FILE
from moelora.export.tudb.read import read_folder
from moelora.files import TOKENIZER_FILES
from moelora.hub.client import CONFIG_FILE, WEIGHTS_FILE
from moelora.hub.info import AdapterInfo
from moelora.hub.read import read_adapter, read_headers, read_json
from moelora.peft_type import PEFT_TYPE

Kind = Literal["adapter", "lora", "loras", "mixlora", "native-moe"]

ROUTER_FILE, ROUTER_WEIGHTS, EXAMPLE_FILE = "router.json", "router.safetensors", "route.py"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a folder.

    Attributes:
        kind: An adapter of moelora, one PEFT LoRA, several with a router, a folder of MixLoRA's authors, or a native
            MoE.
        folder: Where.
        files: The names of the files to upload.
        base_model: The base model as it is recorded.
        task_type: PEFT's word for the task.
        info: Of an adapter of moelora, what it is.
        loras: Of PEFT LoRAs, their configurations by the name of their folder; "" is the folder itself.
        words: The router's or model's or adapter's own JSON.
        record: What the export noted; empty of what was not exported by moelora.
    """

    kind: Kind
    folder: Path
    files: tuple[str, ...]
    base_model: str | None
    task_type: str | None
    info: AdapterInfo | None = None
    loras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def thresholds(self) -> list[float]:
        """Of an adapter, the least cosine at which each expert takes a prompt; empty without them."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".moelora_router.threshold")]  # noqa: SIM118
            return [float(value) for value in file.get_tensor(names[0]).flatten()] if names else []

    def published(self, base_model: str | None) -> dict[str, Path | bytes]:
        """The files by name; JSON that names the base model does it as the card does: a path helps nobody else."""
        files: dict[str, Path | bytes] = {name: self.folder / name for name in self.files}
        for name in self.files:
            if Path(name).name not in (CONFIG_FILE, ROUTER_FILE):
                continue
            words = json.loads((self.folder / name).read_text())
            words["base_model" if name == ROUTER_FILE else "base_model_name_or_path"] = base_model
            if words.get("peft_type") == PEFT_TYPE and words["experts"].get("sources"):
                words["experts"]["sources"] = [public_origin(origin) for origin in words["experts"]["sources"]]
            files[name] = json.dumps(words, indent=2, sort_keys=name == CONFIG_FILE).encode()
        return files


def read_contents(folder: Path) -> Contents:
    """Read what a folder holds.

    Raises:
        HubError: If it is nothing that can be uploaded, or not all of it is there.
        MoeLoraError: If a file says what this version cannot read.
    """
    if not folder.is_dir():
        raise HubError(f"there is no folder {str(folder)!r}; give an adapter's folder, or the model that holds it.")
    if (folder / CONFIG_FILE).is_file():
        words = _json(folder / CONFIG_FILE)
        kinds = {PEFT_TYPE.value: _adapter, "LORA": _lora, "MIXLORA": _mixlora}
        if words.get("peft_type") not in kinds:
            raise HubError(
                f"{str(folder)!r} holds an adapter of type {words.get('peft_type')!r}; allowed: "
                f"{', '.join(map(repr, kinds))}. Upload it with its own library."
            )
        return kinds[words["peft_type"]](folder, words)
    if (folder / ROUTER_FILE).is_file():
        return _loras(folder, _json(folder / ROUTER_FILE))
    if (folder / "config.json").is_file():
        return _native_moe(folder, _json(folder / "config.json"))
    inside = {path.parent.name: _json(path).get("peft_type") for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))}
    if inside and set(inside.values()) == {"LORA"}:
        raise HubError(f"{str(folder)!r} has LoRAs in {', '.join(inside)}, and no {ROUTER_FILE}; export them again.")
    raise HubError(
        f"{str(folder)!r} is nothing to upload: {CONFIG_FILE} is missing, {ROUTER_FILE} and config.json as well. "
        f"Allowed: a saved adapter, or an export of `moelora export`. Inside are {', '.join(inside) or 'none'}."
    )


def _adapter(folder: Path, words: Mapping[str, Any]) -> Contents:
    info = read_adapter(folder)
    check_whole(info)
    files = _files(folder, (CONFIG_FILE, WEIGHTS_FILE))
    config = info.config
    return Contents(
        kind="adapter",
        folder=folder,
        files=files,
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
        info=info,
        words=words,
    )


def check_whole(info: AdapterInfo) -> None:
    """Refuse an adapter of moelora whose file lacks tensors, as far as that shows without its base model.

    Raises:
        HubError: With the first that is missing.
    """
    if lacking := info.missing():
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise HubError(
            f"{info.source!r} is not whole: {WEIGHTS_FILE} lacks {lacking[0]}{more}. Save the adapter again."
        )


def _lora(folder: Path, words: Mapping[str, Any]) -> Contents:
    _check_lora(folder)
    return Contents(
        kind="lora",
        folder=folder,
        files=_files(folder, (CONFIG_FILE, WEIGHTS_FILE)),
        base_model=words.get("base_model_name_or_path"),
        task_type=words.get("task_type"),
        loras={"": words},
        record=read_record(folder, "lora"),
    )


def _loras(folder: Path, words: Mapping[str, Any]) -> Contents:
    kind, listed = words.get("kind"), words.get("loras")
    if kind not in ("task", "centroid") or not isinstance(listed, list if kind == "centroid" else dict):
        raise HubError(
            f"{str(folder / ROUTER_FILE)!r} has kind {kind!r} and {type(listed).__name__} as loras; allowed: 'task' "
            "with a mapping, or 'centroid' with a list, as `moelora export --to lora` writes it."
        )
    given = [*(listed.values() if isinstance(listed, dict) else listed), words.get("otherwise")]
    names = list(dict.fromkeys(name for name in given if name is not None))
    for name in names:
        # also so that no name leads out of the folder
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise HubError(
                f"{ROUTER_FILE} lists the LoRA {name!r}; allowed: folders beside it, in letters, digits, '_.-'."
            )
        if not (folder / name / CONFIG_FILE).is_file():
            raise HubError(f"{ROUTER_FILE} lists the LoRA {name!r}, and {name}/{CONFIG_FILE} is missing; export again.")
        _check_lora(folder / name)
    loras = {name: _json(folder / name / CONFIG_FILE) for name in names}
    if not loras:
        raise HubError(f"{ROUTER_FILE} lists no LoRA; allowed: at least one.")
    needed = [ROUTER_FILE, EXAMPLE_FILE, *([ROUTER_WEIGHTS] if kind == "centroid" else [])]
    files = _files(folder, (*needed, *(f"{name}/{file}" for name in names for file in (CONFIG_FILE, WEIGHTS_FILE))))
    if kind == "centroid":
        shapes = {header.name: header.shape for header in read_headers(folder / ROUTER_WEIGHTS)}
        if not {"centroids", "center"} <= shapes.keys() or shapes["centroids"][0] != len(listed):
            raise HubError(
                f"{ROUTER_WEIGHTS} holds {shapes}; allowed: centroids [{len(listed)}, D], one for each LoRA that "
                f"{ROUTER_FILE} lists, and center [1, D]. Export again."
            )
    return Contents(
        kind="loras",
        folder=folder,
        files=files,
        base_model=words.get("base_model"),
        task_type=loras[names[0]].get("task_type"),
        loras=loras,
        words=words,
        record=read_record(folder, "loras"),
    )


def _mixlora(folder: Path, words: Mapping[str, Any]) -> Contents:
    files = _files(folder, (CONFIG_FILE, PICKLE_FILE))
    read_folder(folder)
    return Contents(
        kind="mixlora",
        folder=folder,
        files=files,
        base_model=words.get("base_model_name_or_path"),
        task_type="CAUSAL_LM",
        words=words,
        record=read_record(folder, "mixlora"),
    )


def _native_moe(folder: Path, words: Mapping[str, Any]) -> Contents:
    record = read_record(folder, "native-moe")
    architectures = words.get("architectures")
    if not record or architectures != [record["architecture"]]:
        raise HubError(
            f"{str(folder)!r} is a model of {architectures}, not one that `moelora export --to native-moe` wrote: "
            f"{RECORD_FILE} is missing or of another model. Upload it with its own `push_to_hub`."
        )
    if (folder / _INDEX).is_file():
        index = _json(folder / _INDEX)
        weights = sorted(set(index.get("weight_map", {}).values()))
        if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", str(name)) for name in weights):
            raise HubError(f"{_INDEX} lists {weights}; allowed: safetensors files beside it.")
        files = _files(folder, ("config.json", RECORD_FILE, _INDEX, *weights), ("generation_config.json",))
        found = {header.name: name for name in weights for header in read_headers(folder / name)}
        for tensor, name in index["weight_map"].items():
            if found.get(tensor) != name:
                raise HubError(f"{_INDEX} lists {tensor} in {name}, and it is not there; export again.")
    else:
        weights = ["model.safetensors"]
        files = _files(folder, ("config.json", RECORD_FILE, *weights), ("generation_config.json",))
    num_bytes = sum(header.num_bytes for name in weights for header in read_headers(folder / name))
    if num_bytes != record["num_bytes"]:
        raise HubError(
            f"the weights are {num_bytes:,} bytes, and {RECORD_FILE} says {record['num_bytes']}; tensors are "
            "missing, or they are of another model. Export again."
        )
    return Contents(
        kind="native-moe",
        folder=folder,
        files=files,
        base_model=record["base_model"],
        task_type="CAUSAL_LM",
        words=words,
        record=record,
    )


def _files(folder: Path, needed: Iterable[str], optional: Iterable[str] = ()) -> tuple[str, ...]:
    """What is needed and, where it is there, the record, the tokenizer and what else is optional.

    Whatever else is in a folder (optimizer states, pickles of a checkpoint, records of a run) stays here.

    Raises:
        HubError: If a needed file is missing.
    """
    needed = tuple(needed)
    for name in needed:
        if not (folder / name).is_file():
            raise HubError(f"{str(folder)!r} is not whole: {name} is missing. Save, export or download it again.")
    beside = [name for name in (RECORD_FILE, *optional, *TOKENIZER_FILES) if (folder / name).is_file()]
    return tuple(dict.fromkeys((*needed, *beside)))


def _check_lora(folder: Path) -> None:
    """Refuse a LoRA without weights, or with half a pair."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise HubError(f"{str(folder)!r} is not whole: {WEIGHTS_FILE} is missing. Save or export it again.")
    names = {header.name for header in read_headers(folder / WEIGHTS_FILE)}
    halves = {name: name.replace(*swap) for name in names for swap in _SWAPS if swap[0] in name}
    lost = sorted(other for other in halves.values() if other not in names)
    if lost or not halves:
        raise HubError(
            f"{str(folder)!r} is not whole: {WEIGHTS_FILE} lacks {lost[0] if lost else 'any LoRA'}. Save or export it "
            "again."
        )


_SWAPS = (
    (".lora_A.", ".lora_B."),
    (".lora_B.", ".lora_A."),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora_embedding_B", ".lora_embedding_A"),
)


def _json(file: Path) -> dict[str, Any]:
    words = read_json(file)
    if not isinstance(words, dict):
        raise HubError(f"{str(file)!r} holds a {type(words).__name__}; allowed: a JSON object.")
    return words
