"""The dispatcher by itself on two ranks; the cases are in megatron_dispatcher_cases.py."""

import re
from pathlib import Path

import pytest

CASES = re.findall(
    r"^@case\ndef (\w+)", Path(__file__).with_name("megatron_dispatcher_cases.py").read_text(), re.M
)


@pytest.fixture(scope="module")
def failures(on_cpu_ranks):
    return on_cpu_ranks(2, "megatron_dispatcher_cases.run_all")


@pytest.mark.parametrize("case", CASES)
def test_dispatcher(failures, case):
    for rank, by_case in enumerate(failures):
        assert by_case[case] is None, f"on rank {rank}:\n{by_case[case]}"
