"""The model card of a native MoE: what it was made of, how to load it, what to look out for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from moelora.config import MoeLoraConfig
from moelora.runs.tables import markdown
from moelora.version import __version__

TRAPS = {
    "Qwen3MoeForCausalLM": "llama.cpp's `qwen3moe` always renormalises the weights of the chosen experts: an export "
    "with `norm_topk_prob` false is silently wrong there.",
    "GraniteMoeForCausalLM": "llama.cpp's converter ignores `head_dim`: heads of another size than hidden_size / "
    "num_attention_heads do not load there.",
    "Qwen2MoeForCausalLM": "llama.cpp's `qwen2moe` never renormalises the weights of the chosen experts, whatever "
    "`norm_topk_prob` says: the outputs are silently wrong there.",
    "MixtralForCausalLM": "SGLang's Mixtral ignores scaling of the rotary encoding, `head_dim` and a tied head. The "
    "head is written whatever the tie says; check the other two.",
}
"""What engines get wrong, by architecture."""

ROUTER = (
    "Native routers compute in the model's data type, where an adapter's router computes in float32: in half precision "
    "some tokens are sent to other experts than the adapter would send them to."
)


def render_card(moe: Any, config: MoeLoraConfig, base: object) -> str:
    """Write the card, front matter included.

    Args:
        moe: The model, a `NativeMoe`.
        config: The adapter's configuration.
        base: Where the base came from; it is named if it is a name on the Hub.
    """
    named = base if isinstance(base, str) and base.count("/") == 1 and not Path(base).exists() else None
    data = ModelCardData(
        base_model=named,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moelora", "mixture-of-experts", *([config.preset] if config.preset else [])],
    )
    of = f"[{named}](https://huggingface.co/{named})" if named else "a dense base model"
    what = f"a `{config.preset}` adapter" if config.preset else "an adapter"
    rows = [
        ("architecture", f"`{moe.architecture}`"),
        ("experts", f"{moe.num_experts} per block, {moe.top_k} per token"),
        ("parameters", f"{moe.parameters:,} (the base has {moe.base_parameters:,})"),
        ("data type", f"{moe.dtype}, {moe.num_bytes / 1e9:.2f} GB"),
    ]
    watch = [ROUTER, *([TRAPS[moe.architecture]] if moe.architecture in TRAPS else []), *moe.notes]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {moe.folder.name}",
        f"This is {what} on {of} as one native mixture-of-experts model, written by moelora {__version__}. Each expert "
        "is the base's feed-forward block with one LoRA expert merged into it; plain LoRAs are merged; the router's "
        "weights are the adapter's. Up to rounding it computes what the adapter computes on its base.",
        markdown(("", ""), rows, numbers=False),
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")  # neither moelora nor PEFT is needed\n```',
        "## What to look out for\n\n" + "\n".join(f"- {note}" for note in watch),
    ]
    return "\n\n".join(sections) + "\n"
