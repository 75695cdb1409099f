"""What compositions and edits refuse before anything is built: rows, numbers, names and values that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.choices import read
from moelora.compose import add_experts, choose, from_loras, split_lora
from moelora.compose.editing import read_stacked
from moelora.errors import ComposeError, ConfigError
from tests.adapters import snapshot
from tests.compose.loras import save_lora, three_loras
from tests.compose.mixtures import change_weights, saved, saved_by_sequence, weights
from tests.compose.test_assemble import _edit
from tests.compose.test_split import trained_lora
from tests.conftest import VOCAB, tiny_model

GOOD = {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}
ROWS: dict[str, tuple[Any, str]] = {
    "a string": (["1 + 1"], "row 1 of 'sums' is '1 [+] 1'; allowed: a dict with input_ids"),
    "texts": ([GOOD, {"prompt": "1", "completion": "2"}], "row 2 of 'sums' has input_ids None"),
    "empty": ([{"input_ids": []}], r"row 1 of 'sums' has input_ids \[\]; allowed: a list of at least one token id"),
    "no list": ({"input_ids": [4]}, "the rows of 'sums' are a dict"),
    "words": ([{"input_ids": ["a", "b"]}], r"has input_ids \['a', 'b'\]; allowed: token ids"),
    "fractions": ([{"input_ids": [0.5, 1.0]}], r"has input_ids \[0.5, 1.0\]"),
    "nested": ([{"input_ids": [[4, 5]]}], r"has input_ids \[\[4, 5\]\]"),
    "above the vocabulary": ([{"input_ids": [4, VOCAB]}], f"has the token {VOCAB} in input_ids; allowed: 0 to 96"),
    "below it": ([{"input_ids": [-100, 4]}], "has the token -100 in input_ids"),
    "a label": ([{"input_ids": [4, 5], "labels": [-100, 999]}], "has the token 999 in labels"),
    "fewer labels": ([{"input_ids": [4, 5], "labels": [5]}], "{'input_ids': 2, 'labels': 1} entries"),
}


@pytest.mark.parametrize("router", ["centroids", "lorahub"])
@pytest.mark.parametrize("fault", ROWS)
def test_rows_that_are_none(fault: str, router: str, tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    rows, message = ROWS[fault]
    base = tiny_model()
    before = snapshot(base)
    examples = {"words": [GOOD, GOOD], "facts": [GOOD, GOOD], "sums": rows}
    with pytest.raises(ComposeError, match=message) as caught:
        from_loras(base, loras, router, examples=examples)
    assert "\n" not in str(caught.value)
    assert snapshot(base) == before
    if router == "lorahub":
        with pytest.raises(ComposeError, match=message.replace("'sums'", "the examples")):
            choose(base, loras, rows, 1)


def test_rows_that_are_good_in_another_form(tmp_path: Path) -> None:
    """Tensors and tuples are lists too; the mixture is the same."""
    loras = three_loras(tmp_path)
    lists: dict[str, Any] = {
        name: [{"input_ids": [4 + n, 5, 6 * n + 3]} for n in range(i, i + 2)] for i, name in enumerate(loras)
    }
    tensors: dict[str, Any] = {
        name: [{"input_ids": torch.tensor(row["input_ids"])} for row in rows] for name, rows in lists.items()
    }
    router = {"kind": "centroids", "unknown": False}
    one, other = (from_loras(tiny_model(), loras, router, examples=each) for each in (lists, tensors))
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    no_mapping: Any = [GOOD]
    with pytest.raises(ComposeError, match="examples is a list"):
        from_loras(tiny_model(), loras, "centroids", examples=no_mapping)


@pytest.mark.parametrize("words", [{"lora_alpha": None}, {"alpha_pattern": {"q_proj": None}}, {"lora_alpha": "8"}])
def test_an_alpha_that_is_no_number(words: dict[str, Any], tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    _edit(tmp_path / "words", **words)
    with pytest.raises(ComposeError, match="words' has lora_alpha=(None|'8'); allowed: a finite number"):
        from_loras(tiny_model(), loras)


TOP_K: dict[str, dict[str, Any]] = {"topk": {}, "arrow": {}, "xlora": {"depth": 1}, "kshot": {"count": 3}}


@pytest.mark.parametrize("kind", [*TOP_K, "phatgoose", "glider"])
def test_more_experts_of_a_token_than_there_are(kind: str, tmp_path: Path) -> None:
    """Refused where it is said; where it is not, the recipe's own number gives way."""
    loras = three_loras(tmp_path)
    examples = {name: [{"input_ids": [4 + n, 5, 6], "labels": [-100, 5, 6]}] for n, name in enumerate(loras)}
    words = {"kind": kind, **TOP_K.get(kind, {"steps": 1})}
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ComposeError, match=f"{kind}' has top_k 4, and the mixture has 3 experts; allowed: 1 to 3"):
        from_loras(base, loras, {**words, "top_k": 4}, examples=examples)
    assert snapshot(base) == before
    with pytest.raises(ConfigError, match="router.top_k is 0; allowed: an integer of at least 1, or None"):
        from_loras(base, loras, {**words, "top_k": 0}, examples=examples)
    one = {"sums": loras["sums"]}
    model = from_loras(tiny_model(), one, words, examples={"sums": examples["sums"]})
    assert getattr(model.peft_config["default"].selection, "k", 1) == 1


def test_settings_of_a_recipe_that_has_none() -> None:
    with pytest.raises(ConfigError, match="unknown key 'top_k' in composition 'uniform'. Allowed: none, .*no settings"):
        read("composition", {"kind": "uniform", "top_k": 2})


NAMES: dict[str, tuple[Any, str]] = {
    "a slash": ("law/eu", "'law/eu' has a slash"),
    "a backslash": ("law\\eu", "has a slash"),
    "dots": ("..", "only dots"),
    "a line break": ("law\n", "control character"),
    "nothing": ("", "is no text"),
    "blanks": ("  ", "is no text"),
    "a number": (3, "3 is no text"),
    "too long": ("x" * 300, "x{70,}... has 300 bytes, more than 200"),
    "too many bytes": ("ü" * 101, "has 202 bytes"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_names_that_no_folder_can_have(fault: str, tmp_path: Path) -> None:
    name, message = NAMES[fault]
    lora = save_lora(tmp_path / "lora", 0)
    with pytest.raises(ComposeError, match=message):
        from_loras(tiny_model(), {name: str(lora)})
    mixture = saved_by_sequence(tmp_path / "mixture")
    with pytest.raises(ComposeError, match=message):
        add_experts(mixture, tmp_path / "out", names=[name], rows={"centroids": torch.ones(1, 36)})
    assert not (tmp_path / "out").exists()


def test_names_that_a_folder_can_have(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", 0)
    names = ["EU law", "x" * 200, "Größe.v2"]
    assert from_loras(tiny_model(), dict.fromkeys(names, lora)).peft_config["default"].experts.names == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_edits_refuse_what_is_no_number(value: float, tmp_path: Path) -> None:
    """Where a mixture is read, so for every edit; the tensor is named."""
    mixture = saved(tmp_path / "mixture", "mixlora")
    name = next(name for name in weights(mixture) if name.endswith("moelora_router.weight"))
    tensor = weights(mixture)[name]
    tensor[1, 2] = value
    change_weights(mixture, {name: tensor})
    with pytest.raises(ComposeError, match=f"mixture' holds NaN or infinity in {name}"):
        read_stacked(mixture)
    lora = save_lora(tmp_path / "lora", 0)
    name, tensor = next(iter(weights(lora).items()))
    change_weights(lora, {name: torch.full_like(tensor, value)})
    with pytest.raises(ComposeError, match=f"lora' holds NaN or infinity in {name}"):
        split_lora(lora, tmp_path / "out", num_experts=3)


def test_an_arrow_mixture_is_composed_again_rather_than_added_to(tmp_path: Path) -> None:
    from_loras(tiny_model(), three_loras(tmp_path / "loras"), "arrow").save_pretrained(str(tmp_path / "mix"))
    with pytest.raises(ComposeError, match="rows of 'prototypes' .* not given.* compose all of them again") as caught:
        add_experts(tmp_path / "mix", tmp_path / "out", names=["new"])
    assert "--rows" not in str(caught.value)
    with pytest.raises(ComposeError, match="rows of 'centroids' .* not given.*`--rows FILE`"):
        add_experts(saved_by_sequence(tmp_path / "mixture"), tmp_path / "out", names=["new"])
    assert not (tmp_path / "out").exists()


def test_rank_one_of_a_large_rank_has_to_be_said(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", 0, r=65, target_modules=["q_proj", "v_proj"])
    stored = sum(tensor.numel() for tensor in weights(lora).values())
    message = f"would make 65 experts .* add {65 * 36 * 4:,} parameters of routers at 4 linears to its {stored:,}"
    with pytest.raises(ComposeError, match=message):
        split_lora(lora, tmp_path / "out", into="rank_one")
    assert not (tmp_path / "out").exists()
    edit = split_lora(lora, tmp_path / "out", into="rank_one", num_experts=65)
    assert (edit.after.num_experts, edit.after.num_parameters) == (65, stored + 65 * 36 * 4)
    assert split_lora(trained_lora(tmp_path / "small"), tmp_path / "again", into="rank_one").after.num_experts > 1
