"""``moe-ep doctor``: what this machine can run, and what is missing for more, in words."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
import torch.distributed as dist

from . import gpus, self_test, software
from .report import Report, print_report
from .software import OPTIONAL_PACKAGES
from .verdicts import judge

__all__ = ["HELP", "OPTIONAL_PACKAGES", "add_arguments", "examine", "run"]

HELP = """Say in words what this machine can run, and what is missing for more.

Ends with tests of dispatch and combine against the reference, on virtual ranks of this process, and with GPUs on
one of them and on all; and with one verdict for each backend. The exit code is 0 if at least the CPU backends work
and nothing gives wrong results."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print_report(report)
    return 0 if report.healthy else 1


def examine() -> Report:
    """Look at the machine and run the self-tests (a second or two; with GPUs longer, since processes start)."""
    num_gpus = torch.cuda.device_count()
    virtual_tests = [self_test.virtual_fact()]
    process_tests = []
    if num_gpus:
        virtual_tests.append(self_test.virtual_gpu_fact())
        process_tests += self_test.process_facts(num_gpus)
    tests = [*virtual_tests, *process_tests]
    return Report(
        facts=[
            *software.facts(),
            *gpus.facts(),
            *software.kernel_facts(),
            *software.communication_facts(),
            *software.package_facts(),
            *software.variable_facts(),
            *tests,
        ],
        verdicts=judge(virtual_tests, process_tests),
        healthy=dist.is_available()
        and dist.is_gloo_available()
        and all(fact.ok is not False for fact in tests),
    )
