"""What the speed benchmark compares: base models, adapters of this library and of others on them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# First: it drops what bitsandbytes prints when PEFT imports it.
from moelora import MoeLoraConfig

# isort: split
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from eval.speed.measure import batch
from moelora.runs.models import DEMO_MODEL, resolve_model

SMOLLM2, SLICE = "SmolLM2-135M", "Llama slice"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LORA, LORA64, MIXLORA, PYPI = f"PEFT LoRA r={RANK}", "PEFT LoRA r=64", "MixLoRA", "PyPI mixlora 0.2.3"
COMPILED, MANY, BESIDE = f"{MIXLORA}, compiled", f"{MIXLORA}, 64 experts", f"{MIXLORA}, beside these"
DROPPED = f"{MIXLORA}, lora_dropout 0.05"
SIRA, MOLORA, SMORA = "SiRA 16 x r=4", "MoLoRA 16 x r=4", "SMoRA 64 x r=1"
SHARED = ", shared routers"
NEW_PROCESS = ("a new process", "")
IMPORT_PEFT, IMPORT_MOELORA = "import peft", "import moelora"
FIRST, NEXT = "first step", "steps after it"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(model: str, dtype: torch.dtype, **config: Any) -> Any:
    """A frozen base: the real SmolLM2-135M-Instruct, or random layers of a 1-billion-parameter Llama's size.

    Args:
        model: `SMOLLM2` or `SLICE`.
        dtype: Data type of its weights.
        config: Changes to the slice's configuration.
    """
    if model == SMOLLM2:
        base = AutoModelForCausalLM.from_pretrained(resolve_model(DEMO_MODEL), dtype=dtype)
    else:
        words = {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        }
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**words | config)).to(dtype)
    return base.requires_grad_(False)


def in_nf4(base: Any) -> Any:
    """A base with its linears but the head in 4 bits, as QLoRA has it, on the same device; needs bitsandbytes."""
    words = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**words, bnb_4bit_compute_dtype=base.dtype)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=base.dtype, device_map={"": base.device}
        )
    return found.requires_grad_(False)


def shared_copy(base: Any) -> Any:
    """The same modules anew, on the same frozen weights."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def shake(model: Any) -> Any:
    """Give every zero-initialised factor values, so that parity means something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "_B." in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def frozen(base: Any) -> Any:
    """The base alone; its step is a backward pass down to the embeddings' output."""
    model = shared_copy(base)
    model.enable_input_require_grads()
    return model


def lora(base: Any, r: int = RANK, compiled: bool = False) -> Any:
    """PEFT's LoRA on every linear but the head; `compiled` compiles its feed-forward blocks."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = shake(get_peft_model(shared_copy(base), config, autocast_adapter_dtype=False))
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.mlp.compile()
    return model


def moelora(base: Any, preset: str, compiled: bool = False, **words: Any) -> Any:
    """A preset of this library."""
    if preset == "mixlora":
        words = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0} | words
    words = {"compute": "compiled" if compiled else "fast"} | words
    torch.manual_seed(0)
    config = MoeLoraConfig.from_preset(preset, task_type="CAUSAL_LM", **words)
    return shake(get_peft_model(shared_copy(base), config, autocast_adapter_dtype=False))


def equal_rank(base: Any) -> int:
    """The rank at which LoRA has the trainable parameters of the default MixLoRA."""
    ours, one = (model.get_nb_trainable_parameters()[0] for model in (moelora(base, "mixlora"), lora(base, 1)))
    return round(ours / one)


def pypi_mixlora(base: Any) -> Any:
    """The authors' package, PyPI `mixlora` 0.2.3, with the weights of our MixLoRA, made trainable."""
    import mixlora

    dtype = next(base.parameters()).dtype
    ours = moelora(base, "mixlora")
    config = mixlora.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "base",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": 0.05,  # it takes no 0; it is set below
            "use_rslora": False,
            "target_modules": TARGETS,
            "num_experts": 8,
            "top_k": 2,
            "act_fn": "silu",
        }
    )
    config.adapter_name_, config.dtype_ = "default", dtype
    theirs = shared_copy(base)
    mixlora.inject_adapter_in_model(theirs, config.check(), _their_weights(ours))
    for layer in theirs.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        moe.gate_ = torch.nn.Parameter(moe.gate_)
        # their experts are in plain dicts, which parameters(), train() and eval() do not reach
        layer.mlp.speed_experts = torch.nn.ModuleList(moe.experts_.values())
        layer.mlp.speed_gate = moe.gate_
    for module in theirs.modules():
        if type(module).__name__ == "LoraLinear":
            module.dropout_ = torch.nn.Identity()
            for factor in (module.lora_A, module.lora_B):
                factor.requires_grad_(True)
    return theirs


def _their_weights(ours: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for key, value in get_peft_model_state_dict(ours).items():
        path, _, kind = key.removeprefix("base_model.model.").rpartition(".moelora_")
        container, _, role = kind.partition(".")
        path = path.replace("model.layers.", "mixlora.layers.")
        if container == "router":
            weights[f"{path}.moe_gate.weight"] = value
        elif role == "weight":
            weights[f"{path}.lora_{container}.weight"] = value[0]
        else:
            for expert, matrix in enumerate(value):
                weights[f"{path}.{role}_proj.experts.{expert}.lora_{container}.weight"] = matrix
    return {key: value.detach().clone() for key, value in weights.items()}


def xlora(base: Any) -> Any:
    """PEFT's X-LoRA over eight trainable LoRA adapters: a mixture of whole adapters, decided by a pass of its own."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for index in range(8):
            lora(base).save_pretrained(str(Path(folder) / str(index)))
            adapters[str(index)] = str(Path(folder) / str(index))
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            xlora_depth=1,
            adapters=adapters,
            use_trainable_adapters=True,
        )
        copy_of_base = shared_copy(base)
        copy_of_base.config.use_cache = False
        model = get_peft_model(copy_of_base, config, autocast_adapter_dtype=False)
    weight = next(base.parameters())
    return model.to(device=weight.device, dtype=weight.dtype)


Builder = Callable[[Any], Any]


def main_methods(rank: int) -> dict[str, Builder]:
    """Methods by the name they have in the report; the first LoRA is what everything is compared with."""
    return {
        "frozen base": frozen,
        LORA: lora,
        f"PEFT LoRA r={rank} (equal parameters)": lambda base: lora(base, rank),
        f"{LORA}, compiled": lambda base: lora(base, compiled=True),
        MIXLORA: lambda base: moelora(base, "mixlora"),
        COMPILED: lambda base: moelora(base, "mixlora", compiled=True),
        DROPPED: lambda base: moelora(base, "mixlora", lora_dropout=0.05),
    }


_MIXTURES: dict[str, dict[str, Any]] = {
    SIRA: {"preset": "sira"},
    MOLORA: {"preset": "molora", "num_experts": 16},
    SMORA: {"preset": "smora"},
}
LINEAR_METHODS: dict[str, Builder] = {
    LORA64: lambda base: lora(base, 64),
    **{name: partial(moelora, **words) for name, words in _MIXTURES.items()},
}
SHARING_METHODS: dict[str, Builder] = {
    name + SHARED: partial(moelora, routers="per_input", **words) for name, words in _MIXTURES.items()
}
"""The same mixtures with one router for linears of one input."""
OTHERS: dict[str, Builder] = {
    BESIDE: lambda base: moelora(base, "mixlora"),
    PYPI: pypi_mixlora,
    "PEFT X-LoRA 8 x r=16": xlora,
}
"""Peers that are several times slower: timed apart, with MixLoRA once more, so as not to disturb the others."""


def parity_error(base: Any) -> float:
    """Relative distance of our MixLoRA's logits from those of the authors' package on the same weights."""
    ids = batch(64, 32, base.device)["input_ids"]
    with torch.no_grad():
        ours = moelora(base, "mixlora").eval()(input_ids=ids).logits.double()
        theirs = pypi_mixlora(base).eval()(input_ids=ids).logits.double()
        alone = base(input_ids=ids).logits.double()
    return float((ours - theirs).norm() / (theirs - alone).norm())


def gradient_error(base: Any) -> float:
    """Relative distance of our MixLoRA's gradients from those of its plain reference, all taken together."""
    inputs, gradients = batch(32, 16, base.device), []
    for compute in ("fast", "reference"):
        model = moelora(base, "mixlora", compute=compute).train()
        model(**inputs).loss.backward()
        parts = [parameter.grad.double().flatten() for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.cat(parts))
    fast, plain = gradients
    return float((fast - plain).norm() / plain.norm())
