"""Where and when something was measured."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import date
from typing import Any

import torch


def facts(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """What a figure can't be read without; ``command`` is the one that was typed, this process's if not given."""
    on_gpu = device.type == "cuda"
    return dict(
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        driver=driver_version() if on_gpu else None,
        date=date.today().isoformat(),
        command=command_line() if command is None else command,
    )


def command_line() -> str:
    return shlex.join(["moe-ep", *sys.argv[1:]])


def driver_version() -> str:
    return command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def command_output(*command: str, separator: str = ", ") -> str:
    """What a command prints, each different line once; or why it can't be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} can't be run: {error}"
    return separator.join(dict.fromkeys((done.stdout or done.stderr).strip().splitlines()))
