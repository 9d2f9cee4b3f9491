"""`--set FIELD=VALUE`: any field of ModelConfig from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from moe_ep.layers import ModelConfig

from .config import TrainConfig, with_model
from .errors import RecipeError

_MODES = ("fp8", "fp8_backward", "fp8_experts", "fp8_shared")  # None or a word
_WORDS = {"None": "null", "True": "true", "False": "false"}


def add_model_settings(parser: argparse._ActionsContainer) -> None:
    """The option; its values are `args.model_settings`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="model_settings",
        help="a field of moe_ep.layers.ModelConfig, for example --set num_experts=32 (may be repeated)",
    )


def with_model_settings(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """`config` with each "FIELD=VALUE" set in its model. Raises RecipeError, or InvalidInput for a bad value."""
    changes = dict(_parse(text) for text in settings)
    return with_model(config, **changes) if changes else config


def _parse(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    if not equals or name not in fields:
        raise RecipeError(f"--set {text}: write FIELD=VALUE; the fields are {', '.join(fields)}")
    try:
        parsed = json.loads(_WORDS.get(value, value))
    except json.JSONDecodeError:
        parsed = value
    # A word is only right where the field holds words, as in score_function=softmax.
    default = fields[name].default
    if isinstance(parsed, str) and not isinstance(default, str) and name not in _MODES:
        raise RecipeError(f"--set {text}: {value!r} is no number; the default is {default!r}")
    return name, parsed
