"""A cost model of MixLoRA on a gated feed-forward block, and what it says of whole models on several GPUs.

The formulas are those of the form that accelerators get, `moelora.ops.grouped_experts`; a test holds them to what is
counted. `python -m eval.speed.cost --write docs/scaling.md` renews the tables of that page.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelora.files import write_atomically
from moelora.ops.groups import group_size
from moelora.runs.tables import markdown

HALF = 2
"""Bytes of a bf16 number."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A gated feed-forward block with MixLoRA, or with one LoRA on its linears.

    Attributes:
        hidden, inner: D and F.
        tokens: T.
        experts, top_k, rank: E, K and R.
        dropout: Whether LoRA dropout is on.
    """

    hidden: int
    inner: int
    tokens: int
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    dropout: bool = True

    @property
    def places(self) -> int:
        """P: the choices of all tokens, each expert's rounded up to whole groups."""
        choices = self.tokens * self.top_k
        size = group_size(choices, self.experts, self.rank)
        return (choices + self.experts * (size - 1)) // size * size

    @property
    def frozen_flops(self) -> int:
        """Of gate, up and down: forward, and backward to the input."""
        return 12 * self.tokens * self.hidden * self.inner

    @property
    def lora_flops(self) -> int:
        """With one LoRA of rank R: each of its products forward, and two for it backward."""
        return self.frozen_flops + 18 * self.tokens * self.rank * (self.hidden + self.inner)

    @property
    def mixture_flops(self) -> int:
        """With the mixture.

        Forward 3D + 3F for each rank of each place, and 8D + 9F backward, of which 2D + 2F make the pre-activations
        again and F the inner activation of down; and the router.
        """
        low_rank = 2 * self.places * self.rank * (11 * self.hidden + 12 * self.inner)
        return self.frozen_flops + low_rank + 6 * self.tokens * self.hidden * self.experts

    @property
    def lora_saved(self) -> int:
        """Bytes that LoRA keeps: gate, up, act(gate) and its input to each A; with dropout a dropped one and a mask."""
        D, F, R = self.hidden, self.inner, self.rank
        kept = 3 * F * HALF + 3 * R * HALF
        return self.tokens * (kept + (2 * D + F) * (HALF + 1) if self.dropout else kept + (D + F) * HALF)

    @property
    def mixture_saved(self) -> int:
        """Bytes that the mixture keeps: the tokens, gate and up; and of the routing what is small.

        In fp32 the scores, the weight of each choice and of each place; in integers of 8 bytes the expert and the
        place of each choice, the token of each place, where each token's choices start, and a row of numbers.
        """
        routing = 4 * self.experts + (4 + 8 + 8) * self.top_k + 8 + 8
        return self.tokens * ((self.hidden + 2 * self.inner) * HALF + routing) + self.places * (8 + 4)

    @property
    def adapter_parameters(self) -> int:
        """Of all experts and the router."""
        return 3 * self.experts * self.rank * (self.hidden + self.inner) + self.experts * self.hidden


@dataclass(frozen=True)
class Model:
    """A base model.

    Attributes:
        name: Its name.
        hidden, inner, layers: D, F and the number of decoder blocks.
        parameters: Of all of it, in billions.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    parameters: float

    def block(self, tokens: int) -> Block:
        """One feed-forward block with the default MixLoRA."""
        return Block(hidden=self.hidden, inner=self.inner, tokens=tokens)


MODELS = (Model("Llama-3-8B", 4096, 14336, 32, 8.03), Model("Llama-3-70B", 8192, 28672, 80, 70.6))

TOKENS = 8192
"""Tokens of one GPU in one step."""

MEMORY = 80e9
FLOPS = 989e12 * 0.4
"""Of an H100 in bf16, dense, and the share of it that training is assumed to reach."""

NODE = 8
LINKS = {"in a node": 450e9, "between nodes": 50e9}
"""Bytes a second of one GPU in one direction: NVLink 4, and a network of 400 Gb/s for each GPU."""

TRAINED = 16
"""Bytes of a trained parameter: it, its gradient and AdamW's two moments, in fp32."""

BASES = {"bf16": 2.0, "nf4": 0.53}
"""Bytes of a frozen parameter; nf4 with its constants, doubly quantised."""


def memory_gb(model: Model, base: str, shards: int) -> tuple[float, float, float]:
    """GB on one GPU: the base, what is trained, and the activations under gradient checkpointing.

    These are the input of every block and all that one block's backward needs: what it keeps, and six tensors of its
    places and inner features while it runs; twice that for attention and norms, which are not modelled.
    """
    block = model.block(TOKENS)
    base_bytes = model.parameters * 1e9 * BASES[base] / shards
    trained = block.adapter_parameters * model.layers * TRAINED / shards
    working = 2 * (block.mixture_saved + 6 * block.places * model.inner * HALF)
    activations = model.layers * TOKENS * model.hidden * HALF + working
    return base_bytes / 1e9, trained / 1e9, activations / 1e9


def step_seconds(model: Model) -> float:
    """Arithmetic of one step of one GPU: the base forward, again for checkpointing, and backward to its inputs."""
    block = model.block(TOKENS)
    extra = (block.mixture_flops - block.frozen_flops) * 1.5 * model.layers
    return (6 * model.parameters * 1e9 * TOKENS + extra) / FLOPS


def memory_table() -> str:
    """Memory of one GPU by model, base and how many share the base and what is trained."""
    rows = []
    for model in MODELS:
        for base in BASES:
            for shards in (1, 8, 64):
                parts = memory_gb(model, base, shards)
                fits = "yes" if sum(parts) * 1e9 < 0.9 * MEMORY else "no"
                way = "DDP, or one GPU" if shards == 1 else f"FSDP2 over {shards}"
                rows.append([model.name, base, way, *(f"{part:.1f}" for part in parts), f"{sum(parts):.0f}", fits])
    header = ["model", "base", "way", "base, GB", "trained, GB", "activations, GB", "sum, GB", "fits in 80 GB"]
    return markdown(header, rows)


def traffic_table() -> str:
    """What one GPU sends in a step, and how long that takes beside the arithmetic."""
    rows = []
    for model in MODELS:
        block, compute = model.block(TOKENS), step_seconds(model)
        base_bytes = model.parameters * 1e9 * BASES["bf16"]
        gradients = block.adapter_parameters * model.layers * 4.0
        tokens = 4.0 * model.layers * TOKENS * block.top_k * model.hidden * HALF
        for devices in (8, 64):
            rest = (devices - 1) / devices
            wide = LINKS["in a node" if devices <= NODE else "between nodes"]
            inside = (NODE - 1) / NODE
            ways = {
                "DDP: gradients of the adapter": 2 * rest * gradients / wide,
                "FSDP2: the base gathered twice, gradients": (2 * rest * base_bytes + 2 * rest * gradients) / wide,
                "experts spread: tokens there and back": rest * tokens / wide,
            }
            if devices > NODE:
                hybrid = 2 * inside * (base_bytes + gradients) / LINKS["in a node"]
                ways["FSDP2 in a node, replicas between nodes"] = hybrid + 2 * rest * gradients / NODE / wide
            for way, seconds in ways.items():
                cells = [f"{seconds:.2f}", f"{compute:.1f}", f"{100 * seconds / compute:.0f} %"]
                rows.append([model.name, str(devices), way, *cells])
    header = ["model", "GPUs", "way", "sending, s", "arithmetic, s", "share"]
    return markdown(header, rows)


def growth_table() -> str:
    """FLOPs and kept bytes of one block over LoRA's, by what the mixture is made of."""
    rows = []
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"experts": 64},
        {"experts": 256},
        {"rank": 64},
        {"tokens": 1024},
    )
    for words in changes:
        what = ", ".join(f"{key} = {value}" for key, value in words.items()) or "E = 8, K = 2, R = 16, 8192 tokens"
        cells = []
        for model in MODELS:
            block = replace(model.block(TOKENS), **words)
            flops, saved = block.mixture_flops / block.lora_flops, block.mixture_saved / block.lora_saved
            cells += [f"{flops:.2f}", f"{saved:.2f}"]
        rows.append([what, *cells])
    header = ["feed-forward block", *(f"{model.name}, {what}" for model in MODELS for what in ("FLOPs", "kept bytes"))]
    return markdown(header, rows)


TABLES = {"growth": growth_table, "memory": memory_table, "traffic": traffic_table}


def renewed(page: str) -> str:
    """A page with today's tables between their comments.

    Raises:
        SystemExit: If it lacks one of them.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: python -m eval.speed.cost --write -->", f"<!-- /{name} -->"
        parts = re.split(f"{re.escape(begin)}.*?{re.escape(end)}", page, flags=re.DOTALL)
        if len(parts) != 2:
            raise SystemExit(f"the page has {len(parts) - 1} tables {name!r}; allowed: one, between {begin} and {end}.")
        page = f"{begin}\n\n{make()}\n\n{end}".join(parts)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.cost", description=__doc__)
    parser.add_argument("--write", type=Path, help="page to renew the tables in, instead of printing them")
    options = parser.parse_args(arguments)
    if options.write is None:
        print("\n\n".join(make() for make in TABLES.values()))
    else:
        write_atomically(options.write, renewed(options.write.read_text()))


if __name__ == "__main__":
    main()
