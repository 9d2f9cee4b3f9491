"""moe-ep doctor: the report, its two forms, and its verdicts."""

import json
import sys

import pytest

from moe_ep import cli, communicator, doctor, env, reference


def test_json_parses_and_judges_every_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert set(report["verdicts"]) == set(communicator.BACKENDS) - {"auto"}
    assert all(verdict["runs"] and verdict["text"] for verdict in report["verdicts"].values())
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
    (self_test,) = [fact for fact in report["facts"] if fact["section"] == "Self-test"]
    assert self_test["ok"] is False and "sums of rank 1 differ" in self_test["text"]
    assert report["verdicts"]["virtual"]["runs"] is False


def test_missing_packages_come_with_their_use(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL_PACKAGES, "not_a_package_of_anyone", "nothing")
    (fact,) = [each for each in doctor._packages() if each.name == "not_a_package_of_anyone"]
    assert fact.text == "not installed" and fact.remedy == "install it for: nothing"
