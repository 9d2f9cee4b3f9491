"""moe-ep bench --deep-ep, on CPUs: every call is made, and the results are whole."""

import json

import pytest

from moe_ep.cli import main

SIZES = [
    "--num-tokens",
    "16",
    "--hidden",
    "128",
    "--num-topk",
    "2",
    "--num-experts",
    "8",
    "--iterations",
    "1",
]


def test_every_call_is_compared(tmp_path, capsys):
    path = tmp_path / "deep_ep.json"
    assert main(["bench", "--deep-ep", "--device", "cpu", *SIZES, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    calls = {(row["interface"], row["call"], row["dtype"]) for row in results["calls"]}
    dispatches = {
        ("V2, expanded", f"dispatch, {kind}", d) for kind in ("first", "cached") for d in ("fp8", "bfloat16")
    }
    assert dispatches < calls and ("V1", "combine, weights", "bfloat16") in calls
    assert len(calls) == len(results["calls"])
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in results["calls"])
    assert results["sizes"]["num_tokens"] == 16
    assert "V2, plain" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--num-tokens", "16,32"], ["--num-sms", "auto"], ["--png", "x.png"]])
def test_what_it_does_not_take(arguments, capsys):
    assert main(["bench", "--deep-ep", "--device", "cpu", *arguments]) != 0
    assert arguments[0] in capsys.readouterr().err
