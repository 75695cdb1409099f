"""Writing an adapter and its dense base as one native mixture-of-experts model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from moelora.errors import ExportError
from moelora.export.native_moe.adapter import SavedAdapter
from moelora.export.native_moe.base import BaseWeights, check_complete, open_base
from moelora.export.native_moe.card import render_card
from moelora.export.native_moe.plan import Plan, plan_tensors
from moelora.export.native_moe.routing import MoeRouting, read_routing
from moelora.export.native_moe.targets import Target, find_target
from moelora.export.record import export_record, write_record
from moelora.export.safetensors_writer import DTYPES, size_of, write_sharded
from moelora.files import new_folder
from moelora.runs.wording import one_line

_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class NativeMoe:
    """A native MoE that was written.

    Attributes:
        folder: Where.
        architecture: Its class in transformers.
        num_experts: E of each mixture.
        top_k: K.
        num_layers: Layers.
        base_parameters: Parameters of the dense base.
        parameters: Its parameters; a tied head counts once.
        dtype: Their type.
        num_bytes: Size of its weights on disk.
        files: The files with weights.
        notes: What a user should know.
    """

    folder: Path
    architecture: str
    num_experts: int
    top_k: int
    num_layers: int
    base_parameters: int
    parameters: int
    dtype: str
    num_bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def to_native_moe(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    tokenizer: Any = None,
) -> NativeMoe:
    """Write an adapter with mixtures of feed-forward experts as a native MoE, which needs neither moelora nor PEFT.

    Expert e of a block has the weights `W + scaling * B_e A_e`; the router's weights become the gate's; plain LoRAs
    merge. Computed in fp32 and rounded once to `dtype`. In memory is one tensor at a time (of GraniteMoe: the experts
    of one layer).

    Args:
        adapter: Folder of a saved adapter, or a Hub repository.
        output: The folder to make.
        base: The dense base: a folder or Hub repository with safetensors files, or a model in memory; None is what the
            adapter names.
        dtype: "float32", "bfloat16" or "float16"; None is the base's.
        max_shard_size: Largest file of weights, such as "5GB".
        tokenizer: A tokenizer, or where to load one from; None is the adapter's, else the base's.

    Raises:
        ExportError: If the target cannot express the adapter, the base does not fit it or cannot be read, `output`
            exists, or there is no space. Nothing is left behind.
        HubError: If the adapter or the base cannot be read from the Hub.
    """
    output = Path(output)
    _check_free(output)
    shard_size = size_of(max_shard_size)
    saved = SavedAdapter(adapter)
    named = saved.config.base_model_name_or_path if base is None else base
    if not named and not isinstance(named, nn.Module):
        raise ExportError(f"the adapter {saved.source!r} does not name its base model; give it as base.")
    weights = open_base(named)
    target, words = find_target(weights.config)
    routing = read_routing(saved.config, target)
    check_complete(weights)
    plan = plan_tensors(weights, saved, target, routing)
    dtype = _dtype(dtype, weights)
    num_bytes = sum(tensor.numel for tensor in plan.tensors) * DTYPES[dtype][0].itemsize
    _check_space(output, num_bytes)

    made = _tokenizer(tokenizer, saved, weights)
    config = _config(target, words, routing, plan, dtype)
    head = weights.config.vocab_size * weights.config.hidden_size if plan.tied else 0
    with _disk_errors(output), new_folder(output) as folder:
        files = write_sharded(folder, plan.tensors, dtype, shard_size)
        _write_config(folder, config, routing.words(target))
        _write_generation_config(folder, weights, named)
        if made is not None:
            made.save_pretrained(folder)
        moe = NativeMoe(
            folder=output,
            architecture=target.architecture,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            num_layers=config.num_hidden_layers,
            base_parameters=_base_parameters(weights),
            parameters=sum(tensor.numel for tensor in plan.tensors) - head,
            dtype=dtype,
            num_bytes=num_bytes,
            files=tuple(files),
            notes=tuple(_notes(target, plan, words, routing, made)),
        )
        record = _record(moe, saved, named)
        write_record(folder, record)
        card = render_card(record, title=output.name, load_from="PATH_OR_NAME", base_model=record["base_model"])
        (folder / "README.md").write_text(card)
    return moe


def _record(moe: NativeMoe, saved: SavedAdapter, base: object) -> dict[str, Any]:
    facts = dataclasses.asdict(moe)
    del facts["folder"]
    return export_record("native-moe", saved.config, base, **facts)


def _check_free(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise ExportError(f"{str(output)!r} exists; allowed: a folder that does not, or is empty. Nothing was written.")


def _check_space(output: Path, num_bytes: int) -> None:
    place = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ExportError(
            f"the model takes {num_bytes / 1e9:.1f} GB and {str(place)!r} has {free / 1e9:.1f} GB left; allowed: as "
            "much or less. Free some, or export in a smaller dtype. Nothing was written."
        )


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {str(output)!r}: {one_line(error)} Nothing is left there.") from error


def _dtype(given: str | None, weights: BaseWeights) -> str:
    name = given or str(weights.tensor("model.embed_tokens.weight").dtype).removeprefix("torch.")
    if name not in DTYPES:
        whose = "dtype is" if given else "the base model's data type is"
        raise ExportError(f"{whose} {name!r}; allowed: {', '.join(map(repr, DTYPES))}.")
    return name


def _config(target: Target, words: dict[str, Any], routing: MoeRouting, plan: Plan, dtype: str) -> Any:
    dense = {"mlp_only_layers": plan.unrouted_layers} if target.has_dense_layers else {}
    return getattr(transformers, target.config_class)(
        **words,
        **routing.words(target),
        **dense,
        tie_word_embeddings=plan.tied,
        architectures=[target.architecture],
        dtype=dtype,
    )


def _write_config(folder: Path, config: Any, routing: dict[str, Any]) -> None:
    """Write config.json, with the words of before transformers 5 for the rotary encoding and the routing as well.

    Engines read those; transformers takes them for the same.
    """
    config.save_pretrained(folder)
    file = folder / "config.json"
    words = {**json.loads(file.read_text()), **routing}
    rope = words["rope_parameters"]
    words["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        words["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    file.write_text(json.dumps(words, indent=2, sort_keys=True) + "\n")


def _write_generation_config(folder: Path, weights: BaseWeights, base: Any) -> None:
    if weights.folder is None:
        base.generation_config.to_json_file(folder / _GENERATION)
    elif (weights.folder / _GENERATION).is_file():
        shutil.copyfile(weights.folder / _GENERATION, folder / _GENERATION)


def _tokenizer(given: Any, saved: SavedAdapter, weights: BaseWeights) -> Any:
    """The tokenizer to write, or None if there is none anywhere."""
    if given is not None and not isinstance(given, (str, Path)):
        return given
    beside = [folder for folder in (saved.folder, weights.folder) if folder and (folder / _TOKENIZER).is_file()]
    source = given or next(iter(beside), None)
    if source is None:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ExportError(f"the tokenizer in {str(source)!r} cannot be read: {one_line(error)}") from error


def _base_parameters(weights: BaseWeights) -> int:
    tied = weights.config.tie_word_embeddings
    return sum(math.prod(shape) for name, shape in weights.shapes.items() if not (tied and name == "lm_head.weight"))


def _notes(target: Target, plan: Plan, words: dict[str, Any], routing: MoeRouting, tokenizer: Any) -> Iterator[str]:
    if plan.unrouted_layers:
        layers = ", ".join(map(str, plan.unrouted_layers))
        if target.has_dense_layers:
            yield f"Layers without a mixture stay dense: {layers}."
        else:
            yield (
                f"Layers without a mixture ({layers}) have {routing.num_experts} equal experts and a router of zeros, "
                f"since {target.architecture} has a mixture in every layer: the same output, but larger and slower."
            )
    if words["rope_parameters"].get("rope_type") == "longrope":
        yield (
            "Its rotary encoding changes beyond "
            f"{words['rope_parameters']['original_max_position_embeddings']} tokens. Phi3 drops its cache where a text "
            f"grows over that; {target.architecture} does not, so such texts may continue differently."
        )
    if tokenizer is None:
        yield "No tokenizer was found with the adapter or the base, so none was written."
