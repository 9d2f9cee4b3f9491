"""moe-ep bench --overlap: what it measures, prints and draws."""

import json

import pytest

from moe_ep import cli
from moe_ep.bench import lanes, overlap, overlap_report
from moe_ep.bench.overlap import Beside, Hidden, Run

PIECES = [
    "shared expert",
    "chunked layer, n = 2",
    "chunked layer, n = 3",
    "chunked layer, n = 4",
    "two micro-batches",
    "step of 2 micro-batches",
    "step of 4 micro-batches",
]


def run(us, communication_us, experts_us=100.0):
    return Run(us, 1.0, communication_us, experts_us, peak_bytes=1 << 30)


def test_efficiency_is_the_share_that_is_hidden():
    hidden = Hidden("x", 8, run(1000, 200), run(1200, 400), run(850, 390, 110), beside_us=800)
    assert hidden.efficiency == pytest.approx((1000 - 850) / 200)
    assert hidden.efficiency_in_turn == pytest.approx((1200 - 850) / 400)
    assert hidden.experts_slower == pytest.approx(0.1)
    short = Hidden("x", 8, run(1000, 200), run(1200, 400), run(950, 390), beside_us=60)
    assert short.efficiency == pytest.approx((1000 - 950) / 60)
    nothing = Hidden("x", 8, run(1000, 0, 0), run(1000, 0), run(1000, 0), beside_us=1000)
    assert nothing.efficiency is None and nothing.experts_slower is None


def test_communication_is_what_a_call_takes_on_the_rank_that_comes_last(monkeypatch):
    ranks = [
        overlap._Samples([900, 1000, 980], [[30, 50], [31, 52], [29, 49]], [400, 410, 420], 5),
        overlap._Samples([800, 810, 805], [[90, 20], [91, 22], [89, 19]], [300, 310, 320], 6),
    ]
    monkeypatch.setattr(overlap, "gather", lambda _: ranks)
    assert ranks[0].over_ranks() == Run(980, 100, communication_us=50, experts_us=410, peak_bytes=6)


def test_what_a_call_costs_the_experts():
    beside = Beside(8, alone_us=1000, beside_us=1200, call_alone_us=250, call_beside_us=300)  # four calls
    assert beside.slower == pytest.approx(0.2) and beside.lost_us == pytest.approx(200 / 4)


@pytest.mark.slow
def test_two_ranks_print_a_table_and_write_a_trace_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "a" / name for name in ("trace.json", "lanes.png", "results.json")}
    options = ["--trace", files["trace.json"], "--png", files["lanes.png"], "--json", files["results.json"]]
    sizes = ["--num-tokens", "16", "--hidden", "32", "--iterations", "1", "--num-sms", "8"]
    options += ["--layout", "rank"]
    command = ["bench", "--overlap", "--nproc", "2", "--device", "cpu", *sizes, *map(str, options)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "2 ranks, collective" in printed and "rank layout" in printed and overlap_report.LEGEND in printed

    results = json.loads(files["results.json"].read_text())
    assert [each["piece"] for each in results["hidden"]] == PIECES
    assert [each["num_sms"] for each in results["hidden"]] == [8] * len(PIECES)
    for each in results["hidden"]:
        assert 0 < each["plain"]["communication_us"] and 0 < each["overlapped"]["experts_us"]

    events = json.loads(files["trace.json"].read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X" and event["pid"] == 1}
    assert {
        "[chunked layer, n = 3, 8 SMs]",
        "[two micro-batches, 8 SMs]",
        "attention.backward",
        "weight gradients",
    } < names
    assert {"moe_ep.dispatch", "moe_ep.combine.backward", "moe_ep.experts.matmul.wgrad"} < names
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    assert {"rank 0", "rank 1", "computation"} <= {
        event["args"]["name"] for event in events if event["ph"] == "M"
    }
    assert files["lanes.png"].stat().st_size > 10_000


def test_trace_has_a_lane_for_each_stream(tmp_path):
    spans = [
        {"name": "experts", "stream": 0, "begin_us": 1.0, "end_us": 3.0},
        {"name": "moe_ep.combine", "stream": 1, "begin_us": 2.0, "end_us": 2.5},
    ]
    lanes.write_trace([spans], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {0: "computation", 1: "communication"}
    [combine] = [event for event in events if event["name"] == "moe_ep.combine"]
    assert (combine["tid"], combine["ts"], combine["dur"]) == (1, 2.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "t.json"], "--trace shows the streams of --overlap"),
        (["--overlap", "--op", "combine"], "--op is a choice of the sweep"),
        (["--overlap", "--layout", "both"], "--layout both is a choice of the sweep"),
        (["--overlap", "--num-experts", "3"], "--num-experts 3 is no multiple of the 2 ranks"),
    ],
)
def test_what_cannot_be_is_said(options, message, capfd):
    assert cli.main(["bench", "--device", "cpu", *options]) != 0
    assert message in capfd.readouterr().err
