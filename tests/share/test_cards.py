"""What cards say, and what they do not: paths of this machine, and words of others that would be read as markup."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import moelora
from moelora import push_to_hub
from moelora.compose import drop_experts, from_loras
from moelora.runs.wording import code, text
from moelora.share.wording import origin_link
from moelora_cli import main
from tests.hub_server import HubServer
from tests.share.folders import BASE, base, base_on_hub, composed, distilled, lora, loras, mixlora, native, rows

REPO = "tester/adapter"


def card_of(hub: HubServer, folder: Any, **words: Any) -> ModelCard:
    """The card of a pushed folder or model, in a new repository."""
    hub.repos.pop(REPO, None)
    push_to_hub(folder, REPO, **words)
    return ModelCard(hub.files(REPO)["README.md"].decode())


def licensed(license: str, more: str = "") -> str:
    """A card that states a license."""
    return f"---\n{yaml.safe_dump({'license': license})}{more}---\n# A LoRA\n"


@pytest.fixture(autouse=True)
def _base(hub: HubServer, tmp_path: Path) -> None:
    base_on_hub(tmp_path / "base")


def test_what_a_composition_was_made_of(hub: HubServer, tmp_path: Path) -> None:
    """LoRAs of the Hub and of folders, their licenses, what was subtracted, and the router."""
    push_to_hub(lora(tmp_path / "pushed", 0, r=3), "tester/sums", license="apache-2.0")
    chat = lora(tmp_path / "chat", 1, licensed("other", "license_name: chat-license\n"), r=3)
    silent = lora(tmp_path / "silent one", 2, r=3)
    general = lora(tmp_path / "general", 3, r=3)
    named: dict[str, str | Path] = {"sums": "tester/sums", "chat": chat, "silent one": silent}
    model = from_loras(base(), named, {"kind": "arrow", "top_k": 2, "general": [str(general)]})
    model.save_pretrained(str(tmp_path / "mix"), save_embedding_layers=False)
    card = card_of(hub, tmp_path / "mix")
    for line in (
        "| expert | rank | made from | license |",
        "| `sums` | 3 | [tester/sums](https://huggingface.co/tester/sums) less the mean of `general` | `apache-2.0` |",
        "| `chat` | 3 | `chat` less the mean of `general` | `chat-license` |",
        "| `silent one` | 3 | `silent one` less the mean of `general` | not stated |",
        "- router: `arrow` with `temperature=1.0`, `top_k=2`",
        "- all experts are frozen: training leaves them as they are",
    ):
        assert line in card.text.splitlines(), line
    assert "license" not in card.data.to_dict()
    assert f"for [{BASE}](https://huggingface.co/{BASE})" in card.text
    assert card_of(hub, model).text == card.text


def test_how_the_router_was_found(hub: HubServer, tmp_path: Path) -> None:
    model = composed(tmp_path, {"kind": "centroids", "least": -1.0}, examples=rows(), trainable=True)
    (router,) = {name: value for name, value in model.named_parameters() if ".threshold" in name}.values()
    card = card_of(hub, tmp_path / "composition")
    assert "| expert | rank | made from | license | rows of the router | threshold |" in card.text
    for name, threshold in zip(("maths", "code words", "prose"), router.flatten().tolist(), strict=True):
        (line,) = [line for line in card.text.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.endswith(f"| 2 | {threshold:.4f} |")
    for line in (
        "- router: `centroids` with `embedding=hidden`, `least=-1.0`, `slack=2.0`, `unknown=True`",
        "- the router was made from 6 rows",
        "- no expert is frozen: training leaves none as it is",
    ):
        assert line in card.text.splitlines(), line


def test_a_router_that_is_random_until_it_is_trained(hub: HubServer, tmp_path: Path) -> None:
    composed(tmp_path, "topk")
    line = "- the router starts at random, and no record says that it was trained (`moelora train` does)"
    assert line in card_of(hub, tmp_path / "composition").text.splitlines()
    (tmp_path / "composition" / "training.json").write_text(json.dumps({"steps": 3, "seconds": 1.0, "log": []}))
    assert line not in card_of(hub, tmp_path / "composition").text.splitlines()


def test_what_the_command_knows_of_the_rows(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [f"{name}={lora(tmp_path / 'loras' / name, seed)}" for seed, name in enumerate(("sums", "words"))]
    lines = [{"prompt": f"{n} {name}", "completion": "x", "task": name} for name in ("sums", "words") for n in range(3)]
    Path("secret").mkdir()
    Path("secret/rows of mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--router", "centroids", "--data", str(tmp_path / "secret/rows of mine.jsonl"), "-o", "mix"]
    assert main(["compose", *given, *words, "--any-base-name"]) == 0
    card = card_of(hub, tmp_path / "mix")
    assert "- the router was made from 6 rows of `rows of mine.jsonl`" in card.text.splitlines()
    assert "datasets" not in card.data.to_dict()
    config = tmp_path / "mix/adapter_config.json"
    stored = json.loads(config.read_text())
    stored["experts"]["recipe"]["data"] = ["tester/rows"]  # as `dataset: {hub: tester/rows}` writes it
    config.write_text(json.dumps(stored))
    card = card_of(hub, tmp_path / "mix")
    assert card.data.to_dict()["datasets"] == ["tester/rows"]
    assert "6 rows of [tester/rows](https://huggingface.co/datasets/tester/rows)" in card.text


def test_what_it_can_be_exported_to(hub: HubServer, tmp_path: Path) -> None:
    composed(tmp_path, {"kind": "centroids", "unknown": False}, examples=rows())
    text_of = card_of(hub, tmp_path / "composition").text
    assert "| `--to lora` | yes | a LoRA for each expert and a router of requests, with the same outputs |" in text_of
    assert "| `--to native-moe` | no | the adapter's placement is 'linear', which a native MoE cannot" in text_of
    assert "| `--to mixlora` | no | MixLoRA's folders cannot hold placement 'linear'" in text_of
    composed(tmp_path / "other", "arrow")
    assert (
        "| `--to lora` | no | the mixture is routed token by token" in card_of(hub, tmp_path / "other/composition").text
    )


def test_exports_say_what_they_came_from(hub: HubServer, tmp_path: Path) -> None:
    card = card_of(hub, loras(tmp_path / "a")[0], license="mit")
    assert card.data.to_dict()["license"] == "mit"
    assert "| `code words` | 3 | `code words` | not stated | 2 |" in card.text
    assert "| `code-words` | 3 | 3 | `q_proj, up_proj` |" in card.text
    assert "the nearest of the experts' centroids" in card.text
    card = card_of(hub, distilled(tmp_path / "b")[0])
    assert "The usage-weighted sums of the experts, cut to rank 2. The rank keeps" in card.text
    assert "| scores | `linear(" in card.text
    card = card_of(hub, mixlora(tmp_path / "c")[0])
    assert "| num_experts | `4` |" in card.text
    card = card_of(hub, native(tmp_path / "d")[0], license="apache-2.0")
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert "MixtralForCausalLM" in card.text
    assert "from_pretrained('tester/adapter')" in card.text


@pytest.mark.parametrize("kind", [loras, distilled, mixlora, native])
def test_no_path_goes_up(hub: HubServer, tmp_path: Path, kind: Any) -> None:
    """Of a base model in a folder of this machine only its absence is told, in every file."""
    home = tmp_path / "my-home"
    folder, _ = kind(home)
    for file in folder.rglob("*.json"):  # as if the base had been a folder
        words = json.loads(file.read_text())
        for key in ("base_model_name_or_path", "base_model"):
            if key in words:
                words[key] = str(home / "base") if file.name != "moelora_export.json" else None
        file.write_text(json.dumps(words))
    if kind is native:
        push_to_hub(folder, REPO)
    else:
        with pytest.warns(UserWarning, match="not on the Hub"):
            push_to_hub(folder, REPO)
    files = hub.files(REPO)
    assert not [name for name, data in files.items() if b"my-home" in data]
    assert "base_model" not in ModelCard(files["README.md"].decode()).data.to_dict()


def test_paths_of_an_older_composition_are_cut(hub: HubServer, tmp_path: Path) -> None:
    composed(tmp_path, "uniform")
    file = tmp_path / "composition/adapter_config.json"
    words = json.loads(file.read_text())
    words["experts"]["sources"] = [
        {"source": "/my-home/loras/maths", "minus": ["/my-home/general", "tester/shared"]},
        {"source": "C:\\Users\\my-home\\code"},
        {"merged": [{"source": "/my-home/a"}, {"source": "/my-home/b/", "license": "mit"}]},
    ]
    file.write_text(json.dumps(words))
    card = card_of(hub, tmp_path / "composition")
    assert not [name for name, data in hub.files(REPO).items() if b"my-home" in data]
    assert "| `maths` less the mean of `general`, [tester/shared](https://huggingface.co/tester/shared) |" in card.text
    assert "| `code` |" in card.text
    assert "| merged from `a`, `b` | not stated, `mit` |" in card.text


EVIL = (
    "<script>alert(1)</script>",
    "[click](http://evil.example) ![x](http://evil.example/x.png)",
    "a | b\n\n# Heading\n---\nlicense: mit",
    "``` ` `` <b>",
)


def test_words_of_others_are_no_markup(hub: HubServer, tmp_path: Path) -> None:
    """Names, and licenses that the LoRAs' own cards state."""
    named = {f"n{seed}": lora(tmp_path / f"lora {seed}", seed, licensed(evil)) for seed, evil in enumerate(EVIL)}
    model = from_loras(base(), named, "uniform")
    # a composition refuses such names; an adapter_config.json that somebody wrote may have them
    config = model.peft_config["default"]
    config.experts = dataclasses.replace(config.experts, names=list(EVIL))
    card = card_of(hub, model, license="mit\nbase_model: evil/base")
    words = card.data.to_dict()
    assert set(words) == {"base_model", "library_name", "license", "pipeline_tag", "tags"}
    assert (words["base_model"], words["license"]) == (BASE, "mit\nbase_model: evil/base")
    lines = card.text.splitlines()
    headings = [line for line in lines if line.startswith("#") and "makes PEFT" not in line]
    assert headings == [
        "# adapter",
        *("## How to load it", "## Made of", "## The adapter", "## What it can be exported to", "## Versions"),
    ]
    start = lines.index("## Made of") + 4
    for line, evil, seed in zip(lines[start : start + len(EVIL)], EVIL, range(len(EVIL)), strict=True):
        shown = code(evil).replace("|", "\\|")
        assert line == f"| {shown} | {2 + seed % 2} | `lora {seed}` | {shown} |"


def test_code_spans_hold_anything() -> None:
    assert code("a b") == "`a b`"
    assert code("a\nb\u2028c\x1b") == "`a b c`"
    assert code("``a`") == "``` ``a` ```"
    assert text("<a> [b](c) *d* `e` \\") == "&lt;a&gt; \\[b\\](c) \\*d\\* \\`e\\` \\\\"
    assert origin_link("me/a.b") == "[me/a.b](https://huggingface.co/me/a.b)"
    assert origin_link("me/a](x)") == "`me/a](x)`"


def test_the_call_that_the_card_of_a_task_router_gives_works(hub: HubServer, tmp_path: Path) -> None:
    model = from_loras(base(), {"a": lora(tmp_path / "a", 0), "b": lora(tmp_path / "b", 1)}, "task")
    words = card_of(hub, model).text
    (call,) = re.findall(r"`(with moelora\.batch_facts\(task_ids=\[0\]\): model\(\*\*inputs\))`", words)
    assert "-1 for the base model" in words
    names = {"moelora": moelora, "model": model, "inputs": {"input_ids": torch.tensor([[5, 6, 7]])}}
    exec(call.replace(": model", ":\n    found = model"), names)
    assert names["found"].logits.isfinite().all()
    (call,) = re.findall(r"`(model\.generate\(\*\*inputs, task_ids=\[0\]\))`", words)
    exec(f"more = {call}", names)


def test_after_an_edit_the_card_says_what_it_knows(hub: HubServer, tmp_path: Path) -> None:
    composed(tmp_path, "centroids", examples=rows())
    drop_experts(tmp_path / "composition", tmp_path / "two", ["prose"])
    assert "6 rows, also those of `prose`, which are not in it any more" in card_of(hub, tmp_path / "two").text
