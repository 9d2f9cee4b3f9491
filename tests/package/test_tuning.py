"""moe-ep tune: the choice of SMs, the file, and looking a shape up in it."""

import argparse
import doctest
import json
import time
from types import SimpleNamespace

import pytest
import torch

from moe_ep import cli, tuning
from moe_ep.bench import tune_command
from moe_ep.bench.results import Case
from moe_ep.bench.tune import CALLS, Trial, Tuned, measure, smallest_near_best
from moe_ep.errors import InvalidInput
from moe_ep.tuning import Choice, Config

SHAPE = {"layout": "expert", "dtype": torch.bfloat16, "hidden": 7168, "num_ranks": 2}


def choice(**changes) -> Choice:
    values = {"op": "combine", "layout": "expert", "dtype": "bfloat16", "num_tokens": 4096}
    values |= {"hidden": 7168, "num_ranks": 2, "latency": 64, "throughput": 24}
    return Choice(**{**values, **changes})


@pytest.fixture
def config() -> Config:
    return Config(
        "a GPU",
        (
            choice(),
            choice(num_tokens=128, latency=16, throughput=4),
            choice(dtype="float8_e4m3fn", latency=32),
            choice(hidden=1024, latency=48),
        ),
    )


def test_file_gives_the_config_back(config, tmp_path):
    config.save(tmp_path / "new" / "tuning.json")
    assert Config.load(tmp_path / "new" / "tuning.json") == config
    assert Config.load(str(tmp_path / "new" / "tuning.json")) == config


@pytest.mark.parametrize(
    ("num_tokens", "overlapped", "num_sms"),
    [(4096, False, 64), (4096, True, 24), (100000, False, 64), (500, False, 16), (1, True, 4), (0, True, 4)],
)
def test_nearest_number_of_tokens_counts(config, num_tokens, overlapped, num_sms):
    assert config.num_sms(op="combine", num_tokens=num_tokens, overlapped=overlapped, **SHAPE) == num_sms


def test_nearest_hidden_counts(config):
    assert config.num_sms(op="combine", num_tokens=4096, **{**SHAPE, "hidden": 1500}) == 48
    assert config.num_sms(op="combine", num_tokens=4096, **{**SHAPE, "hidden": 5120}) == 64


def test_dtype_is_torchs_or_its_name_and_its_size_counts(config):
    for dtype in (torch.float8_e4m3fn, "float8_e4m3fn", "torch.float8_e4m3fn", torch.uint8):
        assert config.num_sms(op="combine", num_tokens=4096, **{**SHAPE, "dtype": dtype}) == 32


@pytest.mark.parametrize("changes", [{"layout": "rank"}, {"dtype": torch.float32}, {"num_ranks": 8}])
def test_nothing_fits_another_job(config, changes):
    assert config.num_sms(op="combine", num_tokens=4096, **{**SHAPE, **changes}) is None
    assert config.num_sms(op="dispatch", num_tokens=4096, **SHAPE) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "{", "Expecting"),
        (lambda content: "[]", "format is 'list'"),
        (lambda content: json.dumps({**content, "format": 7}), "format is 7; .* reads 1"),
        (lambda content: json.dumps({**content, "choices": 3}), "must be a list"),
        (
            lambda content: json.dumps({**content, "choices": [{"op": "combine"}]}),
            "choice 0 has op; it must have",
        ),
        (lambda content: json.dumps(with_choice(content, op="send")), "choice 0: op is 'send'"),
        (lambda content: json.dumps(with_choice(content, dtype="bf99")), "choice 0: dtype is 'bf99'"),
        (lambda content: json.dumps(with_choice(content, latency=0)), "choice 0: latency is 0"),
        (lambda content: json.dumps(with_choice(content, hidden=True)), "choice 0: hidden is True"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(config, change, message, tmp_path):
    path = tmp_path / "tuning.json"
    config.save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(InvalidInput, match=f"tuning.json: .*{message}"):
        Config.load(path)


def with_choice(content: dict, **changes) -> dict:
    return {**content, "choices": [{**content["choices"][0], **changes}]}


def test_example_in_the_documentation():
    failures, examples = doctest.testmod(tuning)
    assert examples and not failures


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.json can't be read.*moe-ep tune"):
        Config.load(tmp_path / "none.json")


def test_smallest_of_the_fast_ones_is_chosen():
    assert smallest_near_best({8: 200.0, 16: 101.9, 24: 100.0, 132: 100.5}) == 16
    assert smallest_near_best({8: 200.0, 16: 102.1, 24: 100.0, 132: 100.5}) == 24


def synthetic_sweep() -> Tuned:
    trials = (
        Trial(8, 300.0, 2100.0),
        Trial(16, 150.0, 1600.0),
        Trial(24, 110.0, 1620.0),
        Trial(64, 95.0, 1900.0),
    )
    return Tuned(Case("dispatch", "expert", "fp8", 4096), trials, compute_us=1520.0)


def test_policies_differ():
    tuned = synthetic_sweep()
    assert (tuned.latency, tuned.throughput) == (64, 16)
    assert tuned.choice(hidden=7168, num_ranks=2) == Choice(
        "dispatch", "expert", "float8_e4m3fn", 4096, 7168, 2, latency=64, throughput=16
    )


def test_report_marks_the_chosen(capsys):
    tune_command.report([synthetic_sweep()], "2 ranks, a GPU", 4.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 ranks, a GPU"
    (chosen,) = [line for line in lines if "throughput" in line and "1600.0" in line]
    assert "latency" not in chosen
    assert any("latency" in line and "1900.0" in line for line in lines)


def test_trials_time_calls_alone_and_beside():
    """On one rank of a CPU, where a call takes as long as its number of SMs says."""
    seconds = {1: 0.004, 2: 0.001}
    calls = dict.fromkeys(seconds, 0)

    def cached(case, num_sms):
        def call(i):
            calls[num_sms] += 1
            time.sleep(seconds[num_sms])

        return call

    skipped = Case("dispatch", "rank", "fp8", 1, quantize=True)
    jobs = SimpleNamespace(cases=[Case("combine", "rank", "bfloat16", 1), skipped], cached=cached)
    (tuned,) = measure([jobs], [1, 2], 0.5, 3, torch.device("cpu"), None)
    slow, fast = tuned.trials
    assert (slow.num_sms, fast.num_sms) == (1, 2)
    assert slow.call_us > 4000 and fast.call_us > 1000 and slow.call_us > fast.call_us
    assert slow.both_us > CALLS * 4000 and fast.both_us > CALLS * 1000
    assert tuned.latency == tuned.throughput == 2
    assert calls[1] == calls[2] == (3 + 5) * (1 + CALLS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nproc", "64"], "needs a GPU for each of --nproc 64"),
        (["--compute-ratio", "0"], "--compute-ratio is 0"),
        (["--num-sms", "8,auto"], "can't be tuned"),
    ],
)
def test_what_cannot_be_is_said(argv, message, capsys):
    assert cli.main(["tune", *argv]) == 2
    assert message in capsys.readouterr().err


def test_sizes_are_those_of_the_bench():
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    args = parser.parse_args(["--op", "combine", "--layout", "rank", "--dtype", "bfloat16"])
    sweep = tune_command.arguments.sweep(args, 132, tune_command.SMS)
    assert [str(case) for case in sweep.cases()] == ["bfloat16 combine, rank layout, 4096 tokens"]
    assert sweep.num_sms == tune_command.SMS
