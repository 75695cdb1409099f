"""The model card of a native MoE: what it was made of, how to load it, what to look out for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from moelora.runs.tables import markdown
from moelora.runs.wording import code

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


def render_card(
    record: Mapping[str, Any],
    *,
    title: str,
    load_from: str,
    base_model: str | None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    more: Sequence[str] = (),
) -> str:
    """Write the card, front matter included.

    Args:
        record: What the export noted of itself.
        title: The heading.
        load_from: What `from_pretrained` takes.
        base_model: The dense base's name on the Hub, if it has one.
        license: License of the model, if it is stated.
        datasets: Names on the Hub of the adapter's training data, if they are known.
        more: Sections to add.
    """
    preset, architecture = record["adapter"]["preset"], record["architecture"]
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        license=license,
        datasets=list(datasets) if datasets else None,
        pipeline_tag="text-generation",
        tags=["moelora", "mixture-of-experts", *([preset] if preset else [])],
    )
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a dense base model"
    what = f"a {code(preset)} adapter" if preset else "an adapter"
    rows = [
        ("architecture", f"`{architecture}`"),
        ("experts", f"{record['num_experts']} per block, {record['top_k']} per token"),
        ("parameters", f"{record['parameters']:,} (the base has {record['base_parameters']:,})"),
        ("data type", f"{record['dtype']}, {record['num_bytes'] / 1e9:.2f} GB"),
    ]
    watch = [ROUTER, *([TRAPS[architecture]] if architecture in TRAPS else []), *record["notes"]]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"This is {what} on {of} as one native mixture-of-experts model, written by {record['written_by']}. Each "
        "expert is the base's feed-forward block with one LoRA expert merged into it; plain LoRAs are merged; the "
        "router's weights are the adapter's. Up to rounding it computes what the adapter computes on its base.",
        markdown(("", ""), rows, numbers=False),
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({load_from!r})  # neither moelora nor PEFT is needed\n```",
        "## What to look out for\n\n" + "\n".join(f"- {note}" for note in watch),
        *more,
    ]
    return "\n\n".join(sections) + "\n"
