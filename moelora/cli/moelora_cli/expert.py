"""`moelora expert`: edit the experts of a trained mixture."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples

_DATA = "rows to score on before and after: JSON, JSONL, CSV or Parquet with prompt and completion, messages, or text"
_INTO = (
    "what an expert gets: an equal piece of the rank (blocks, rank_one), all experts acting on every token; or the "
    "whole LoRA (copies), of which K act on a token"
)
_BASE = "the base model, for --data (default: the one that the adapter records)"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "expert",
        help="add, freeze, drop, merge, cut or split the experts of an adapter",
        description="Edit the experts of a trained adapter. Each command reads a folder and writes a new one, never "
        "over its input; it prints the parameters before and after, and with --data the loss.",
        epilog=examples(
            "moelora expert add mix -o mix-2 --name sums --rows rows.jsonl",
            "moelora expert drop mix -o mix-2 --experts words",
            "moelora expert merge mix -o mix-2 --to 4 --data rows.jsonl",
            "moelora expert split lora -o mix --num-experts 4",
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        each: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        each.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
        each.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new folder; it must not exist")
        each.add_argument("--data", nargs="+", metavar="FILE", help=_DATA)
        each.add_argument("--base", metavar="MODEL", help=_BASE)
        each.add_argument("--limit", type=int, metavar="N", help="take N of the rows, chosen by a fixed seed")
        each.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the base")
        each.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default: 8)")
        each.set_defaults(command=f"expert {name}")
        return each

    add = verb("add", "add experts; the old ones and their rows of the router are frozen")
    add.add_argument("--count", type=int, default=1, metavar="N", help="how many (default: 1)")
    add.add_argument(
        "--start", default="zero", help="zero, mean (of the old experts), or the name or number of one to copy"
    )
    add.add_argument("--name", action="append", help="what a new expert is called; repeatable")
    add.add_argument(
        "--rows",
        metavar="FILE",
        help="rows of the new expert: its centroid and threshold, where it needs them, come from their prompts; of "
        "rows with a column task, those of --name",
    )
    drop = verb("drop", "drop experts")
    which = drop.add_mutually_exclusive_group(required=True)
    which.add_argument("--experts", metavar="LIST", help="names or numbers, with commas between")
    which.add_argument(
        "--unused", type=float, metavar="SHARE", help="those with less than this share of the choices on --data"
    )
    freeze = verb("freeze", "keep experts and their rows of the router from further training")
    freeze.add_argument("--experts", required=True, metavar="LIST", help="names or numbers, 'all' or 'none'")
    merge = verb("merge", "merge the experts that the router treats alike, by their usage on --data (MC-SMoE)")
    merge.add_argument("--to", type=int, required=True, metavar="N", help="how many experts to keep")
    cut = verb("cut", "cut the rank of every expert by SVD")
    cut.add_argument("--rank", type=int, required=True, metavar="R", help="the new rank")
    split = verb("split", "split one trained LoRA into experts, with its function unchanged at the start")
    split.add_argument("--into", default="blocks", choices=("blocks", "rank_one", "copies"), help=_INTO)
    split.add_argument(
        "--num-experts",
        type=int,
        metavar="E",
        help="how many: of blocks a divisor of the rank; of rank_one the rank, which only above 64 must be said",
    )
    split.add_argument(
        "--top-k", type=int, metavar="K", help="experts of a token, 2 to E (default: 2); only with copies"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Do the edit and print the sizes and, with data, the losses.

    Raises:
        MoeLoraError: If it cannot be done. Nothing is written then.
    """
    from moelora.compose.editing.stacked import check_output, read_stacked
    from moelora.errors import ComposeError
    from moelora.runs.quiet import quiet_libraries
    from moelora_cli.expert_data import ScoredData

    quiet_libraries()
    check_output(options.output, options.adapter)
    if options.verb != "split":
        read_stacked(options.adapter)  # what is wrong with it is said before a base model is loaded
    needs_data = options.verb == "merge" or getattr(options, "unused", None) is not None
    if needs_data and options.data is None:
        raise ComposeError(f"{options.command} looks at the usage of the experts; allowed: with --data FILE.")
    if getattr(options, "rows", None) is not None:
        _check_one_expert(options)
    data = None
    if options.data is not None or getattr(options, "rows", None) is not None:
        data = ScoredData.open(options)
    before = None if data is None or options.data is None else data.measure(options.adapter, routing=needs_data)
    edit = _edit(options, data, None if before is None else before.routing)
    lines = [("", "BEFORE", "AFTER")]
    for label in ("num_experts", "num_parameters", "num_trainable"):
        old, new = getattr(edit.before, label), getattr(edit.after, label)
        lines.append((label.removeprefix("num_").replace("_", " "), f"{old:,}", f"{new:,}"))
    if before is not None and data is not None:
        lines.append(("loss a token", f"{before.loss:.4f}", f"{data.measure(str(edit.folder)).loss:.4f}"))
    print(edit.folder)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  " + "  ".join([first.ljust(widths[0]), *numbers]))
    for note in edit.notes:
        print(f"  {note}")
    print(f"  next: moelora inspect {edit.folder}")


def _check_one_expert(options: argparse.Namespace) -> None:
    """Refuse rows for several new experts.

    Raises:
        ComposeError: If there are several.
    """
    from moelora.errors import ComposeError

    if options.count != 1:
        raise ComposeError(f"--rows are the rows of one expert; allowed: --count 1, not {options.count}.")
    if options.name is not None and len(options.name) > 1:
        raise ComposeError(f"--rows are the rows of one expert; allowed: one --name, not {', '.join(options.name)}.")


def _edit(options: argparse.Namespace, data: Any, routing: Any) -> Any:
    from moelora.compose import editing

    adapter, output = options.adapter, options.output
    if options.verb == "add":
        rows = None if options.rows is None else data.router_rows(options.adapter, options.rows)
        return editing.add_experts(
            adapter, output, count=options.count, start=options.start, names=options.name, rows=rows
        )
    if options.verb == "drop":
        if options.unused is None:
            return editing.drop_experts(adapter, output, _listed(options.experts))
        usage = {name: found.usage_E for name, found in routing.items()}
        return editing.drop_experts(adapter, output, usage=usage, below=options.unused)
    if options.verb == "freeze":
        experts: list[Any] = _listed(options.experts)
        if options.experts == "all":
            experts = list(range(editing.read_stacked(adapter).num_experts))
        return editing.freeze_experts(adapter, output, [] if options.experts == "none" else experts)
    if options.verb == "merge":
        return editing.merge_experts(adapter, output, num_experts=options.to, routing=routing)
    if options.verb == "cut":
        return editing.cut_ranks(adapter, output, rank=options.rank)
    return editing.split_lora(adapter, output, into=options.into, num_experts=options.num_experts, top_k=options.top_k)


def _listed(words: str) -> list[Any]:
    return [word.strip() for word in words.split(",") if word.strip()]
