"""The one place that reads the ``MOE_EP_*`` environment variables."""

from __future__ import annotations

import os
from typing import NamedTuple

from .errors import InvalidInput


class Variable(NamedTuple):
    name: str
    default: str
    meaning: str

    @property
    def current(self) -> str:
        return os.environ.get(self.name, self.default)


BACKEND = Variable(
    "MOE_EP_BACKEND",
    "auto",
    "backend of communicators made with backend='auto': auto, collective, nvlink or virtual",
)
EXTENSION = Variable(
    "MOE_EP_EXTENSION", "1", "0: ignore the compiled modules and use plain torch for everything"
)

CHECK = Variable(
    "MOE_EP_CHECK",
    "0",
    "1: check expert ids on the host in every dispatch, also where that makes it wait for the GPU",
)
CONFIG = Variable(
    "MOE_EP_CONFIG", "", "file that `moe-ep tune` wrote, for communicators made without config="
)

VARIABLES = [BACKEND, EXTENSION, CHECK, CONFIG]


def _flag(variable: Variable) -> bool:
    value = variable.current
    if value not in ("0", "1"):
        raise InvalidInput(f"environment variable {variable.name} is {value!r}; allowed are 0 and 1")
    return value == "1"


def backend() -> str:
    return BACKEND.current


def extension() -> bool:
    return _flag(EXTENSION)


def check() -> bool:
    return _flag(CHECK)


def config() -> str | None:
    return CONFIG.current or None
