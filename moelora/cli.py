"""The command `moelora`: look at an adapter, upload an adapter, make the page of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moelora.errors import MoeLoraError
from moelora.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None is that of this process.

    Returns:
        The exit code: 0, or 1 after an error, whose message is on stderr. Wrong usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        options.call(options)
    except MoeLoraError as error:
        print(f"moelora {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moelora", description="Routed mixtures of LoRA experts as a PEFT method.")
    parser.add_argument("--version", action="version", version=f"moelora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="print what an adapter is",
        description="Print what an adapter is: preset, axes, sites, parameters, base model, versions. Reads its JSON "
        "and the header of its weights; loads no weight and no base model.",
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter, or Hub repository (owner/name)")
    inspect.add_argument("--revision", help="branch, tag or commit of the repository")
    inspect.add_argument("--token", help="Hub token for a private repository (default: the one logged in with)")
    inspect.set_defaults(call=_inspect)

    push = commands.add_parser(
        "push",
        help="upload an adapter to the Hugging Face Hub",
        description="Upload an adapter to the Hugging Face Hub with a model card made from its own files. The card "
        "replaces the repository's README.md.",
    )
    push.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    push.add_argument("repo", metavar="REPO", help="repository as owner/name; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--token", help="Hub token with write permission (default: the one logged in with)")
    push.add_argument("--license", help="license of the adapter in the Hub's spelling, e.g. apache-2.0")
    push.add_argument("--base-model", help="the base model's name on the Hub, if the adapter records a local folder")
    push.add_argument("--dataset", action="append", help="name on the Hub of training data, for the card; repeatable")
    push.add_argument("--metrics", help="metrics.json whose scores go into the card (default: the adapter's own)")
    push.add_argument("--message", help="commit message")
    push.add_argument("--revision", help="branch to commit to; made if it does not exist")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(call=_push)

    report = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="Write one self-contained HTML page about a run: scores, training curves, heat maps of the "
        "routing, and texts coloured by their experts. It shows what `python -m train` and `python -m eval` left in "
        "the folder.",
    )
    report.add_argument("run", metavar="RUN", help="folder of a run, or of an adapter")
    report.add_argument("--output", metavar="FILE", help="the HTML file (default: report.html in RUN)")
    report.set_defaults(call=_report)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    from moelora.hub import read_adapter

    info = read_adapter(options.adapter, revision=options.revision, token=options.token)
    config = info.config
    rows = [
        ("preset", config.preset or "none"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("task type", str(config.task_type or "none")),
        ("parameters", f"{info.num_parameters:,} stored, {info.num_trainable:,} trainable"),
        ("size", f"{info.num_bytes:,} bytes, {', '.join(info.dtypes)}"),
        ("written by", f"moelora {config.moelora_version}, format {config.format_version}, PEFT {config.peft_version}"),
        *info.axes().items(),
    ]
    print(info.source)
    for name, value in rows:
        print(f"  {name:<12}{value}")
    print()
    header = ("MODULES", "LAYERS", "NUMBER", "PARAMETERS", "TRAINABLE", "WHAT")
    sites = [
        (s.module, s.layer_ranges(), str(s.count), f"{s.num_parameters:,}", f"{s.num_trainable:,}", s.describe())
        for s in info.sites()
    ]
    widths = [max(map(len, column)) for column in zip(header, *sites, strict=True)]
    for line in (header, *sites):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _report(options: argparse.Namespace) -> None:
    from moelora.report import build_report

    print(build_report(options.run, options.output))


def _push(options: argparse.Namespace) -> None:
    from moelora.hub import push_to_hub

    commit = push_to_hub(
        options.adapter,
        options.repo,
        private=True if options.private else None,
        token=options.token,
        commit_message=options.message,
        revision=options.revision,
        create_pr=options.create_pr,
        base_model=options.base_model,
        license=options.license,
        datasets=options.dataset,
        metrics=options.metrics,
    )
    print(commit.pr_url or commit.commit_url)


if __name__ == "__main__":
    sys.exit(main())
