"""The recipes that are fitted on rows: centroids, PHATGOOSE's gates, LoRAHub's weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

import moelora
from moelora.compose import from_loras
from moelora.compose.routers.arrow import first_right_singular_vectors
from moelora.errors import ComposeError, ConfigError
from tests.adapters import outputs
from tests.compose.loras import TARGETS, three_loras, unlike_loras
from tests.conftest import tiny_batch, tiny_model
from tests.runs.tiny import tiny_tokenizer

BANDS = {"sums": (5, 9), "words": (35, 39), "facts": (65, 69)}
"""Each task's prompts are of tokens of its own."""


def examples(count: int = 6, seed: int = 0) -> dict[str, list[dict[str, list[int]]]]:
    """Rows of three tasks: a prompt of 7 tokens and an answer of 2, the same for all tasks."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[dict[str, list[int]]]] = {}
    for name, (low, high) in BANDS.items():
        prompts = torch.randint(low, high, (count, 7), generator=generator).tolist()
        rows[name] = [{"input_ids": [*prompt, 3, 4], "labels": [-100] * 7 + [3, 4]} for prompt in prompts]
    return rows


def prompts(rows: dict[str, list[dict[str, list[int]]]]) -> Tensor:
    return torch.tensor([row["input_ids"][:7] for part in rows.values() for row in part])


def chosen_ids(routing: Any) -> Tensor:
    """The expert of each token."""
    ids: Tensor = routing.ids_TK
    return ids


@pytest.fixture
def composed(tmp_path: Path) -> Any:
    return from_loras(
        tiny_model(), three_loras(tmp_path), {"kind": "centroids", "embedding": "input"}, examples=examples()
    )


def test_an_expert_that_most_of_its_own_rows_would_not_reach_is_named(tmp_path: Path) -> None:
    """None of them is near the mean of all, so that every prompt would go to the base model; each kind by itself is."""
    loras, rows = three_loras(tmp_path), examples()
    names = list(loras)
    mixed = {names[0]: [*rows[names[0]], *rows[names[1]]], names[2]: rows[names[2]]}
    some = {name: loras[name] for name in mixed}
    router = {"kind": "centroids", "embedding": "input"}
    with pytest.warns(UserWarning, match=rf"rows of expert '{names[0]}' are further .* unknown=False"):
        from_loras(tiny_model(), some, router, examples=mixed)
    twice = {"one": loras[names[0]], "two": loras[names[0]], names[2]: loras[names[2]]}
    kinds = {"one": rows[names[0]], "two": rows[names[1]], names[2]: rows[names[2]]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*further from its centroid")
        from_loras(tiny_model(), some, {**router, "unknown": False}, examples=mixed)
        from_loras(tiny_model(), twice, router, examples=kinds)


def test_prompts_go_to_their_own_expert(composed: Any) -> None:
    """Of fresh prompts; and one that is none of them stays with the base."""
    fresh = prompts(examples(seed=1))
    with torch.no_grad(), moelora.record_routing(composed) as listener:
        logits = composed(input_ids=fresh).logits
    routing = listener.records[0].routing
    chosen = chosen_ids(routing).view(len(fresh), 7)
    assert torch.equal(chosen, torch.arange(3).repeat_interleave(6).unsqueeze(1).expand(-1, 7))
    assert (routing.weights_TK == 1).float().mean() > 0.8
    task = torch.arange(3).repeat_interleave(6)
    assert len({id(record.routing) for record in listener.records}) == 1, "decided once for all layers"
    unknown = torch.full((1, 7), 1)
    with torch.no_grad():
        torch.testing.assert_close(composed(input_ids=unknown).logits, tiny_model()(input_ids=unknown).logits)
    assert task.shape[0] == logits.shape[0]


def test_centroids_against_a_naive_router(tmp_path: Path) -> None:
    """Means, centre and thresholds, computed one row at a time from the base model alone."""
    rows = examples()
    model = from_loras(
        tiny_model(), three_loras(tmp_path), {"kind": "centroids", "slack": 0.5, "least": 0.1}, examples=rows
    )
    base = tiny_model()

    @torch.no_grad()
    def embed(row: dict[str, list[int]]) -> Tensor:
        hidden: Tensor = base.model(torch.tensor([row["input_ids"][:7]])).last_hidden_state
        return hidden[0].mean(0)

    embeddings = {name: torch.stack([embed(row) for row in part]) for name, part in rows.items()}
    centroids = torch.stack([part.mean(0) for part in embeddings.values()])
    center = centroids.mean(0)
    router = model.base_model.model.model.layers[0].self_attn.q_proj.routers["default"]
    torch.testing.assert_close(router.tensor("centroids").data, centroids, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router.tensor("center").data[0], center, rtol=1e-5, atol=1e-6)
    for expert, part in enumerate(embeddings.values()):
        cosines = [
            F.cosine_similarity(part[i] - center, torch.cat([part[:i], part[i + 1 :]]).mean(0) - center, dim=0).item()
            for i in range(len(part))
        ]
        expected = max(0.1, min(cosines) - 0.5 * (1 - min(cosines)))
        assert router.tensor("threshold")[expert].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("embedding", ["input", "hidden"])
def test_the_answer_does_not_move_the_choice(embedding: str, tmp_path: Path) -> None:
    """With labels the prompt alone counts; without, all valid tokens; padding and batch-mates never."""
    router = {"kind": "centroids", "embedding": embedding, "unknown": False}
    model = from_loras(tiny_model(), three_loras(tmp_path), router, examples=examples())
    prompt = prompts(examples(seed=2))[[0, 7]]
    answers = torch.full((2, 30), 66)  # tokens of another task
    ids = torch.cat([prompt, answers], 1)
    labels = torch.cat([torch.full_like(prompt, -100), answers], 1)

    def choices(**inputs: Any) -> list[int]:
        with torch.no_grad(), moelora.record_routing(model) as listener:
            model(**inputs)
        chosen = chosen_ids(listener.records[0].routing)
        return chosen.view(len(inputs["input_ids"]), -1)[:, -1].tolist()

    assert choices(input_ids=ids, labels=labels) == [0, 1] == choices(input_ids=prompt)
    assert choices(input_ids=ids) != [0, 1]
    padded = F.pad(prompt, (4, 0))
    mask = (torch.arange(11) >= 4).long().expand(2, -1)
    assert choices(input_ids=padded, attention_mask=mask) == [0, 1]
    packed = torch.cat([ids[0], ids[1]]).unsqueeze(0)
    positions = torch.arange(37).repeat(2).unsqueeze(0)
    with torch.no_grad(), moelora.record_routing(model) as listener:
        model(input_ids=packed, position_ids=positions, labels=torch.cat([labels[0], labels[1]]).unsqueeze(0))
    assert chosen_ids(listener.records[0].routing).view(-1).tolist() == [0] * 37 + [1] * 37


@pytest.mark.parametrize("kind", ["centroids", "glider"])
@pytest.mark.parametrize("embedding", ["input", "hidden"])
def test_the_last_turn_of_a_conversation_decides(kind: str, embedding: str, tmp_path: Path) -> None:
    """What was asked before does not count, in a forward and in generation; a saved mixture remembers it."""
    tokenizer = tiny_tokenizer()
    opening = tokenizer.convert_tokens_to_ids("<|user|>")
    router = {"kind": kind, "embedding": embedding, **({"unknown": False} if kind == "centroids" else {})}
    router |= {"steps": 1} if kind == "glider" else {}
    rows = examples()
    loras = three_loras(tmp_path / "loras")
    model = from_loras(tiny_model(), loras, router, examples=rows, tokenizer=tokenizer)
    assert model.peft_config["default"].scores.turn_start == [opening]
    assert model.peft_config["default"].experts.recipe["turn_start"] == [opening]
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved"))
    whole = from_loras(tiny_model(), loras, {**router, "turn_start": []}, examples=rows, tokenizer=tokenizer)
    assert whole.peft_config["default"].scores.turn_start == []
    fresh = prompts(examples(seed=2))[[0, 7, 13]]  # of sums, words, facts
    start = torch.full((1, 1), opening)

    def cosines(model: Any, ids: Tensor) -> Tensor:
        """Of the sequence with each expert, as its last token has them."""
        with torch.no_grad(), moelora.record_routing(model) as listener:
            model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=2)
        found: list[Tensor] = [record.routing.logits_TE[-1] for record in listener.records]
        return found[0] if kind == "centroids" else torch.stack(found).mean(0)

    last = torch.cat([start[0], fresh[1]])
    conversation = torch.cat([start[0], fresh[0].repeat(6), last])
    alone, together, without = (
        cosines(m, ids) for m, ids in [(model, last), (model, conversation), (whole, conversation)]
    )
    torch.testing.assert_close(cosines(loaded, conversation), together)
    if kind == "centroids":
        assert alone.argmax() == together.argmax() == 1
        assert without.argmax() == 0, "the turn that has more tokens"
        torch.testing.assert_close(together, alone)
    else:
        assert not torch.allclose(together, without)


@pytest.mark.parametrize("words", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generation_keeps_the_prompts_choice(composed: Any, words: dict[str, Any]) -> None:
    """With a KV cache, beams and several answers, left-padded: as without a cache, and as the LoRA alone."""
    fresh = prompts(examples(seed=3))[[1, 8, 15]]
    ids = F.pad(fresh, (2, 0))
    mask = (torch.arange(9) >= 2).long().expand(3, -1)
    words = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **words}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        with moelora.record_routing(composed) as listener:
            found.append(composed.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **words))
        expanded = len(found[0]) if "num_beams" not in words else 9
        for record in listener.records:
            chosen = chosen_ids(record.routing).view(expanded, -1)
            assert torch.equal(chosen[:, 0], torch.arange(3).repeat_interleave(expanded // 3))
    assert torch.equal(*found)


def test_a_cache_without_its_prompt_is_refused(composed: Any) -> None:
    batch = tiny_batch()
    with torch.no_grad():
        first = composed(input_ids=batch["input_ids"], use_cache=True)
        with pytest.raises(ConfigError, match="continues a KV cache, so that the prompt is not known"):
            composed(input_ids=batch["input_ids"][:, :1], past_key_values=first.past_key_values)
        with moelora.batch_facts(instance_embedding=torch.randn(3, 36)):
            composed(input_ids=batch["input_ids"][:, :1], past_key_values=first.past_key_values)


def test_no_state_between_calls_and_no_adapter_in_the_first_pass(tmp_path: Path) -> None:
    """The base pass sees the base: its embedding is the same whatever the experts are."""
    model = from_loras(tiny_model(), three_loras(tmp_path), "centroids", examples=examples())
    one, two = tiny_batch(seed=1), tiny_batch(seed=2)
    first = outputs(model, "llama", **one)
    outputs(model, "llama", **two)
    assert torch.equal(outputs(model, "llama", **one), first)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, "llama", **one), outputs(tiny_model(), "llama", **one))


@pytest.mark.parametrize("model_name", ["t5", "bert"])
def test_other_architectures(model_name: str, tmp_path: Path) -> None:
    """The prompt of an encoder-decoder is what its encoder reads."""
    targets = {"t5": ["q", "wo"], "bert": ["query", "value"]}[model_name]
    task_type = {"t5": "SEQ_2_SEQ_LM", "bert": None}[model_name]
    loras = three_loras(tmp_path, model=model_name, target_modules=targets, task_type=task_type)
    rows = {name: [{"input_ids": row["input_ids"][:7]} for row in part] for name, part in examples().items()}
    model = from_loras(tiny_model(model_name), loras, {"kind": "centroids", "unknown": False}, examples=rows)
    fresh = prompts(examples(seed=1))[[0, 6, 12]]
    words = {"decoder_input_ids": torch.ones(3, 4, dtype=torch.long)} if model_name == "t5" else {}
    with torch.no_grad(), moelora.record_routing(model) as listener:
        model(input_ids=fresh, attention_mask=torch.ones_like(fresh), **words)
    for record in listener.records:
        assert chosen_ids(record.routing).view(3, -1)[:, 0].tolist() == [0, 1, 2]
    if model_name == "t5":
        found = [model.generate(input_ids=fresh, max_new_tokens=5, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*found)


def test_phatgoose_trains_each_gate_on_its_own_rows(tmp_path: Path) -> None:
    """The gates of three experts side by side are those of three trainings one by one."""
    loras, rows = unlike_loras(tmp_path), dict(zip("abc", examples().values(), strict=True))
    recipe = {"kind": "phatgoose", "steps": 4, "batch_size": 3, "learning_rate": 0.02}
    model = from_loras(tiny_model(), loras, recipe, examples=rows)
    gates = {name: p.detach() for name, p in model.named_parameters() if "prototypes" in name}
    assert all(gate.any(1).sum() <= 3 for gate in gates.values())
    for number, name in enumerate(loras):
        alone = _train_gate_alone(loras[name], rows[name], steps=4)
        for site, gate in alone.items():
            found = gates[f"base_model.model.{site}.moelora_router.default.prototypes"][number]
            torch.testing.assert_close(found, gate, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert not torch.allclose(outputs(model), outputs(tiny_model()))


def _train_gate_alone(folder: str, rows: list[dict[str, list[int]]], steps: int) -> dict[str, Tensor]:
    """A gate behind each LoRA layer of PEFT, trained by a plain loop."""
    model = PeftModel.from_pretrained(tiny_model(), folder).eval()
    gates: dict[str, torch.nn.Parameter] = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            gate = gates[name] = torch.nn.Parameter(torch.zeros(layer.in_features))

            def forward(x: Tensor, layer: Any = layer, gate: Any = gate) -> Tensor:
                delta = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
                return layer.base_layer(x) + torch.sigmoid(x @ gate).unsqueeze(-1) * delta

            layer.forward = forward
    optimizer = torch.optim.Adam(gates.values(), lr=0.02)
    for step in range(steps):
        part = rows[3 * (step % 2) : 3 * (step % 2) + 3]
        batch = {key: torch.tensor([row[key] for row in part]) for key in ("input_ids", "labels")}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: gate.detach() for name, gate in gates.items()}


def test_glider_against_a_naive_router(tmp_path: Path) -> None:
    """Logits are PHATGOOSE's plus alpha times those of centroids, at each site; alpha decides who wins."""
    loras, rows = three_loras(tmp_path), examples()
    gates = {"steps": 2, "batch_size": 3, "learning_rate": 0.02, "top_k": 2}
    phatgoose = from_loras(tiny_model(), loras, {"kind": "phatgoose", **gates}, examples=rows)
    centroids = from_loras(tiny_model(), loras, {"kind": "centroids", "unknown": False}, examples=rows)
    glider = {
        alpha: from_loras(tiny_model(), loras, {"kind": "glider", "alpha": alpha, **gates}, examples=rows)
        for alpha in (0.0, 2.5, 1000.0)
    }
    fresh = prompts(examples(seed=1))[[0, 7, 14]]
    models: dict[Any, Any] = {"phatgoose": phatgoose, "centroids": centroids, **glider}
    recorded = {}
    for name, model in models.items():
        with torch.no_grad(), moelora.record_routing(model) as listener:
            recorded[name] = (model(input_ids=fresh).logits, [record.routing for record in listener.records])
    torch.testing.assert_close(recorded[0.0][0], recorded["phatgoose"][0])
    local, cosine = (recorded[name][1][0].logits_TE for name in ("phatgoose", "centroids"))
    found = recorded[2.5][1][0]  # later layers see other inputs, as earlier ones route otherwise
    torch.testing.assert_close(found.logits_TE, local + 2.5 * cosine)
    kept, ids = found.logits_TE.topk(2, -1)
    assert found.ids_TK is not None
    assert torch.equal(found.ids_TK, ids)
    torch.testing.assert_close(found.weights_TK, kept.softmax(-1))
    for routing in recorded[1000.0][1]:
        assert routing.ids_TK is not None
        assert torch.equal(routing.ids_TK[:, 0], torch.arange(3).repeat_interleave(7)), "the prompt decides"
    words = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    first, second = (glider[2.5].generate(input_ids=fresh, use_cache=cache, **words) for cache in (True, False))
    assert torch.equal(first, second)
    glider[2.5].save_pretrained(str(tmp_path / "mix"))
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "mix")).eval()
    assert torch.equal(again(input_ids=fresh).logits, recorded[2.5][0])


def test_lorahub_lowers_the_loss(tmp_path: Path) -> None:
    """Found weights are no worse than none on the rows they were found on, and are in the saved configuration."""
    rows = examples()
    model = from_loras(tiny_model(), three_loras(tmp_path), {"kind": "lorahub", "steps": 25, "l1": 0.0}, examples=rows)
    weights = model.peft_config["default"].scores.weights
    assert any(weights)
    assert all(abs(weight) <= 1.5 for weight in weights)
    batch = {key: torch.tensor([row[key] for part in rows.values() for row in part]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        assert model(**batch).loss < tiny_model()(**batch).loss
    model.save_pretrained(str(tmp_path / "mix"))
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "mix")).eval()
    assert torch.equal(outputs(again), outputs(model))


def test_prototypes_are_singular_vectors() -> None:
    a_ERD, b_EOR = torch.randn(4, 3, 11), torch.randn(4, 7, 3)
    a_ERD[1, 2:], b_EOR[2] = 0, 0
    found = first_right_singular_vectors(a_ERD, b_EOR)
    for e in range(4):
        expected = torch.linalg.svd(b_EOR[e] @ a_ERD[e]).Vh[0]
        if e == 2:
            assert not found[e].any()
        else:
            assert abs(float(found[e] @ expected)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("router", "rows", "message"),
    [
        ("centroids", {}, "none for sums, words, facts; allowed: at least one row each"),
        ("centroids", {"sums": examples()["sums"]}, "none for words, facts"),
        ("centroids", {**examples(), "others": []}, "rows for others; allowed: the names of the experts"),
        ("centroids", examples(count=1), "'sums' has one row"),
        ("centroids", dict.fromkeys(BANDS, examples()["sums"]), "'sums' and 'words' have the same centroid"),
        ("phatgoose", {n: [{"input_ids": [5, 6]}] for n in BANDS}, "a row of 'sums' has none"),
        ("glider", {n: [{"input_ids": [5, 6]}] for n in BANDS}, "'glider' learns from answers"),
        ({"kind": "glider", "alpha": -1}, {}, "router.alpha is -1; allowed: a number of at least 0"),
        ("lorahub", {}, "there are none"),
        ({"kind": "arrow", "k": 3}, {}, "unknown key"),
        ("nearest", {}, "composition is 'nearest'"),
    ],
)
def test_what_cannot_be_fitted(router: Any, rows: Any, message: str, tmp_path: Path) -> None:
    base = tiny_model()
    with pytest.raises((ComposeError, ConfigError), match=message):
        from_loras(base, three_loras(tmp_path), router, examples=rows)
    torch.testing.assert_close(outputs(base), outputs(tiny_model()))
    assert len(TARGETS) == 7
