"""moe-ep bench: what it measures, prints and writes."""

import json
import sys

import pytest
import torch

from moe_ep import cli
from moe_ep.bench.workload import Workload
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
