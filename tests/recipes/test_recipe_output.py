"""What a run leaves and shows: metrics, pictures, progress, the way to go on."""

import io
import json
import math

import miniature
import pytest
from miniature import MODEL

from moe_ep.errors import ReceiveOverflowError
from moe_ep.recipes.config import with_model
from moe_ep.recipes.metrics import METRICS_FILE, MetricsLog, read_metrics
from moe_ep.recipes.plots import draw_plots
from moe_ep.recipes.presets import get_preset
from moe_ep.recipes.progress import LiveProgress, PlainProgress, SilentProgress, make_progress
from moe_ep.recipes.summary import describe_result, number, resume_command
from moe_ep.recipes.train import train

VALUES = {"loss": 2.5, "lr": 1e-3, "tokens_per_s": 12345.0, "balance": 1.25}


def test_metrics_are_one_json_object_a_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", step=1, loss=float("nan"), load=[[1.0, math.inf]])
    log.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "step": 1, "loss": None, "load": [[1.0, None]]}


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.write("train", step=step, loss=float(step))
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # the process died here
    log = MetricsLog(tmp_path, resume_step=3, tensorboard=False)
    log.write("train", step=4, loss=40.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / METRICS_FILE)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write("train", step=step, loss=step / 2, load=[[1.0]])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


def test_pictures_show_something(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    log = MetricsLog(tmp_path, tensorboard=False)
    log.write("run", step=0, preset="tiny", parameters=10**6, world_size=4, ep=4, bigram_loss=2.4)
    for step in range(1, 41):
        load = [[0.1, 1.9, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
        log.write("train", step=step, loss=5 / step + 2, balance=1 + 1 / step, load=load)
    log.write("valid", step=40, loss=2.2)
    log.close()
    paths = draw_plots(tmp_path)
    assert [path.name for path in paths] == ["loss.png", "balance.png", "expert_load.png"]
    for path in paths:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 800
        assert pixels[..., :3].std() > 0.03  # not blank
    # The overloaded expert is red, the idle one blue.
    load = image.imread(paths[2])
    red, blue = load[..., 0] - load[..., 2] > 0.4, load[..., 2] - load[..., 0] > 0.4
    assert red.mean() > 0.02 and blue.mean() > 0.02


def test_no_records_no_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    MetricsLog(tmp_path, tensorboard=False).close()
    assert draw_plots(tmp_path) == []


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    with make_progress(300, 0, rank=0, stream=stream) as progress:
        assert isinstance(progress, PlainProgress)
        for step in range(1, 301):
            progress.step(step, VALUES)
        progress.say("done")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step   1/300  loss 2.5000  12.3 k tokens/s  balance 1.25")
    assert lines[-2].startswith("step 300/300") and lines[-1] == "done"
    assert len(lines) == 3  # one every five seconds, and these steps took none


def test_only_rank_0_speaks(capsys):
    with make_progress(3, 0, rank=1) as progress:
        progress.step(1, VALUES)
        progress.say("nothing")
    assert type(progress) is SilentProgress and capsys.readouterr().out == ""


def test_live_line_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with make_progress(10, 0, rank=0) as progress:
        assert isinstance(progress, LiveProgress)
        progress.step(1, VALUES)
        progress.say("a line that stays")
        progress.step(10, VALUES)
    shown = stream.getvalue()
    assert "a line that stays" in shown and "12.3 k tok/s" in shown and "2.500" in shown


def test_result_names_both_losses_in_three_units():
    lines = describe_result(math.log(4), math.log(8), [0, 200], get_preset("tiny"))
    assert lines[0] == "on 256 held-out bytes:"
    assert "byte-bigram" in lines[1] and "3.000 bits per byte, perplexity 8.00" in lines[1]
    assert "validation loss" in lines[2] and "2.000 bits per byte, perplexity 4.00" in lines[2]


def test_resume_command(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert resume_command(tmp_path / "my run", 4) == f"moe-ep train --resume '{tmp_path}/my run' --nproc 4"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = resume_command(tmp_path, 4)
    assert command == f"torchrun --nnodes 2 --nproc-per-node 2 -m moe_ep.cli train --resume {tmp_path}"


def test_number():
    assert [number(v) for v in (999, 1_662_848, 682.6e9)] == ["999", "1.66 M", "683 B"]


def test_a_run_ends_where_rows_would_be_lost(tmp_path):
    config = miniature.miniature(miniature.write_text(tmp_path / "text.txt"), steps=2)
    train(with_model(config, max_recv_rows=128 * MODEL.num_topk), tmp_path / "room")
    with pytest.raises(ReceiveOverflowError, match="max_recv_rows=64"):
        train(with_model(config, max_recv_rows=64), tmp_path / "none")
