"""The command ``moe-ep``; also ``python -m moe_ep.cli``.

A command is a module with ``HELP``, its description, ``add_arguments(parser)`` and ``run(args) -> int``.
Only the chosen command's module is imported: what one command needs neither slows nor breaks another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from .errors import MoeEpError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "train": Command("moe_ep.recipes.train_command", "train a DeepSeek-V3-style model on text"),
    "bench": Command("moe_ep.bench.command", "time dispatch and combine on this machine"),
    "tune": Command("moe_ep.bench.tune_command", "find the best numbers of SMs for your sizes"),
    "doctor": Command("moe_ep.doctor", "say what this machine can run, and what is missing for more"),
    "plan": Command("moe_ep.recipes.plan", "say what memory and traffic a model needs on given ranks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 2 for a MoeEpError or a bad argument, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, module = _parser_for(argv)
        args = parser.parse_args(argv)
        return module.run(args)
    except MoeEpError as error:
        print(f"moe-ep: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("moe-ep: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser_for(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser, with the arguments of the command that ``argv`` chooses, and that command's module."""
    chosen = argv[0] if argv else None
    parser = argparse.ArgumentParser(
        prog="moe-ep", description="Expert-parallel dispatch and combine for Mixture-of-Experts models."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, command in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=command.summary, add_help=False)
            continue
        module = importlib.import_module(command.module)
        module.add_arguments(
            commands.add_parser(
                name,
                help=command.summary,
                description=module.HELP,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser, module


if __name__ == "__main__":
    sys.exit(main())
