"""moe-ep train as a person meets it: Ctrl-C and going on, torchrun, and mistakes answered in a sentence."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import miniature
import pytest
from miniature import losses

import moe_ep
from moe_ep import cli
from moe_ep.recipes import presets
from moe_ep.recipes.checkpoint import latest_checkpoint, read_run

# The preset tiny at the sizes of miniature.MODEL.
SMALL = [
    *(
        "--threads",
        "1",
        "--device",
        "cpu",
        "--seq-len",
        "16",
        "--batch",
        "8",
        "--lr",
        "0.003",
        "--warmup",
        "4",
    ),
    *("--eval-every", "0", "--eval-windows", "5", "--checkpoint-every", "0"),
    *(
        part
        for field in (
            "num_layers",
            "hidden",
            "num_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "ffn_hidden",
            "num_experts",
        )
        for part in ("--set", f"{field}={getattr(miniature.MODEL, field)}")
    ),
]


@pytest.fixture
def text(tmp_path):
    return miniature.write_text(tmp_path / "text.txt")


@pytest.mark.slow
def test_interrupted_runs_go_on_where_they_stopped(tmp_path, text):
    out = tmp_path / "run"
    start = [
        "moe-ep",
        "train",
        *SMALL,
        "--nproc",
        "2",
        "--data",
        str(text),
        "--out",
        str(out),
        "--steps",
        "100000",
    ]

    # Ctrl-C in a terminal reaches the command and its ranks alike.
    code, shown = _interrupt(start, lambda process: os.killpg(process.pid, signal.SIGINT))
    first = _check_stopped(code, shown, out)

    # `kill PID` reaches the command alone. Started with the line that was printed.
    (command,) = re.findall(r"^ +(moe-ep train --resume .*)$", shown, flags=re.M)
    code, shown = _interrupt(shlex.split(command), lambda process: os.kill(process.pid, signal.SIGTERM))
    second = _check_stopped(code, shown, out)
    assert second > first and f"going on after step {first}" in shown

    # A run that is not disturbed ends, here on one rank.
    assert cli.main(["train", "--resume", str(out), "--nproc", "1", "--steps", str(second + 5)]) == 0
    assert list(losses(out)) == list(range(1, second + 6))
    assert {path.name for path in (out / "plots").iterdir()} == {"loss.png", "balance.png", "expert_load.png"}


@pytest.mark.slow
def test_torchrun_brings_the_ranks(tmp_path, text):
    out = tmp_path / "run"
    arguments = [
        "train",
        *SMALL,
        "--data",
        str(text),
        "--out",
        str(out),
        "--steps",
        "3",
        "--ep",
        "1",
        "--checkpoint-every",
        "3",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "moe_ep.cli", *arguments],
        env={**_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1  # rank 0 alone speaks
    assert "2 ranks" in done.stdout and "expert-parallel size 1" in done.stdout
    run = read_run(latest_checkpoint(out / "checkpoints"))
    assert (run["step"], run["world_size"], run["ep"]) == (3, 2, 1)


def test_settings_reach_the_run_and_stay_for_a_resume(tmp_path, text, capsys):
    out = tmp_path / "run"
    given = [*SMALL, "--nproc", "1", "--data", str(text), "--out", str(out), "--fp8"]
    given += ["--set", "fp8_backward=None", "--set", "moe_ffn_hidden=24"]
    given += ["--steps", "4", "--checkpoint-every", "4", "--seed", "3", "--accumulate", "2", "--beta2", "0.9"]
    assert cli.main(["train", *given]) == 0
    shown = capsys.readouterr().out
    assert "byte-bigram" in shown and "nats per byte" in shown and "FP8 blockwise in the experts" in shown
    config = read_run(latest_checkpoint(out / "checkpoints"))["config"]
    assert (config["seed"], config["accumulate"], config["beta2"], config["seq_len"]) == (3, 2, 0.9, 16)
    model = config["model"]
    assert (model["fp8"], model["fp8_experts"], model["expert_alignment"]) == ("blockwise", "blockwise", 16)
    assert (model["fp8_backward"], model["moe_ffn_hidden"], model["hidden"]) == (None, 24, 32)

    assert cli.main(["train", "--resume", "--out", str(out), "--nproc", "1", "--steps", "6"]) == 0
    shown = capsys.readouterr().out
    assert "going on after step 4" in shown and "note: steps was 4, now 6" in shown
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


def test_the_folder_is_numbered_and_found_again(tmp_path, text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        once = [
            "train",
            *SMALL,
            "--nproc",
            "1",
            "--data",
            "text.txt",
            "--steps",
            "2",
            "--checkpoint-every",
            "2",
        ]
        assert cli.main(once) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"tiny", "tiny-2"}
    assert cli.main(["train", "--resume", "--nproc", "1"]) == 0
    assert "writing to runs/tiny-2" in capsys.readouterr().out.split("going on")[0].splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "--nproc is 0"),
        (["--nproc", "3"], "--batch 8 is not a multiple of ranks x micro-batches = 3 x 1"),
        (["--nproc", "4", "--ep", "3"], "--ep 3 must divide the 4 ranks and the 8 experts"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--resume", "nowhere"], "nowhere has no complete checkpoint"),
        (["--set", "hidden"], "--set hidden: write FIELD=VALUE"),
        (["--set", "num_topk=20"], "num_topk"),
        (["--lr", "0"], "--lr is 0.0; it must be a number above 0"),
        (["--nproc", "1", "--set", "num_layers=9000", "--set", "hidden=65536"], "doesn't fit"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    resuming = arguments[0] == "--resume"
    assert cli.main(["train", *([] if resuming else SMALL), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert not Path("runs").exists()


def test_a_run_is_not_overwritten(tmp_path, text, capsys):
    out = tmp_path / "run"
    once = ["train", *SMALL, "--nproc", "1", "--data", str(text), "--out", str(out), "--steps", "1"]
    assert cli.main(once) == 0
    assert cli.main(once) == 2
    assert f"go on with --resume {out}" in capsys.readouterr().err


def test_help_names_every_setting_and_preset(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for word in (
        *presets.PRESETS,
        "--nproc",
        "--seq-len",
        "--fp8",
        "--resume",
        "--checkpoint-every",
        "--data",
        "--set",
    ):
        assert word in shown


def _interrupt(command, send) -> tuple[int, str]:
    """Start `command`, wait until it has trained some steps, `send(process)`; (exit code, all it printed)."""
    assert command[0] == "moe-ep"
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ep.cli", *command[1:]],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        shown = ""
        for line in process.stdout:
            shown += line
            if line.startswith("step"):
                break
        time.sleep(0.5)
        send(process)
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, shown + rest


def _check_stopped(code: int, shown: str, out: Path) -> int:
    """The step that a stopped run has saved and said; its metrics end there."""
    assert code == 130, shown
    assert "Traceback" not in shown, shown
    (step,) = re.findall(r"^stopped after step (\d+), saved in", shown, flags=re.M)
    assert read_run(latest_checkpoint(out / "checkpoints"))["step"] == int(step)
    assert max(losses(out)) == int(step)
    return int(step)


def _environment() -> dict[str, str]:
    """Finds this moe_ep in a checkout as well."""
    root = str(Path(moe_ep.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
