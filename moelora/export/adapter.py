"""An adapter opened for export: its tensors by site, read from a folder or taken from a model.

Of a folder the base model is only built without weights: names, sizes and forms of blocks are all that is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.formats import check_finite, upgrade_keys
from moelora.hub.client import CONFIG_FILE, WEIGHTS_FILE
from moelora.hub.read import local_folder
from moelora.inject.base_modules import base_modules
from moelora.layers.base import MoeLoraLayer
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.modules import unwrapped
from moelora.ops.factors import Factors
from moelora.peft_type import PEFT_TYPE, PREFIX
from moelora.routing.router import Router
from moelora.tensors import AdapterTensors

LORA_EXPERTS = ("lora", "lora_composed", "lora_shared_a", "shards")
"""The kinds of experts that are LoRAs: `scaling * B_e A_e x` and nothing else."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True, eq=False)
class OpenSite:
    """One place of an adapter.

    Attributes:
        name: Name of the wrapped module in the base model.
        linears: Names of the linears that have experts, by role.
        factors: The stacked factors of the experts, by role.
        router: Its router; None for a plain LoRA.
        features: Features of the router's input.
        is_block: Whether it is a whole feed-forward block.
        lora_at: Gives A and B of the LoRA that fixed weights make, where experts have no factors of their own.
    """

    name: str
    linears: Mapping[str, str]
    factors: Mapping[str, Factors]
    router: Router | None
    features: int
    is_block: bool
    lora_at: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class OpenAdapter:
    """An adapter.

    Attributes:
        config: Its configuration.
        sites: Where it is.
        base: The base model, perhaps without weights.
        base_name: The base model's name or folder, if it is known.
        module_names: Names of all modules of the base model.
    """

    config: MoeLoraConfig
    sites: tuple[OpenSite, ...]
    base: nn.Module
    base_name: str | None
    module_names: tuple[str, ...]

    @property
    def routed(self) -> list[OpenSite]:
        """The sites that have a mixture."""
        return [site for site in self.sites if site.router is not None]

    def shortest_targets(self, names: Iterable[str]) -> set[str]:
        """The endings of the names of linears, or the names where an ending would match other modules too."""
        names = set(names)
        endings = {name.rpartition(".")[2] for name in names}
        matched = {name for name in self.module_names if name.rpartition(".")[2] in endings}
        return endings if matched == names else names


def check_exportable(config: MoeLoraConfig, kinds: Sequence[str] = LORA_EXPERTS) -> None:
    """Refuse what no other format holds.

    Args:
        config: The configuration.
        kinds: The kinds of experts that the format holds.

    Raises:
        ExportError: Names the experts, or what is trained beside them.
    """
    kind = config.experts.kind
    if kind not in kinds:
        raise ExportError(
            f"the experts are of kind {kind!r}; allowed: {', '.join(map(repr, kinds))}, whose experts are LoRAs "
            "and nothing else. Keep the adapter in moelora's own format."
        )
    besides = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": None if config.bias == "none" else config.bias,
    }
    for name, value in besides.items():
        if value:
            raise ExportError(
                f"the adapter trains more than its experts: {name} is {value!r}; allowed: None (bias: 'none'). The "
                "formats to export to hold low-rank factors and routers only."
            )


def open_adapter(
    adapter: str | Path | PeftModel,
    *,
    base: str | None = None,
    adapter_name: str = "default",
    kinds: Sequence[str] = LORA_EXPERTS,
) -> OpenAdapter:
    """Open an adapter for export.

    Args:
        adapter: A model with the adapter, a folder that it was saved in, or the name of a Hub repository.
        base: Name or folder of the base model; None takes the one that the adapter records. Of a folder's adapter it
            is where the base model's configuration is read from; no weight is.
        adapter_name: Of a model, the name of the adapter.
        kinds: The kinds of experts that may be exported.

    Raises:
        ExportError: If a file is missing or damaged, a tensor holds NaN or infinity, the base model is not found, or
            the adapter has what no other format holds.
        HubError: If there is no such folder or repository.
        MoeLoraError: If the adapter does not fit the base model.
    """
    if isinstance(adapter, PeftModel):
        return _of_model(adapter, adapter_name, base, "the model", kinds)
    if not isinstance(adapter, (str, Path)):
        raise ExportError(
            f"a {type(adapter).__name__} holds no adapter; allowed: a model made by peft.get_peft_model or "
            "PeftModel.from_pretrained, or an adapter's folder."
        )
    folder = local_folder(adapter, CONFIG_FILE, WEIGHTS_FILE)
    config = read_config(folder, kinds)
    name = base or config.base_model_name_or_path
    model = PeftModel.from_pretrained(
        skeleton_of(name, config.task_type),
        str(folder),
        torch_device="cpu",
        low_cpu_mem_usage=True,
        autocast_adapter_dtype=False,
    )
    _fill(model, upgrade_keys(load_peft_weights(str(folder), device="cpu")))
    return _of_model(model, "default", name, repr(str(folder)), kinds)


def _fill(model: PeftModel, stored: Mapping[str, torch.Tensor]) -> None:
    """Give an adapter its tensors: PEFT has checked them and left them without memory, as their base is."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterTensors):
            for own in module.declared:
                tensor = stored[f"{name.removesuffix('.default')}.{own}"]
                setattr(module, own, nn.Parameter(tensor, requires_grad=False))


def read_config(folder: Path, kinds: Sequence[str] = LORA_EXPERTS) -> MoeLoraConfig:
    """The configuration of a saved adapter whose files are readable and whose experts are of one of these kinds.

    Raises:
        ExportError: If a file is missing or damaged, or it is an adapter of another method.
    """
    weights, file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for needed in (file, weights):
        if not needed.is_file():
            raise ExportError(
                f"{str(folder)!r} holds no adapter of moelora: there is no {needed.name}; allowed: a folder written by "
                "`save_pretrained`."
            )
    words = read_json(file)
    if words.get("peft_type") != PEFT_TYPE.value:
        raise ExportError(
            f"{str(folder)!r} is an adapter of type {words.get('peft_type')!r}; allowed: {PEFT_TYPE.value!r}."
        )
    try:
        with safe_open(weights, framework="numpy") as opened:
            others = sorted(name for name in opened.keys() if f".{PREFIX}" not in name)  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ExportError(
            f"{str(weights)!r} is not a readable safetensors file: {one_line(error)} It may be cut off; save or "
            "download it again."
        ) from error
    config: MoeLoraConfig = MoeLoraConfig.from_pretrained(str(folder))
    check_exportable(config, kinds)
    if others:
        raise ExportError(
            f"{str(weights)!r} holds more than experts and routers ({others[0]}, ...), such as embeddings that were "
            "resized; allowed: none. No other format has a place for them."
        )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ExportError: If it is missing, or holds something else.
    """
    try:
        words = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{str(file)!r} is not a readable JSON file: {one_line(error)}") from error
    if not isinstance(words, dict):
        raise ExportError(f"{str(file)!r} holds a {type(words).__name__}; allowed: a JSON object.")
    return words


def skeleton_of(name: str | None, task_type: str | None) -> nn.Module:
    """A base model without weights.

    Raises:
        ExportError: If its name is not known, or there is no such model.
    """
    import transformers

    if name is None:
        raise ExportError("the adapter does not record its base model; allowed: its name or folder. Give it as base.")
    auto: Any = getattr(transformers, _AUTO_CLASSES.get(task_type or "", "AutoModel"))
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"the base model {name!r} cannot be read: {one_line(error)} Allowed: a name on the Hub, or a folder with a "
            "config.json. Give another as base."
        ) from error
    return model


def _of_model(
    model: PeftModel, adapter_name: str, base_name: str | None, where: str, kinds: Sequence[str]
) -> OpenAdapter:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, MoeLoraConfig):
        known = [name for name, each in model.peft_config.items() if isinstance(each, MoeLoraConfig)]
        raise ExportError(
            f"the model has no adapter of moelora called {adapter_name!r}; allowed: {', '.join(known) or 'none'}."
        )
    check_exportable(config, kinds)
    base = model.get_base_model()
    ending = f".{adapter_name}"
    tensors = {
        f"{name.removesuffix(ending)}.{own}": module.get_parameter(own).data
        for name, module in base.named_modules()
        if isinstance(module, AdapterTensors) and name.endswith(ending)
        for own in module.declared
    }
    check_finite(tensors, where, ExportError)
    recorded = base_name or config.base_model_name_or_path
    names = tuple(name for name, _ in base_modules(base))
    return OpenAdapter(config, tuple(open_sites(base, adapter_name)), base, recorded, names)


def open_sites(base: nn.Module, adapter_name: str) -> list[OpenSite]:
    """The sites of an adapter in a base model."""
    names = {id(unwrapped(module)): name for name, module in base_modules(base)}
    sites = []
    for layer in base.modules():
        if not isinstance(layer, MoeLoraLayer) or not layer.has_adapter(adapter_name):
            continue
        sizes = layer.linear_sizes()
        roles: dict[str, nn.Module] = {"": layer.get_base_layer()}
        if isinstance(layer, MixtureFeedForward):
            roles = {role: layer.linear(role) for role in layer.form.linears}
        factors = {role: layer.lora_factors(role, adapter_name) for role in roles}
        found = {role: _detached(each) for role, each in factors.items() if each is not None}
        lora_at = getattr(layer.configs[adapter_name].experts, "lora_at", None)
        own = found if lora_at is None else roles
        site = OpenSite(
            name=layer.name,
            linears={role: names[id(unwrapped(roles[role]))] for role in own},
            factors=found,
            router=layer.routers.get(adapter_name),
            features=sizes["" if "" in sizes else "up"][0],
            is_block=isinstance(layer, MixtureFeedForward),
            lora_at=None if lora_at is None else partial(lora_at, layer.parts[adapter_name]),
        )
        sites.append(site)
    return sites


def _detached(factors: Factors) -> Factors:
    return replace(factors, a_ERD=factors.a_ERD.detach().cpu(), b_EOR=factors.b_EOR.detach().cpu())


def one_line(error: BaseException) -> str:
    """The message of another library as a sentence within ours."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
