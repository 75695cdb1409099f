"""Whether an exported model computes what its adapter computes, and how often half precision changes the routing.

Shape suffixes: B sequences, S tokens of a sequence, T tokens, D model features, E experts, K chosen experts, V words.
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.errors import ExportError
from moelora.export.native_moe.adapter import SavedAdapter
from moelora.routing.run import record_routing

TEXT = (
    "A mixture of experts sends each token to a few of many small networks. The router that decides is one matrix, "
    "so two tokens with nearly equal scores may change places when numbers are rounded. On Monday the baker sold 37 "
    "loaves and 12 rolls; how many pieces is that? He counts them twice and writes 49 into his book. def add(a, b): "
    "return a + b. Die Katze sitzt auf dem Dach und sieht den Vögeln zu. La réponse est dans le texte."
)
"""What models are compared on: prose, numbers, code, three languages."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens.

    Attributes:
        logit_difference: The largest difference of two logits.
        largest_logit: The largest logit, in size.
        same_greedy: Whether both continue with the same tokens when each takes the likeliest.
        tokens: Number of tokens compared.
    """

    logit_difference: float
    largest_logit: float
    same_greedy: bool
    tokens: int


@dataclass(frozen=True)
class RoutingFlips:
    """For which share of tokens and layers bfloat16 chooses another set of experts.

    Attributes:
        router: The native router against one in float32 **on the same inputs**: what its own rounding changes.
        native: The native model in bfloat16 against the adapter in float32: its inputs are rounded too.
        adapter: The adapter on its base in bfloat16, whose routers compute in float32, against the same.
    """

    router: float
    native: float
    adapter: float


@dataclass(frozen=True)
class _Observed:
    logits_BSV: Tensor
    greedy_BS: Tensor


def compare(adapted: nn.Module, native: nn.Module, input_ids_BS: Tensor, new_tokens: int = 16) -> Comparison:
    """Compare a model with its adapter and the exported model, both in memory.

    Args:
        adapted: The base with the adapter.
        native: The exported model.
        input_ids_BS: Tokens, without padding.
        new_tokens: How many tokens to generate.
    """
    return _compared(_observe(adapted, input_ids_BS, new_tokens), _observe(native, input_ids_BS, new_tokens))


def check_export(
    exported: str | Path, adapter: str | Path, base: str | Path, new_tokens: int = 16
) -> tuple[Comparison, RoutingFlips]:
    """Run an exported model beside its adapter, in float32 and in bfloat16, one model in memory at a time.

    Args:
        exported: Folder of the exported model.
        adapter: Folder or Hub name of the adapter.
        base: Folder or Hub name of its base.
        new_tokens: How many tokens to generate.

    Returns:
        The comparison in float32, and what bfloat16 changes of the routing.
    """
    input_ids_BS = _tokens(exported)
    model = _load_adapted(adapter, base, torch.float32)
    ours, chosen = _observe(model, input_ids_BS, new_tokens), chosen_by_adapter(model, input_ids_BS)
    del model
    gc.collect()
    native = _load(exported, torch.float32, is_native=True)
    comparison = _compared(ours, _observe(native, input_ids_BS, new_tokens))
    seen = chosen_by_native(native.to(torch.bfloat16), input_ids_BS)
    del native
    gc.collect()
    in_half = chosen_by_adapter(_load_adapted(adapter, base, torch.bfloat16), input_ids_BS)
    saved = SavedAdapter(adapter)
    exact = {}
    for layer, (x_TD, ids_TK) in seen.items():
        if layer in chosen:
            weight_ED = saved.tensor(f"model.layers.{layer}.mlp", "router.weight")
            exact[layer] = F.linear(x_TD.float(), weight_ED.float()).topk(ids_TK.shape[-1]).indices
    ids = {layer: ids_TK for layer, (_, ids_TK) in seen.items()}
    flips = RoutingFlips(
        share_that_differs(ids, exact), share_that_differs(ids, chosen), share_that_differs(in_half, chosen)
    )
    return comparison, flips


def chosen_by_adapter(model: nn.Module, input_ids_BS: Tensor) -> dict[int, Tensor]:
    """The experts that the routers of an adapter choose, ids_TK by layer."""
    with torch.no_grad(), record_routing(model) as listener:
        model(input_ids=input_ids_BS)
    found = {}
    for record in listener.records:
        ids_TK = record.routing.ids_TK
        assert ids_TK is not None
        found[_layer_of(record.layer)] = ids_TK
    return found


def chosen_by_native(model: nn.Module, input_ids_BS: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """The inputs x_TD of a native model's routers and the experts ids_TK that they choose, by layer.

    Raises:
        ExportError: If the model has no routers of the form that transformers' MoE models have.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):

            def note(module: nn.Module, args: Any, output: Any, layer: int = _layer_of(name)) -> None:
                seen[layer] = args[0].flatten(0, -2), output[2]

            hooks.append(module.register_forward_hook(note))
    if not hooks:
        raise ExportError(f"a {type(model).__name__} has no routers; allowed: a native MoE of transformers.")
    with torch.no_grad():
        model(input_ids=input_ids_BS)
    for hook in hooks:
        hook.remove()
    return seen


def share_that_differs(first: dict[int, Tensor], second: dict[int, Tensor]) -> float:
    """For which share of tokens and layers two choices ids_TK are different sets, over the layers that both have."""
    differ = [
        (first[layer].sort(-1).values != second[layer].sort(-1).values).any(-1)
        for layer in first.keys() & second.keys()
    ]
    return float(torch.cat(differ).float().mean())


def _layer_of(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", f".{name}.")
    assert found is not None, name
    return int(found[1])


@torch.no_grad()
def _observe(model: Any, input_ids_BS: Tensor, new_tokens: int) -> _Observed:
    logits_BSV = model(input_ids=input_ids_BS).logits.float()
    greedy_BS = model.generate(
        input_ids=input_ids_BS,
        attention_mask=torch.ones_like(input_ids_BS),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return _Observed(logits_BSV, greedy_BS)


def _compared(first: _Observed, second: _Observed) -> Comparison:
    return Comparison(
        float((first.logits_BSV - second.logits_BSV).abs().max()),
        float(first.logits_BSV.abs().max()),
        torch.equal(first.greedy_BS, second.greedy_BS),
        first.logits_BSV.shape[0] * first.logits_BSV.shape[1],
    )


def _load(folder: str | Path, dtype: torch.dtype, *, is_native: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    # the fast experts of transformers ask for sizes that are multiples of 8 in half precision
    words = {"experts_implementation": "eager"} if is_native else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **words).eval()


def _load_adapted(adapter: str | Path, base: str | Path, dtype: torch.dtype) -> Any:
    from moelora.runs.models import load_adapter

    model = load_adapter(_load(base, dtype), str(adapter)).eval()
    # an adapter that is stored in half precision would compute in it on a base in float32 too
    return model.float() if dtype == torch.float32 else model


def _tokens(exported: str | Path) -> Tensor:
    """`TEXT` in the model's tokens; without a tokenizer as many random ones."""
    from transformers import AutoConfig, AutoTokenizer

    if (Path(exported) / "tokenizer_config.json").is_file():
        ids: Tensor = AutoTokenizer.from_pretrained(exported)(TEXT, return_tensors="pt")["input_ids"]
        return ids
    vocab = AutoConfig.from_pretrained(exported).vocab_size
    return torch.randint(vocab, (1, 128), generator=torch.Generator().manual_seed(0))
