"""Each Python block of the site runs, its YAML is valid, its commands are known, and its error messages are real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer

import moelora
from docs.site import hook
from moelora import choices, errors, preset_registry
from moelora.compose import from_loras
from moelora.export import export_loras
from moelora.runs.config import load_config
from moelora_cli import main
from tests.compose.loras import save_lora
from tests.conftest import tiny_batch, tiny_model
from tests.site.pages import PAGES, ROOT, blocks, runnable, tiny_world

RUN_HERE = ("index", "start", "training", "evaluation", "coming-from", "how-it-works")
ELSEWHERE = {
    "after-training": "tests/test_after_training_page.py",
    "compose-routers": "tests/compose/test_router_docs.py",
    "distributed": "tests/test_quantised.py",
    "edit-experts": "tests/compose/test_docs.py",
    "export-loras": "tests/export/test_docs.py",
    "export-native-moe": "tests/export/test_docs_native_moe.py",
    "methods": "tests/test_readme.py",
    "mixlora-folders": "tests/export/test_docs.py",
    "options": "tests/test_options_page.py",
    "share": "tests/share/test_docs.py",
}
"""The tests that run the blocks of the other pages."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_world(folder)
    return folder


def test_every_page_with_code_has_a_test() -> None:
    with_code = {page.stem for page in PAGES if "```python" in page.read_text()}
    assert with_code == {*RUN_HERE, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / test).read_text()


@pytest.mark.parametrize("page", RUN_HERE)
def test_python_blocks(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(moelora, "push_to_hub", None, raising=False)
    # what a page registers is gone after it
    monkeypatch.setattr(preset_registry, "_PRESETS", dict(preset_registry._PRESETS))
    monkeypatch.setattr(preset_registry, "_ABOUT", dict(preset_registry._ABOUT))
    for axis in choices.AXES:
        monkeypatch.setitem(choices._KINDS, axis, choices.kinds(axis))
    base = tiny_model("llama", vocab_size=261)
    if page == "evaluation":
        config = moelora.MoeLoraConfig.from_preset("mixlora", r=2, num_experts=3, task_type="CAUSAL_LM")
        peft.get_peft_model(base, config).save_pretrained(world / "my-adapter")
        base = tiny_model("llama", vocab_size=261)
    batch = {**tiny_batch(), "labels": tiny_batch()["input_ids"]}
    names: dict[str, Any] = {"base_model": base, "batch": batch, "base": lambda **words: tiny_model("llama", **words)}
    names["tokenizer"] = AutoTokenizer.from_pretrained(world / "tiny")
    exec(compile(runnable((ROOT / "docs" / f"{page}.md").read_text()), page, "exec", dont_inherit=True), names)
    assert CHECKS[page](names)


def _near_best(names: dict[str, Any]) -> bool:
    """The method of the page is what it says, and starts at the base model."""
    model, batch = names["model"].eval(), names["batch"]
    with torch.no_grad(), moelora.record_routing(model) as recorder:
        logits = model(**batch).logits
        with model.disable_adapter():
            torch.testing.assert_close(logits, model(**batch).logits)
    routing = recorder.records[0].routing
    wanted_TE = torch.zeros_like(routing.probs_TE)
    for t, probs_E in enumerate(routing.probs_TE):
        kept = [e for e, p in enumerate(probs_E) if p >= 0.7 * max(probs_E)]
        wanted_TE[t, kept] = probs_E[kept] / probs_E[kept].sum()
    torch.testing.assert_close(routing.gates_TE(), wanted_TE)
    return bool((wanted_TE == 0).any())


CHECKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "index": lambda names: names["model"].peft_config["default"].preset == "mixlora",
    "start": lambda names: "balance_loss" in names["trainer"].state.log_history[0] and Path("my-adapter").is_dir(),
    "training": lambda names: names["loss"].requires_grad and names["config"].balance_scope == "micro_batch",
    "evaluation": lambda names: len(names["recorder"].records) == 2,
    "coming-from": lambda names: names["theirs"].balance[0].kind == "mixtral",
    "how-it-works": _near_best,
}


def test_the_run_of_the_start_page_is_valid(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    (block,) = blocks((ROOT / "docs/start.md").read_text(), "yaml")
    Path("run.yaml").write_text(block)
    config = load_config("run.yaml", ["training.max_steps=200"])
    assert config.dataset.files == "my_tasks.jsonl"
    assert Path(config.dataset.files).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command of `moelora` that is gone, or a program or file that is not there, is found on every page."""
    for line in "\n".join(blocks(page.read_text(), "bash")).replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True) or ["none"]
        if program == "moelora":
            with pytest.raises(SystemExit) as stopped:
                main([words[0], "--help"])
            assert stopped.value.code == 0, line
        elif "-m" in words:
            module = words[words.index("-m") + 1]
            assert (ROOT / module.replace(".", "/")).is_dir() or (ROOT / f"{module.replace('.', '/')}.py").is_file()
        for word in words:
            assert not word.startswith("configs/") or (ROOT / word).is_file(), line
    capsys.readouterr()


def test_error_messages_are_those_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_lora(Path("lora"), 0)
    save_lora(Path("dora"), 1, use_dora=True)
    (tmp_path / "run.yaml").write_text("{model: m, dataset: {}, adapter: {preset: lora}, output_dir: o}")
    preset = moelora.MoeLoraConfig.from_preset
    adapted = peft.get_peft_model(tiny_model("llama"), preset("mixlora", r=2, num_experts=3, task_type="CAUSAL_LM"))
    by_task = preset("moelora_task", num_tasks=2, task_type="CAUSAL_LM")
    raising: dict[str, Callable[[], Any]] = {
        "unknown-preset": lambda: preset("mixlra"),
        "unknown-key": lambda: preset("mixlora", topk=2),
        "top-k": lambda: preset("mixlora", num_experts=4, top_k=8),
        "top-1": lambda: preset("mixlora", top_k=1, renormalize=True),
        "dataset": lambda: load_config("run.yaml"),
        "no-module": lambda: peft.get_peft_model(tiny_model("llama"), preset("mixlora", target_modules=["query"])),
        "moe-base": lambda: peft.get_peft_model(tiny_model("mixtral"), preset("mixlora")),
        "second-wrap": lambda: peft.get_peft_model(adapted, preset("mixlora")),
        "merge": lambda: adapted.merge_and_unload(),
        "task-ids": lambda: peft.get_peft_model(tiny_model("llama"), by_task)(**tiny_batch()),
        "format-version": lambda: moelora.MoeLoraConfig(format_version=99, moelora_version="9"),
        "not-a-plain-lora": lambda: from_loras(tiny_model("llama"), {"a": "lora", "b": "dora"}, "uniform"),
        "no-rows": lambda: from_loras(tiny_model("llama"), {"a": "lora", "b": "lora"}, "centroids"),
        "not-by-sequence": lambda: export_loras(adapted, "out"),
    }
    text = (ROOT / "docs/troubleshooting.md").read_text()
    shown = dict(re.findall(r"^### .*?\{#([\w-]+)\}\n\n```text\n(.*?)\n```", text, flags=re.MULTILINE))
    assert shown.keys() == raising.keys()
    for anchor, message in shown.items():
        with pytest.raises(moelora.MoeLoraError) as raised:
            raising[anchor]()
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
        assert re.match(pattern, str(raised.value), flags=re.DOTALL), f"{anchor}: {raised.value}"
        assert raised.value.__notes__ == [f"See docs/troubleshooting.md#{anchor}"]


def test_messages_name_a_heading_of_the_page() -> None:
    """Each kind of error has its heading there, and each heading, but that of what is no error, has its errors."""
    headings = re.findall(r"^##? (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    found = {heading.lower().replace(" ", "-") for heading in headings}
    shown = set(re.findall(r"\{#([\w-]+)\}", (ROOT / "docs/troubleshooting.md").read_text()))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MoeLoraError)]
    anchors = {kind.anchor for kind in kinds}
    assert anchors <= found | shown
    assert found - anchors == {"running", "without-an-error"}
    for kind in kinds:
        [note] = kind("why").__notes__
        assert note == kind("why").see()
        assert note == f"See docs/troubleshooting.md#{kind.anchor}"


def test_links_to_the_repository_are_turned_to_the_site() -> None:
    for page in PAGES:
        assert "](../" not in hook.relinked(page.read_text(), page.name), page
    results = hook.relinked((ROOT / "eval/results/commonsense/README.md").read_text(), "results/commonsense/index.md")
    assert "(../index.md)" in results
    assert "(scores.png)" in results


def test_numbers_are_those_of_the_results() -> None:
    """Losses, ratios and rates stand in tables of results; of scores see test_published_numbers."""
    folder = ROOT / "eval/results"
    results = {path.parent.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.md")}
    results["speed"] = (ROOT / "eval/results/speed/speed.md").read_text()
    everything = "\n".join(results.values())
    pages = {page.stem: page.read_text() for page in PAGES}
    for page in ("training", "faq", "coming-from", "when-to-use", "index"):
        for number in re.findall(r"\b3\.\d{3}\b", pages[page]):
            assert number in everything, f"{page}: {number}"
    for number in re.findall(r"\b\d\.\d{3}\b", pages["diagnose"]):
        assert number in results["diagnose/skills"] + results["diagnose/rules"], f"diagnose: {number}"
    shown = re.findall(
        r"^\| (?:step|one decoded|memory).*?\| ([\d.]+) \| ([\d.]+) \|$", pages["training"], flags=re.MULTILINE
    )
    kinds = [("MixLoRA", "step"), ("MixLoRA, compiled", "step"), ("MixLoRA", "decode"), ("MixLoRA", "memory")]
    for ratios, (method, metric) in zip(shown, kinds, strict=True):
        for ratio, model in zip(ratios, ("SmolLM2-135M, bf16", "Llama slice, bf16"), strict=True):
            assert f"| {method} / PEFT LoRA r=16 | {model} | {metric} | {ratio} |" in results["speed"]
    table = re.findall(r"^\| (.*?) \|(.*\*\*.*)\|$", results["skills"], flags=re.MULTILINE)
    rates = ("5e-4", "1e-3", "2e-3", "4e-3")
    best = {
        name: next(rate for rate, cell in zip(rates, cells.split("|"), strict=True) if "**" in cell)
        for name, cells in table
    }
    for words, name in {
        "at once, one LoRA": "one LoRA, all tasks at once",
        "a LoRA of rank 5 for each": "a LoRA for each task (oracle)",
        "in turn, one LoRA": "one LoRA, tasks in turn",
    }.items():
        assert re.search(rf"skills.*{words}.*\| {best[name]} \|$", pages["training"], flags=re.MULTILINE), name
