"""`moelora chat`: talk to an adapter, and see which experts answer."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to an adapter, and see which experts answer",
        description="Load an adapter and its base model and answer each line of the input, token by token; below an "
        "answer is the share that each expert had in it. A line may also be a command: /adapter NAME takes another "
        "adapter of the same base (a folder, a name on the Hub, or one that was loaded before), /off the base model "
        "alone, /new forgets the conversation, /quit ends it, as the end of the input does.",
        epilog=examples(
            "moelora chat runs/quickstart",
            "moelora chat owner/adapter --temperature 0.7 --system 'Reply with the answer only.'",
            "echo 'What is 3 + 4?' | moelora chat runs/quickstart/adapter",
        ),
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a run or of an adapter, or a name on the Hub")
    parser.add_argument("--model", help="the base model (default: the run's, or the one that the adapter names)")
    parser.add_argument("--system", metavar="TEXT", help="system message before the conversation")
    parser.add_argument("--task", metavar="NAME", help="task of what is asked, for adapters that route by it")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0, the default, takes the likeliest"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Talk until the input ends.

    Raises:
        MoeLoraError: If the adapter or its base model cannot be loaded, or a word does not do.
    """
    from moelora.runs.quiet import quiet_libraries
    from moelora_cli.conversation import Conversation

    quiet_libraries()
    Conversation.open(options).hold()
