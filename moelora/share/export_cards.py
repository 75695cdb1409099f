"""What cards say of adapters in other forms: PEFT LoRAs with and without a router, folders of MixLoRA's authors."""

from __future__ import annotations

from moelora.runs.tables import markdown
from moelora.runs.wording import code
from moelora.share.composition import made_of
from moelora.share.contents import Contents
from moelora.share.wording import load_base, origin_link

_CHOSEN_BY = {
    "task": "the number of its task",
    "centroid": "the nearest of the experts' centroids to the mean embedding of the prompt",
}


def library_and_tags(contents: Contents) -> tuple[str, list[str]]:
    """The library that loads it, and the tags of the Hub."""
    ours = ["moelora"] if contents.record else []
    if contents.kind == "mixlora":
        return "moelora", ["moelora", "lora", "mixture-of-lora-experts", "mixlora"]
    return "peft", [*ours, "lora", *(["multi-lora"] if contents.kind == "loras" else [])]


def sections(contents: Contents, repo_id: str, base_model: str | None, auto_class: str) -> list[str]:
    """The card below its title.

    Args:
        contents: What is uploaded.
        repo_id: The repository it goes to.
        base_model: The base model's name on the Hub, if it has one.
        auto_class: The class of transformers that loads the base.
    """
    write = {"lora": _lora, "loras": _loras, "mixlora": _mixlora}[contents.kind]
    on = f" for {origin_link(base_model)}" if base_model else ""
    adapter = contents.record.get("adapter")
    origin = _origin(contents) + made_of(adapter, frozen=False) if adapter else []
    return [*write(contents, repo_id, base_model, auto_class, on), *origin]


def _lora(contents: Contents, repo_id: str, base_model: str | None, auto_class: str, on: str) -> list[str]:
    record = contents.record
    kind = "a plain PEFT LoRA"
    if record.get("exact") is True:
        kind = "a mixture of LoRAs with fixed weights as one plain PEFT LoRA, which gives the same outputs"
    elif record.get("exact") is False:
        kind = "one plain PEFT LoRA that stands for a mixture of LoRAs, and approximates it"
    found = [f"This is {kind}{on}. PEFT loads it without moelora.", _load_lora(repo_id, base_model, auto_class)]
    found.append(_table_of_loras(contents))
    if "kept" in record:
        found.append(_distilled(contents))
    return found


def _load_lora(repo_id: str, base_model: str | None, auto_class: str) -> str:
    return (
        "## How to load it\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n{load_base(auto_class, base_model)}"
        f"model = PeftModel.from_pretrained(base, {repo_id!r})\n```"
    )


def _distilled(contents: Contents) -> str:
    record = contents.record
    steps = f", then trained for {record['steps']} steps towards it" if record.get("steps") else ""
    first = (
        f"The usage-weighted sums of the experts, cut to rank {record['rank']}{steps}. The rank keeps "
        f"{record['kept']:.2%} of their squared norm."
    )
    if not record.get("scores"):
        return f"## What is lost\n\n{first} What it loses against the mixture was not measured."
    rows = [(code(name), f"{each['loss']:.4f}", f"{each['kl']:.4f}") for name, each in record["scores"].items()]
    table = markdown(("model", "loss", "KL to the mixture"), rows)
    return f"## What is lost\n\n{first} On {record['tokens']:,} held-out tokens:\n\n{table}"


def _loras(contents: Contents, repo_id: str, base_model: str | None, auto_class: str, on: str) -> list[str]:
    kind = contents.words["kind"]
    if kind == "centroid":
        pick = (
            "tokenizer = AutoTokenizer.from_pretrained(folder if Path(folder, 'tokenizer_config.json').is_file() "
            f"else {repr(base_model) if base_model else 'BASE_MODEL'})\n"
            'prompt = tokenizer("What is 12 + 30?", return_tensors="pt").input_ids\n'
            "name = pick(base.base_model, prompt)\n"
        )
    else:
        pick = "name = pick(0)  # the number of the request's task\n"
    more = (", AutoTokenizer", "from pathlib import Path\n") if kind == "centroid" else ("", "")
    loading = (
        f"## How to load it\n\n```python\nimport runpy\n{more[1]}\n"
        "from huggingface_hub import snapshot_download\nfrom peft import PeftModel\n"
        f"from transformers import {auto_class}{more[0]}\n\n"
        f"folder = snapshot_download({repo_id!r})\n"
        f'pick = runpy.run_path(f"{{folder}}/route.py")["pick"]\n'
        f"{load_base(auto_class, base_model)}{pick}"
        'model = PeftModel.from_pretrained(base, f"{folder}/{name}") if name else base\n```\n\n'
        "`name` is None where no expert is to be used: the base model alone. A server of many LoRAs (vLLM, TGI, LoRAX) "
        "takes each folder as a LoRA of its own, and the name for each request."
    )
    count = len(contents.loras)
    return [
        f"These are {count} plain PEFT LoRA{'s' if count > 1 else ''}{on} and a router: a request goes to one LoRA, by "
        f"{_CHOSEN_BY[kind]}. They need PEFT, not moelora.",
        loading,
        _table_of_loras(contents),
        "## The router\n\n" + _router(contents),
    ]


def _router(contents: Contents) -> str:
    words = contents.words
    if words["kind"] == "task":
        rows = [(code(task), code(name) if name else "the base model alone") for task, name in words["loras"].items()]
        return markdown(("task", "LoRA"), rows, numbers=False)
    otherwise = code(words["otherwise"]) if words.get("otherwise") else "the base model alone"
    turns = " Of a conversation the last turn of the user counts." if words.get("turn_start") else ""
    return (
        f"`router.safetensors` has the centroids, of the base model's {code(words.get('embedding'))} embeddings."
        f"{turns} Where it has thresholds and the nearest centroid's is not met, the request goes to {otherwise}."
    )


def _mixlora(contents: Contents, repo_id: str, base_model: str | None, auto_class: str, on: str) -> list[str]:
    words = contents.words
    rows = [(name, code(words[name])) for name in ("r", "lora_alpha", "num_experts", "top_k") if name in words]
    targets = words["target_modules"]
    rows.append(("target_modules", code(", ".join(sorted(targets)))))
    loading = (
        "## How to load it\n\n```python\nfrom moelora.export import read_mixlora\nfrom peft import PeftModel\n"
        f"from transformers import {auto_class}\n\n"
        f"{load_base(auto_class, base_model)}"
        f"read_mixlora({repo_id!r}, 'my-adapter'{'' if base_model else ', base=BASE_MODEL'})\n"
        "model = PeftModel.from_pretrained(base, 'my-adapter')\n```\n\n"
        "or `moelora export REPO my-adapter --to moelora`. The weights are a pickle, which moelora reads with "
        "`weights_only=True`. PyPI's `mixlora` loads the folder as well."
    )
    return [
        f"This is a MixLoRA adapter{on} in the format of MixLoRA's authors (TUDB-Labs): mixtures of LoRA experts in "
        "the feed-forward blocks.",
        loading,
        "## The adapter\n\n" + markdown(("", ""), rows, numbers=False),
    ]


def _table_of_loras(contents: Contents) -> str:
    rows = []
    for name, words in contents.loras.items():
        targets = words.get("target_modules")
        listed = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
        cells = (str(words.get("r")), str(words.get("lora_alpha")), code(listed))
        rows.append((code(name), *cells) if name else cells)
    head = ("rank", "alpha", "target modules")
    several = any(contents.loras)
    title = "The LoRAs" if several else "The LoRA"
    return f"## {title}\n\n" + markdown(("folder", *head) if several else head, rows, numbers=False)


def _origin(contents: Contents) -> list[str]:
    """What it was exported from."""
    adapter = contents.record["adapter"]
    what = f"a {code(adapter['preset'])} adapter" if adapter["preset"] else "an adapter"
    rows = [(axis, code(words)) for axis, words in adapter["axes"].items()]
    return [
        f"## Exported from\n\nWritten by {code(contents.record['written_by'])} from {what}:\n\n"
        + markdown(("axis", "setting"), rows, numbers=False)
    ]
