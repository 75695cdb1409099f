from __future__ import annotations

from pathlib import Path

import pytest

from eval.compare.schema import load_benchmark
from eval.compare.sizes import check_sizes
from moelora.errors import MoeLoraError
from tests.eval.compare.tiny import write_benchmark

SHIPPED = Path(__file__).parents[3] / "configs" / "benchmarks" / "commonsense.yaml"
VARIANTS = SHIPPED.with_name("commonsense_variants.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tasks=[piqa]", "unknown key 'piqa' in data.tasks"),
        ("data.steps=0", "data.steps is 0; allowed: at least 1"),
        ("evaluation.limit=0", "evaluation.limit is 0"),
        ("selection.learning_rates=[]", "learning_rates is empty and methods.lora has no learning_rate"),
        ("training.learning_rate=0.1", "training.learning_rate cannot be set: it is chosen per method"),
        ("training.max_steps=9", "use data.steps"),
        ("reference=dora", "unknown key 'dora' in reference"),
        ("protocol=regex", "unknown key 'regex' in protocol"),
        ("methods.lora.seeds=[1, 1]", "none twice"),
        ("methods.lora.adapter.peft=dora", "says peft: 'dora'; allowed: 'lora', or a preset"),
        ("methods.lora.adapter.rank=3", "peft.LoraConfig refuses it"),
        ("methods.lora.equal=exact", "methods.lora.equal is 'exact'; allowed: 'trainable' or 'active'"),
        ("methods.mixlora.rank=3", "unknown key 'rank' in methods.mixlora"),
        ("surprise=1", "unknown key 'surprise'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        load_benchmark(write_benchmark(tmp_path), [override])


def test_methods_of_unequal_size_are_refused(tmp_path: Path) -> None:
    file = write_benchmark(tmp_path)
    sizes = check_sizes(load_benchmark(file))
    assert abs(sizes["lora"].trainable / sizes["mixlora"].trainable - 1) < 0.02
    assert sizes["mixlora"].active < sizes["mixlora"].trainable
    with pytest.raises(MoeLoraError, match=r"lora has [0-9,]+ \(-9\..% of [0-9,]+; nearest r: 49\)"):
        check_sizes(load_benchmark(file, ["methods.lora.adapter.r=44"]))
    with pytest.raises(MoeLoraError, match="lora has"):
        check_sizes(load_benchmark(file, ["methods.lora.equal=active"]))
    active = sizes["mixlora"].active * 49 // sizes["lora"].trainable
    check_sizes(load_benchmark(file, ["methods.lora.equal=active", f"methods.lora.adapter.r={active}"]))


def test_the_shipped_comparison_is_the_issues() -> None:
    config = load_benchmark(SHIPPED)
    header = "".join(line for line in SHIPPED.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "moelora compare configs/benchmarks/commonsense.yaml" in header
    assert set(config.methods) == {"lora", "lora_active", "random_router", "mixlora", "sira", "smora", "molora"}
    assert {key for key, method in config.methods.items() if len(method.seeds) == 3} == {
        "lora",
        "mixlora",
        "sira",
        "smora",
    }
    assert (config.data.steps, config.data.rows_per_task, config.training["per_device_train_batch_size"]) == (
        100,
        1200,
        16,
    )
    assert config.evaluation.limit is not None
    assert config.evaluation.limit >= 300


def test_the_variants_are_trained_as_the_comparison_is() -> None:
    main, variants = load_benchmark(SHIPPED), load_benchmark(VARIANTS)
    assert variants.data == main.data
    assert variants.training == main.training
    assert variants.evaluation == main.evaluation
    assert set(variants.selection.learning_rates) <= set(main.selection.learning_rates)
    assert variants.selection.steps == main.selection.steps
    assert variants.selection.seed == main.selection.seed
    assert variants.methods["mixlora"].adapter == main.methods["mixlora"].adapter
    assert variants.methods["lora"].adapter == main.methods["lora"].adapter
    adapters = [method.adapter for key, method in variants.methods.items() if key not in ("lora", "mixlora")]
    assert all(adapter["preset"] == "mixlora" and adapter != main.methods["mixlora"].adapter for adapter in adapters)


@pytest.mark.real_model
@pytest.mark.parametrize("file", [SHIPPED, VARIANTS], ids=["comparison", "variants"])
def test_the_shipped_methods_are_of_equal_size(file: Path) -> None:
    sizes = check_sizes(load_benchmark(file))
    assert sizes["mixlora"].trainable == 16_496_640
