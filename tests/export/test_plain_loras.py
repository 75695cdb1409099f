"""Exported LoRAs, used by PEFT alone, give what the mixture gives."""

from __future__ import annotations

import contextlib
import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import moelora
from moelora import choices
from moelora.errors import ExportError
from moelora.export import export_loras
from moelora.scores.base import RouterInput, Scored, Scores
from tests import forked
from tests.adapters import adapted, outputs, shake
from tests.conftest import VOCAB, tiny_batch, tiny_model
from tests.export.mixtures import NAMES, RANKS, base_folder, composition, fill_centroids, saved, with_lora

CENTROIDS: dict[str, Any] = {"scores": {"kind": "centroids", "features": 36}, "selection": "nearest"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base")


def of_task(model: Any, task: int) -> Tensor:
    """Logits of the tiny batch where every row is of one task."""
    with moelora.batch_facts(task_ids=[task] * 3):
        return outputs(model)


@pytest.mark.parametrize("routers", ["per_site", "per_model"])
@pytest.mark.parametrize("form", ["model", "folder"])
def test_each_expert_of_a_task_mixture_is_a_lora(tmp_path: Path, base: Path, form: str, routers: str) -> None:
    model = composition(base, placement={"kind": "linear", "routers": routers})
    export_loras(model if form == "model" else saved(model, tmp_path / "adapter"), tmp_path / "out")
    for task, name in enumerate(NAMES):
        found = outputs(with_lora(base, tmp_path / "out" / name))
        torch.testing.assert_close(found, of_task(model, task), atol=1e-5, rtol=1e-5)
        assert (found - outputs(tiny_model())).abs().max() > 1e-2
    router = json.loads((tmp_path / "out" / "router.json").read_text())
    assert router["loras"] == {"-1": None, **{str(task): name for task, name in enumerate(NAMES)}}
    assert router["base_model"] == str(base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*NAMES, "moelora_export.json", "route.py", "router.json"]
    )


@dataclass(frozen=True, kw_only=True)
class TableScores(Scores):
    """Weights of the experts by task, from a table in the configuration, as task-gated methods have them."""

    kind: ClassVar[str] = "table"

    table: list[list[float]] = field(default_factory=list)

    needs = property(lambda self: frozenset({"task_ids"}))
    is_trained = property(lambda self: False)
    ignores_input = property(lambda self: True)
    num_tasks = property(lambda self: len(self.table))

    def score(self, given: RouterInput) -> Scored:
        weights_TE = torch.tensor(self.table)[given.tokens.fact_N("task_ids")][given.tokens.sequence_T()]
        return Scored(weights_TE, weights_TE, weights_TE, is_softmax=False)


def test_each_task_of_a_task_gated_mixture_is_a_lora(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(choices._KINDS["scores"], TableScores.kind, TableScores)
    table = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]
    model = composition(base, scores={"kind": TableScores.kind, "table": table})
    export_loras(model, tmp_path / "out")
    for task, name in enumerate(["task-0", "code"]):
        found = outputs(with_lora(base, tmp_path / "out" / name))
        torch.testing.assert_close(found, of_task(model, task), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "router.json").read_text())["loras"] == {"0": "task-0", "1": "code"}
    assert LoraConfig.from_pretrained(str(tmp_path / "out" / "task-0")).r == sum(RANKS)


def test_padding_and_absent_sites_are_left_out(tmp_path: Path, base: Path) -> None:
    export_loras(composition(base), tmp_path / "out")
    for name, rank in zip(NAMES, RANKS, strict=True):
        config = LoraConfig.from_pretrained(str(tmp_path / "out" / name))
        targets = {"q_proj", "v_proj", "up_proj"} | ({"down_proj"} if name != "code" else set())
        assert (config.r, config.lora_alpha, config.rank_pattern) == (rank, rank, {})
        assert set(config.target_modules) == targets
        tensors = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in tensors.items()} == {rank}
        assert len(tensors) == 2 * 2 * len(targets)


def test_ranks_that_differ_by_site_are_in_the_pattern(tmp_path: Path, base: Path) -> None:
    model = composition(base)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        factors = layer.lora_factors("", "default")
        factors.a_ERD[0, 1:] = 0
        factors.b_EOR[0, :, 1:] = 0
    export_loras(model, tmp_path / "out")
    config = LoraConfig.from_pretrained(str(tmp_path / "out" / "maths"))
    assert config.rank_pattern == config.alpha_pattern == {"model.layers.1.self_attn.q_proj": 1}
    found = outputs(with_lora(base, tmp_path / "out" / "maths"))
    torch.testing.assert_close(found, of_task(model, 0), atol=1e-5, rtol=1e-5)


def test_plain_loras_beside_the_mixtures_are_in_every_lora(tmp_path: Path, base: Path) -> None:
    """And alone where the base model is chosen."""
    model = composition(base, placement={"kind": "linear", "unrouted_modules": ["q_proj"]})
    export_loras(model, tmp_path / "out")
    for task, name in enumerate(["no-expert", *NAMES], start=-1):
        found = outputs(with_lora(base, tmp_path / "out" / name))
        torch.testing.assert_close(found, of_task(model, task), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "router.json").read_text())["loras"]["-1"] == "no-expert"


@pytest.mark.parametrize("name", ["llama", "phi3", "phi"])
def test_feed_forward_experts_are_loras_of_the_blocks_linears(tmp_path: Path, name: str) -> None:
    base = base_folder(tmp_path / "base", name)
    model = composition(base, name, placement="feed_forward", target_modules="all-linear")
    export_loras(model, tmp_path / "out")
    for task, expert in enumerate(NAMES):
        with moelora.batch_facts(task_ids=[task] * 3):
            expected = outputs(model, name)
        found = outputs(with_lora(base, tmp_path / "out" / expert), name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # without an expert a block would be nothing, not the base model's
    assert "-1" not in json.loads((tmp_path / "out" / "router.json").read_text())["loras"]


def test_lora_words_are_kept_where_they_can_be(tmp_path: Path, base: Path) -> None:
    experts = {"kind": "lora", "num_experts": 3, "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1}
    model = composition(base, experts=experts, target_modules=["q_proj"])
    shake(model)  # what was padded is no longer
    export_loras(model, tmp_path / "out")
    config = LoraConfig.from_pretrained(str(tmp_path / "out" / "expert-2"))
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 6, True, 0.1)
    found = outputs(with_lora(base, tmp_path / "out" / "expert-2"))
    torch.testing.assert_close(found, of_task(model, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.7, -0.25, 0.1]])
def test_a_fixed_mix_is_one_lora(tmp_path: Path, base: Path, weights: list[float] | None) -> None:
    model = composition(base, scores={"kind": "constant", "weights": weights})
    export_loras(saved(model, tmp_path / "adapter"), tmp_path / "out")
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "out")), outputs(model), atol=1e-5, rtol=1e-5)
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert config.r == config.lora_alpha == sum(RANKS)


def test_a_fixed_choice_of_a_block_is_one_lora(tmp_path: Path, base: Path) -> None:
    words: dict[str, Any] = {"placement": "feed_forward", "target_modules": ["up_proj", "gate_proj"]}
    model = composition(base, scores={"kind": "constant", "weights": [0, 1, 0]}, **words)
    export_loras(model, tmp_path / "out")
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "out")), outputs(model), atol=1e-5, rtol=1e-5)


def test_plain_lora_is_one_lora(tmp_path: Path, base: Path) -> None:
    model = adapted("lora", target_modules=["q_proj"])
    export_loras(model, tmp_path / "out")
    torch.testing.assert_close(outputs(with_lora(base, tmp_path / "out")), outputs(model), atol=1e-5, rtol=1e-5)
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (3, 32, {"q_proj"})


def letters(folder: Path) -> Any:
    """A tokenizer of single letters, whose ids are from 3 on."""
    tokens = ["<pad>", "<s>", "</s>", *map(chr, range(33, 30 + VOCAB))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def routed_by(script: Path, request: str) -> str:
    """What the exported example prints, in a process where moelora cannot be imported."""
    with contextlib.chdir(script.parent):
        return forked.run(str(script), request, folder=script.parent, without=["moelora"]).strip()


@pytest.mark.parametrize("embedding", ["hidden", "input"])
def test_route_py_chooses_as_the_mixture_does(tmp_path: Path, base: Path, embedding: str) -> None:
    tokenizer = letters(base)
    words: dict[str, Any] = {"scores": {"kind": "centroids", "features": 36, "embedding": embedding}}
    selection = {"kind": "nearest", "threshold": True}
    model = composition(base, **words, selection=selection, placement={"kind": "linear", "routers": "per_model"})
    # a centroid for each of three prompts, and a fourth that is far from all
    prompts = ["abcabcab", "XYZZYX", "0123456789", "~~~~~~~~~"]
    plain = tiny_model()
    means = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            states = plain.model(ids).last_hidden_state if embedding == "hidden" else plain.model.embed_tokens(ids)
        means.append(states[0].mean(0))
    fill_centroids(model, torch.stack(means[:3]), threshold=0.99)
    export_loras(model, tmp_path / "out")
    assert len((tmp_path / "out" / "route.py").read_text().splitlines()) <= 40
    pick = runpy.run_path(str(tmp_path / "out" / "route.py"))["pick"]
    for prompt, expected in zip(prompts, [*NAMES, None], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert pick(plain.model, ids) == expected
        with torch.no_grad():
            mixture = model(input_ids=ids).logits
            alone = plain if expected is None else with_lora(base, tmp_path / "out" / expected)
            torch.testing.assert_close(alone(ids).logits, mixture, atol=1e-5, rtol=1e-5)
    if embedding == "hidden":  # the file is the same for both
        assert routed_by(tmp_path / "out" / "route.py", prompts[1]) == NAMES[1]


@pytest.mark.parametrize("embedding", ["hidden", "input"])
def test_route_py_looks_at_the_last_turn(tmp_path: Path, base: Path, embedding: str) -> None:
    """Of a conversation in which "!" opens the user's turns, as the mixture does."""
    tokenizer = letters(base)
    scores = {"kind": "centroids", "features": 36, "embedding": embedding, "turn_start": [tokenizer.vocab["!"]]}
    placement = {"kind": "linear", "routers": "per_model"}
    model = composition(base, scores=scores, selection="nearest", placement=placement)
    plain = tiny_model()
    prompts = ["!abcabcab", "!XYZZYX", "!0123456789"]
    with torch.no_grad():
        embed = (lambda ids: plain.model(ids).last_hidden_state) if embedding == "hidden" else plain.model.embed_tokens
        means = [embed(tokenizer(each, return_tensors="pt").input_ids)[0].mean(0) for each in prompts]
    fill_centroids(model, torch.stack(means))
    export_loras(model, tmp_path / "out")
    pick = runpy.run_path(str(tmp_path / "out" / "route.py"))["pick"]
    conversation = tokenizer("!abcabcabcabcabcabcabc!XYZZYX", return_tensors="pt").input_ids
    assert pick(plain.model, conversation) == NAMES[1]
    with torch.no_grad():
        alone = with_lora(base, tmp_path / "out" / NAMES[1])
        torch.testing.assert_close(
            alone(conversation).logits, model(input_ids=conversation).logits, atol=1e-5, rtol=1e-5
        )


def test_route_py_by_task(tmp_path: Path, base: Path) -> None:
    export_loras(composition(base), tmp_path / "out")
    script = tmp_path / "out" / "route.py"
    assert routed_by(script, "2") == "prose"
    assert runpy.run_path(str(script))["pick"](-1) is None
    assert len(script.read_text().splitlines()) <= 36


def test_centroids_without_threshold_choose_an_expert_always(tmp_path: Path, base: Path) -> None:
    model = composition(base, **CENTROIDS, placement={"kind": "feed_forward", "routers": "per_model"})
    fill_centroids(model, torch.randn(3, 36))
    export_loras(saved(model, tmp_path / "adapter"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "router.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {"centroids": [3, 36], "center": [1, 36]}
    batch = tiny_batch()
    with moelora.record_routing(model) as listener:
        expected = outputs(model)
    chosen = listener.records[0].routing.gates_TE().view(3, -1, 3)[:, 0].argmax(-1).tolist()
    assert len(set(chosen)) > 1
    for row, expert in enumerate(chosen):
        found = outputs(with_lora(base, tmp_path / "out" / NAMES[expert]))
        valid = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][valid], expected[row][valid], atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "by token": ({"scores": "linear", "selection": {"kind": "top_k", "k": 2}}, "token by token"),
    "by token, one expert": (
        {"scores": "linear", "selection": {"kind": "top_k", "k": 1, "renormalize": False}},
        "native-moe",
    ),
    "prototypes": ({"scores": "prototypes", "selection": {"kind": "top_k", "k": 1}}, "--rank R"),
    "two experts of a sequence": ({**CENTROIDS, "selection": {"kind": "top_k", "k": 2}}, "mixes experts"),
    "a mix of blocks": ({"scores": "constant", "placement": "feed_forward"}, "sum of whole feed-forward blocks"),
    "names that are one folder": ({"changes": {"names": ["a/b", "a b", "c"]}}, "'a-b', which is taken"),
    "a name of a file of ours": ({"changes": {"names": ["a", "Router.json", "c"]}}, "which is taken"),
    "capitals": ({"changes": {"names": ["Code", "code", "c"]}}, "which is taken"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "no weight": ({"scores": {"kind": "constant", "weights": [0, 0, 0]}}, "not 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path, base: Path, case: str) -> None:
    words, message = REFUSED[case]
    model = composition(base, **words)
    with pytest.raises(ExportError, match=message):
        export_loras(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_routers_that_differ_by_site_are_refused(tmp_path: Path, base: Path) -> None:
    model = composition(base, **CENTROIDS)
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.routers["default"].tensor("center"), Tensor)
    with pytest.raises(ExportError, match="routers of .* differ"):
        export_loras(model, tmp_path / "out")
    fill_centroids(model, torch.randn(3, 36))
    assert export_loras(model, tmp_path / "out").is_dir()


def test_the_model_is_left_as_it_was(tmp_path: Path, base: Path) -> None:
    model = composition(base, scores="constant").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_loras(model, tmp_path / "out")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
