"""`moelora push`: upload an adapter, or what one was exported to."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "push",
        help="upload an adapter, or what one was exported to, to the Hugging Face Hub",
        description="Upload an adapter, or what `moelora export` made of one, to the Hugging Face Hub with a model "
        "card made from its own files. The card replaces the repository's README.md.",
        epilog=examples(
            "moelora push runs/quickstart/adapter me/my-adapter --license apache-2.0",
            "moelora push loras me/my-loras --private",
        ),
    )
    parser.add_argument("adapter", metavar="FOLDER", help="folder of a saved adapter or of an export")
    parser.add_argument("repo", metavar="REPO", help="repository as owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--token", help="Hub token with write permission (default: the one logged in with)")
    parser.add_argument("--license", help="license of what is uploaded in the Hub's spelling, e.g. apache-2.0")
    parser.add_argument("--base-model", help="the base model's name on the Hub, if the adapter records a local folder")
    parser.add_argument("--dataset", action="append", help="name on the Hub of training data, for the card; repeatable")
    parser.add_argument("--metrics", help="metrics.json whose scores go into the card (default: the adapter's own)")
    parser.add_argument("--message", help="commit message")
    parser.add_argument("--revision", help="branch to commit to; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    return parser


def run(options: argparse.Namespace) -> None:
    """Upload a folder and print where it is."""
    from moelora.share import push_to_hub

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
