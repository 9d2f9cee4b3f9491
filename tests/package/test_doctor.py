"""moe-ep doctor: the report, its two forms, and its verdicts."""

import json
import sys

import pytest
import torch

from moe_ep import cli, communicator, doctor, env, reference
from moe_ep.doctor import gpus, self_test, software, verdicts
from moe_ep.doctor.report import Fact


def test_json_parses_and_judges_every_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert set(report["verdicts"]) == set(communicator.BACKENDS) - {"auto"}
    assert all(verdict["text"] for verdict in report["verdicts"].values())
    assert report["verdicts"]["collective"]["runs"] and report["verdicts"]["virtual"]["runs"]
    names = {fact["name"].split("=")[0] for fact in report["facts"]}
    assert names >= {"Python", "torch", "nvcc", "moe_ep._C", "gloo", "NCCL", "symmetric memory"}
    assert names >= {variable.name for variable in env.VARIABLES}


@pytest.mark.parametrize("has_rich", [True, False])
def test_printed_report_names_everything(has_rich, capsys, monkeypatch):
    if has_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    report = doctor.examine()
    assert all(fact.name in printed for fact in report.facts)
    assert all(f"{name} " in printed for name in report.verdicts)


def test_a_wrong_result_is_found_and_reported(capsys, monkeypatch):
    right = reference.combine
    monkeypatch.setattr(reference, "combine", lambda *args: [sums + 1e-6 for sums in right(*args)])
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    self_test = next(fact for fact in report["facts"] if fact["section"] == "Self-test")
    assert self_test["ok"] is False and "sums of rank 1 differ" in self_test["text"]
    assert report["verdicts"]["virtual"]["runs"] is False


def test_missing_packages_come_with_their_use(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL_PACKAGES, "not_a_package_of_anyone", "nothing")
    (fact,) = [each for each in software.package_facts() if each.name == "not_a_package_of_anyone"]
    assert fact.text == "not installed" and fact.remedy == "install it for: nothing"


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\tN/A
GPU1\tNV18\t X \tPHB\tNODE\t0-47\t0\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\tN/A
NIC0\tPIX\tNODE\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def test_topology_is_read():
    links = gpus.parse_topology(TOPOLOGY)
    assert links[0, 1] == links[1, 0] == "NV18"
    assert links[0, 2] == "SYS" and links[1, 2] == "PHB" and len(links) == 9
    assert gpus.parse_topology("nvidia-smi can't be run: no such file") == {}


def test_connections_are_named_by_kind():
    assert gpus.describe_links({(0, 1): "NV18", (0, 2): "NV18"}) == "NVLink (18 links) between all pairs"
    mixed = gpus.describe_links({(0, 1): "NV4", (0, 2): "SYS", (1, 2): "SYS"})
    assert mixed == "NVLink (4 links): 0-1; PCIe (across NUMA nodes): 0-2, 1-2"


def test_gpus_are_found_by_uuid():
    assert gpus.parse_uuids("0, GPU-5bc1-77\n1, GPU-aa-b\nnot a line\n") == {"5bc1-77": 0, "aa-b": 1}


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_self_test_compares_on_any_number_of_ranks(num_ranks):
    for layout in reference.LAYOUTS:
        expected = self_test.expected_outcomes(num_ranks, layout)
        outcomes = self_test.testing.run_ranks(
            num_ranks,
            lambda comm: self_test.dispatch_and_combine(comm, layout, "cpu"),
            **self_test._sizes(num_ranks),
        )
        for rank in range(num_ranks):
            assert self_test.compare(outcomes[rank], expected[rank], rank, layout) == []
            tokens, weights, sums = expected[rank]
            if len(sums):
                changed = (tokens, weights, sums + 1)
                assert self_test.compare(outcomes[rank], changed, rank, layout) == [
                    f"{layout} layout: sums of rank {rank} differ"
                ]


def test_nvlink_verdicts(monkeypatch):
    tests = [Fact("Self-test", "on 2 GPUs", "equal", ok=True)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert not verdicts._nvlink([]).runs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(verdicts._extension, "load_for", lambda device: None)
    monkeypatch.setattr(verdicts, "unreachable_pairs", lambda: [(0, 1)])
    both = verdicts._nvlink(tests)
    assert not both.runs and "moe_ep._C" in both.text and "0 does not reach 1" in both.text
    monkeypatch.setattr(verdicts._extension, "load_for", lambda device: object())
    monkeypatch.setattr(verdicts, "unreachable_pairs", list)
    assert verdicts._nvlink(tests).runs
    failed = verdicts._nvlink([Fact("Self-test", "on 2 GPUs", "FAILED: sums differ", ok=False)])
    assert not failed.runs and "sums differ" in failed.text
