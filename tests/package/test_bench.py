"""moe-ep bench: what it measures, prints and writes."""

import argparse
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moe_ep
from moe_ep import cli, launch, machine, testing
from moe_ep.bench import arguments, command, copy_engine, picture, table
from moe_ep.bench.copy_engine import CopyRate, best_rate
from moe_ep.bench.measure import Timing
from moe_ep.bench.nccl import AllToAllJob
from moe_ep.bench.permutation import permutation
from moe_ep.bench.plan import Sweep
from moe_ep.bench.results import Case, Measurement, Results
from moe_ep.bench.sweep import Bench
from moe_ep.bench.workload import Workload, busiest_rows, row_bytes
from moe_ep.errors import InvalidInput


def workload(**changes) -> Workload:
    sizes = dict(num_tokens=512, hidden=16, num_topk=2, num_experts=16, dtype="float32", layout="expert")
    return Workload(**{**sizes, "unbalanced_ratio": 1.0, **changes})


def test_two_ranks_print_a_ratio_and_write_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = ["--json", str(tmp_path / "a" / "bench.json"), "--png", str(tmp_path / "bench.png")]
    sizes = ["--num-tokens", "256", "--hidden", "64", "--iterations", "3", "--device", "cpu"]
    assert cli.main(["bench", "--backend", "collective", "--nproc", "2", *sizes, *paths]) == 0
    printed = capsys.readouterr().out
    assert "x the bare all_to_all_single calls" in printed
    assert "outside communication" in printed
    results = json.loads((tmp_path / "a" / "bench.json").read_text())
    ours = results["timings"]["dispatch"]["max_us"] + results["timings"]["combine"]["max_us"]
    bare = sum(results["timings"][f"all_to_all_single, as {op}"]["max_us"] for op in ("dispatch", "combine"))
    assert results["ratio"] == pytest.approx(ours / bare)
    assert f"{results['ratio']:.2f} x" in printed
    assert 0 < results["timings"]["combine"]["outside_us"] < results["timings"]["combine"]["max_us"]
    # Top-2 of 16 experts on 2 ranks: a token needs the other rank unless both its experts are here.
    expected = 256 * (1 - (7 / 15) * 0.5) * 64 * 4
    assert results["wire_bytes"] == pytest.approx(expected, rel=0.1)
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_one_rank_has_nothing_to_compare_with(capsys):
    sizes = ["--num-tokens", "64", "--hidden", "16", "--iterations", "2", "--device", "cpu"]
    assert cli.main(["bench", "--nproc", "1", *sizes]) == 0
    assert "nothing is sent" in capsys.readouterr().out


def test_routing_names_distinct_experts_and_is_balanced_by_default():
    ids = workload().topk_idx(rank=0, num_ranks=4)
    assert ids.shape == (512, 2) and (ids[:, 0] != ids[:, 1]).all()
    assert torch.bincount(ids.flatten() // 4, minlength=4).min() > 180


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_imbalance_is_what_was_asked_for(ratio):
    ids = workload(num_tokens=4096, unbalanced_ratio=ratio).topk_idx(rank=0, num_ranks=4)
    load = torch.bincount(ids.flatten() // 4, minlength=4)
    assert load[0] / load.float().mean() == pytest.approx(ratio, rel=0.03)


def test_pairs_by_rank_counts_tokens_once():
    ids = torch.tensor([[0, 1], [0, 15], [15, 14]])
    assert workload().pairs_by_rank(ids, 2) == [2, 2]


@pytest.mark.parametrize("changes", [{"num_topk": 17}, {"unbalanced_ratio": 0.5}, {"unbalanced_ratio": 9.0}])
def test_what_cannot_be_is_said(changes):
    with pytest.raises(InvalidInput, match="--"):
        workload(**changes).check(num_ranks=4)


def test_needs_no_rich_for_the_table(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    sizes = ["--num-tokens", "64", "--hidden", "16", "--iterations", "2", "--device", "cpu"]
    assert cli.main(["bench", "--nproc", "1", *sizes]) == 0
    assert "dispatch, cached handle" in capsys.readouterr().out


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(argv))


def test_gpu_defaults_are_deepseeks_shape_over_the_sms_there_are():
    sweep = arguments.sweep(parse(), available_sms=114)
    assert (sweep.hidden, sweep.num_topk, sweep.num_experts, sweep.expert_alignment) == (7168, 8, 256, 16)
    assert sweep.num_sms == (8, 16, 24, 32, 64) and sweep.num_tokens == (4096,)
    names = [str(case) for case in sweep.cases()]
    assert len(names) == 2 * 4  # two layouts; FP8 as it is and on the way, bfloat16, one combine
    assert "fp8 dispatch, quantise on the way, rank layout, 4096 tokens" in names
    assert "bfloat16 combine, expert layout, 4096 tokens" in names


def test_gpu_arguments_are_lists():
    args = parse("--num-sms", "auto,16", "--num-tokens", "128,4096", "--dtype", "float16", "--op", "combine")
    sweep = arguments.sweep(args, available_sms=132)
    assert sweep.num_sms == (None, 16)
    assert {str(case) for case in sweep.cases()} == {
        f"float16 combine, {layout} layout, {num_tokens} tokens"
        for layout in ("expert", "rank")
        for num_tokens in (128, 4096)
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-sms", "8"],
        ["--num-tokens", "1,2"],
        ["--dtype", "fp8"],
        ["--layout", "both"],
        ["--op", "combine"],
    ],
)
def test_what_only_kernels_have_is_refused_elsewhere(argv, capsys):
    assert cli.main(["bench", "--device", "cpu", *argv]) == 2
    assert "--backend nvlink" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--num-sms", "0"], ["--dtype", "int8"], ["--num-tokens", "x"]])
def test_bad_lists_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert argv[1] in capsys.readouterr().err


def test_nvlink_without_gpus_says_so(capsys):
    assert cli.main(["bench", "--backend", "nvlink", "--device", "cpu"]) == 2
    assert "needs a GPU for each" in capsys.readouterr().err


def test_machine_is_named():
    facts = machine.facts(torch.device("cpu"), "moe-ep bench --nproc 2")
    assert facts["torch"] == torch.__version__ and facts["command"] == "moe-ep bench --nproc 2"
    assert facts["device"].startswith("CPU") and len(facts["date"].split("-")) == 3
    assert machine.command_output(sys.executable, "-c", "print(1); print(2); print(1)") == "1, 2"
    assert "can't be run" in machine.command_output("/no/such/command")


def test_copy_engines_need_gpus():
    assert copy_engine.measure(torch.device("cpu")) == [] and best_rate([]) is None


def test_wire_bytes():
    assert row_bytes("bfloat16", 7168) == 14336
    assert row_bytes("fp8", 7168) == 7168 + 56 * 4
    assert busiest_rows([[9, 1, 2], [3, 9, 4], [5, 6, 9]]) == 11  # what rank 2 sends; it gets 6


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_all_to_all_does_the_same_job(num_ranks, layout):
    num_experts, hidden, alignment = 12, 256, 4 if layout == "expert" else 1
    shapes = Workload(40, hidden, 3, num_experts, "bfloat16", layout, 1.0)
    by_rank = [shapes.topk_idx(rank, num_ranks) for rank in range(num_ranks)]
    by_rank[-1][::3] = -1
    sent, barrier = [None] * num_ranks, threading.Barrier(num_ranks)

    def run(comm):
        def exchange(out, rows, out_counts, counts):
            sent[comm.rank] = rows.split(counts)
            barrier.wait(20)
            out.copy_(torch.cat([pieces[comm.rank] for pieces in sent]))
            barrier.wait(20)

        lists = permutation(by_rank, comm.rank, num_experts, layout, alignment)
        job = AllToAllJob(lists, torch.device("cpu"), exchange)
        torch.manual_seed(comm.rank)
        x = torch.randn(40, hidden).bfloat16()
        options = {"layout": layout, "expert_alignment": alignment}
        out = moe_ep.dispatch(x, by_rank[comm.rank], None, comm, **options)
        assert torch.equal(job.dispatch(x)[0], out.tokens)
        quantized = moe_ep.fp8.quantize(x)
        out_fp8 = moe_ep.dispatch(quantized, by_rank[comm.rank], None, comm, **options).tokens
        data, scale_inv = job.dispatch(quantized)
        assert torch.equal(data, out_fp8.data.view(torch.uint8)) and torch.equal(scale_inv, out_fp8.scale_inv)
        y = moe_ep.combine(out.tokens, out.handle)
        torch.testing.assert_close(job.combine(out.tokens), y, rtol=0.02, atol=0.05)
        return y.abs().sum()

    sizes = {"hidden": hidden, "max_tokens_per_rank": 40, "num_experts": num_experts, "num_topk": 3}
    assert all(total > 0 for total in testing.run_ranks(num_ranks, run, **sizes))


SMALL = Sweep(
    ops=("dispatch", "combine"),
    layouts=("expert", "rank"),
    dtypes=("fp8",),
    num_tokens=(64,),
    num_sms=(None, 4),
    hidden=256,
    num_topk=2,
    num_experts=8,
    expert_alignment=4,
    unbalanced_ratio=1.0,
    iterations=2,
)


def run_small_sweep(path: Path) -> None:
    rank, _ = launch.init_process_group("cpu")
    torch.set_num_threads(1)
    with torch.no_grad(), command.communicator(SMALL, "collective") as comm:
        results = Bench(SMALL, comm, torch.device("cpu")).run({"device": "test"})
    if rank == 0:
        path.write_text(results.to_json())
    dist.destroy_process_group()


def test_sweep_measures_every_case_beside_the_same_job(tmp_path):
    launch.spawn(run_small_sweep, 2, tmp_path / "results.json", timeout_s=120)
    results = Results.from_json((tmp_path / "results.json").read_text())
    assert results.ranks == 2 and results.cases == SMALL.cases()
    assert list(results.nccl) == results.cases
    expected = [(case, num_sms) for case in results.cases for num_sms in SMALL.num_sms]
    assert [(each.case, each.num_sms) for each in results.measurements] == expected
    for each in results.measurements:
        assert 0 < each.gpu.min_us <= each.gpu.median_us <= each.gpu.max_us
        assert each.host_us > 0 and each.wall_us > 0
        firsts = (each.first_gpu_us, each.first_wall_us, each.first_static_us)
        assert all(us is None if each.case.op == "combine" else us > 0 for us in firsts)
    fp8, bfloat16 = Case("dispatch", "rank", "fp8", 64), Case("combine", "rank", "bfloat16", 64)
    assert results.wire_bytes[fp8] / results.wire_bytes[bfloat16] == pytest.approx((256 + 8) / 512)


def synthetic_timing(num_tokens: int, num_sms: int) -> Timing:
    slowest = num_tokens / 40 + 400 / num_sms
    return Timing(slowest - 2, slowest - 1, slowest)


def synthetic_results(**changes) -> Results:
    """4 cases over 3 numbers of SMs and the library's choice; times are a pure function of them."""
    cases = [
        Case("dispatch", "rank", "fp8", num_tokens, quantize)
        for num_tokens in (512, 4096)
        for quantize in (False, True)
    ] + [Case("combine", "expert", "bfloat16", 4096)]
    measurements = [
        Measurement(
            case,
            num_sms,
            num_sms or 24,
            synthetic_timing(case.num_tokens, num_sms or 24),
            wall_us=200.0,
            host_us=20.0,
            first_gpu_us=150.0 if case.op == "dispatch" else None,
            first_wall_us=260.0 if case.op == "dispatch" else None,
            first_static_us=130.0 if case.op == "dispatch" else None,
        )
        for case in cases
        for num_sms in (8, 24, 132, None)
    ]
    results = Results(
        machine={
            "device": "a GPU",
            "torch": "2",
            "cuda": "13.0",
            "nccl": "2.28",
            "driver": "580",
            "date": "2026-01-01",
            "command": "moe-ep bench",
        },
        sizes={
            "hidden": 7168,
            "num_topk": 8,
            "num_experts": 256,
            "expert_alignment": 16,
            "unbalanced_ratio": 1.0,
            "weights": False,
        },
        ranks=2,
        backend="nvlink",
        iterations=30,
        copy_engine=[CopyRate(1 << 20, 10.0), CopyRate(1 << 26, 183.5)],
        wire_bytes={case: case.num_tokens * 7392.0 for case in cases},
        measurements=measurements,
        nccl={case: Timing(300.0, 310.0, 320.0) for case in cases},
    )
    return replace(results, **changes)


def test_json_gives_the_results_back():
    results = synthetic_results()
    assert Results.from_json(results.to_json()) == results
    first = json.loads(results.to_json())["cases"][0]
    assert first["floor_us"] == pytest.approx(512 * 7392 / best_rate(results.copy_engine) / 1e3)
    percent = first["measurements"][0]["gpu"]["percent_of_copy_engine"]
    assert percent == pytest.approx(100 * first["floor_us"] / first["measurements"][0]["gpu"]["max_us"])


def test_floor_is_at_the_best_copy_rate():
    results = synthetic_results()
    assert best_rate(results.copy_engine) == pytest.approx(365.7, rel=1e-3)
    case = Case("dispatch", "rank", "fp8", 4096)
    assert results.floor_us(case) == pytest.approx(82.8, rel=1e-2)
    assert results.percent_of_copy_engine(case, Timing(0, 0, 165.6)) == pytest.approx(50, rel=1e-2)
    assert synthetic_results(copy_engine=[]).floor_us(case) is None


@pytest.mark.parametrize("has_rich", [True, False])
def test_table_has_every_figure(has_rich, capsys, monkeypatch):
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich")
    table.print_results(synthetic_results())
    printed = capsys.readouterr().out
    for expected in (
        "a GPU",
        "driver 580",
        "366 (64 MiB)",
        "NCCL",
        "auto (24)",
        "quantise on the way",
        "119.1",
    ):
        assert expected in printed


@pytest.mark.parametrize("copy_engine", [[CopyRate(1 << 26, 183.5)], []])
def test_picture_is_drawn(copy_engine, tmp_path):
    pytest.importorskip("matplotlib")
    picture.write_picture(synthetic_results(copy_engine=copy_engine), tmp_path / "new" / "sweep.png")
    assert (tmp_path / "new" / "sweep.png").stat().st_size > 20_000
