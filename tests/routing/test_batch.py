"""Which tokens of a model's forward count: padding on either side, KV cache, encoder-decoder models, no mask at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import record_routing
from moelora.routing.record import RoutingRecord
from tests.adapters import ROUTED, adapted
from tests.conftest import tiny_batch


def records_of(model: Any, **inputs: Any) -> list[RoutingRecord]:
    with torch.no_grad(), record_routing(model) as recorder:
        model(**inputs)
        return list(recorder.records)


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same sequences with their padding in front, and the positions that make them the same."""
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    moved = {key: value.gather(1, order) for key, value in batch.items()}
    moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return moved


@pytest.mark.parametrize("preset", ROUTED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(preset: str, side: str) -> None:
    model = adapted(preset)
    batch = tiny_batch()
    padded = left_padded(batch) if side == "left" else batch
    together = records_of(model, **padded)
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [records_of(model, input_ids=ids[None, :n]) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    for i, record in enumerate(together):
        assert record.valid_tokens == sum(lengths)
        expected_E = torch.stack([records[i].counts_E() for records in alone]).sum(0)
        torch.testing.assert_close(record.counts_E(), expected_E, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record.load_E().sum(), torch.tensor(1.0))
        row_probs = torch.cat([records[i].routing.probs_TE for records in alone])
        torch.testing.assert_close(record.routing.probs_TE[record.valid_T], row_probs, rtol=1e-4, atol=1e-5)


def test_kv_cache_continues_the_mask() -> None:
    """Decoding token by token decides as one pass does, and counts each token once."""
    model = adapted("mixlora")
    batch = left_padded(tiny_batch())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    full = records_of(model, **inputs)
    prefix = 7
    steps: list[list[RoutingRecord]] = []
    cache = None
    for start, stop in [(0, prefix), *((i, i + 1) for i in range(prefix, 11))]:
        with torch.no_grad(), record_routing(model) as recorder:
            output = model(
                input_ids=inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=inputs["position_ids"][:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(list(recorder.records))
    for i, record in enumerate(full):
        counts_E = torch.stack([records[i].counts_E() for records in steps]).sum(0)
        torch.testing.assert_close(counts_E, record.counts_E())
        assert sum(records[i].valid_tokens for records in steps) == record.valid_tokens


def test_generate_counts_every_token_once() -> None:
    model = adapted("mixlora")
    batch = left_padded(tiny_batch())
    with record_routing(model) as recorder:
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
    first_layer = [record for record in recorder.records if record.layer == recorder.records[0].layer]
    # the last new token is never fed back
    assert sum(record.valid_tokens for record in first_layer) == int(batch["attention_mask"].sum()) + 3 * 3


def test_without_a_mask_every_token_counts() -> None:
    model = adapted("mixlora")
    for record in records_of(model, input_ids=tiny_batch()["input_ids"]):
        assert record.valid_tokens == 33


def test_a_positional_mask_is_read() -> None:
    """Models with an adapter of transformers' own `add_adapter` are called as the user likes."""
    model = adapted("mixlora")
    batch = tiny_batch()
    with torch.no_grad(), record_routing(model) as recorder:
        model.base_model.model(batch["input_ids"], batch["attention_mask"])
    assert {record.valid_tokens for record in recorder.records} == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("equal_lengths", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_t5_counts_by_stream(equal_lengths: bool, checkpointing: bool | None) -> None:
    """Encoder and decoder have masks of their own, and cross-attention's k and v read the encoder's tokens."""
    model = adapted("sira", "t5")
    source = tiny_batch("t5", length=11)
    target = tiny_batch("t5", length=11 if equal_lengths else 9, seed=1)
    source["attention_mask"][0, 6:] = 0
    inputs = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": target["labels"]}
    if checkpointing is not None:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with record_routing(model) as recorder:
        model(**inputs, use_cache=False)
        records = list(recorder.records)
    encoder_tokens, decoder_tokens = int(source["attention_mask"].sum()), int((target["labels"] != -100).sum())
    assert encoder_tokens != decoder_tokens
    crossing = 0
    for record in records:
        reads_encoder = record.layer.startswith("encoder.") or record.layer.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        crossing += reads_encoder and record.layer.startswith("decoder.")
        assert record.valid_tokens == (encoder_tokens if reads_encoder else decoder_tokens), record.layer
    assert crossing == 4


def test_t5_with_a_mask_of_the_decoder() -> None:
    model = adapted("mixlora", "t5")
    batch = tiny_batch("t5")
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    records = records_of(
        model,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["input_ids"][:, :5],
        decoder_attention_mask=mask,
    )
    assert {r.valid_tokens for r in records if r.layer.startswith("decoder.")} == {13}


def test_t5_generates_with_a_capacity_by_the_padding() -> None:
    """`generate` calls the encoder by itself; its padding must not take room from the tokens there either."""
    model = adapted("sira", "t5", capacity_factor=0.5, capacity_in_eval=True)
    batch = tiny_batch("t5", batch_size=2)
    length = int(batch["attention_mask"][1].sum())
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    padded = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
    alone = model.generate(
        input_ids=batch["input_ids"][1:, :length], attention_mask=batch["attention_mask"][1:, :length], **settings
    )
    torch.testing.assert_close(padded.logits[0][2:], alone.logits[0], rtol=1e-4, atol=1e-5)
