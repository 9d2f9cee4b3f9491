"""moe-ep bench --layer, small and on CPUs."""

import pytest

from moe_ep.bench import layer_report
from moe_ep.bench.layer import LayerResults, Row, Sizes
from moe_ep.cli import main

SIZES = {"num-tokens": 32, "hidden": 128, "ffn-hidden": 128, "num-experts": 4, "num-topk": 2}
SMALL = ["--layer", "--device", "cpu", *(text for n, size in SIZES.items() for text in (f"--{n}", str(size)))]


def test_on_two_cpu_ranks(tmp_path, capfd):
    json, png = tmp_path / "layer.json", tmp_path / "layer.png"
    files = ["--json", str(json), "--png", str(png)]
    assert main(["bench", *SMALL, "--nproc", "2", "--iterations", "1", *files]) == 0
    results = LayerResults.from_json(json.read_text())
    assert [row.name for row in results.rows] == [
        "moe_ep, bfloat16",
        "moe_ep, FP8",
        "moe_ep, FP8, weights kept in FP8",
        "moe_ep, FP8, shared expert too",
    ]
    assert results.ranks == 2 and results.left_out
    for row in results.rows:
        assert row.forward_ms > 0 and row.backward_ms > 0 and row.step_ms > 0
        for part in layer_report.PARTS:
            assert layer_report.part_ms(row.forward_parts, part) > 0
            assert layer_report.part_ms(row.backward_parts, part) > 0
    assert png.stat().st_size > 1000
    printed = capfd.readouterr().out
    assert "left out: they need a GPU" in printed and "experts.swiglu" in printed


def test_json_and_lines():
    row = Row("moe_ep, FP8", 1.0, 3.0, 3.2, 2.0, {"moe_ep.experts.matmul": 0.5}, {})
    machine = {"device": "CPU", "torch": "2", "date": "2026-01-01", "command": "moe-ep"}
    results = LayerResults(machine, Sizes(), 2, "nvlink", 5, [Row("first", 2.0, 6.0, 8.0, 4.0), row], [])
    assert LayerResults.from_json(results.to_json()) == results
    line = layer_report.lines(results)[1]
    assert line[:8] == ("moe_ep, FP8", "1.000", "3.000", "4.000", "2.00", "3.200", "2.50", "2.00")
    assert line[8:12] == ("0.000", "0.500", "0.000", "0.500")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "rank"], "--layout"),
        (["--num-tokens", "1,2"], "--num-tokens"),
        (["--num-experts", "5"], "--num-experts"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["bench", *SMALL, "--nproc", "2", *arguments]) != 0
    assert message in capsys.readouterr().err
