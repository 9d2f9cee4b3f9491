"""What the recipes raise on purpose; the command line prints these without a traceback."""

from __future__ import annotations

from moe_ep.errors import MoeEpError


class RecipeError(MoeEpError):
    """A setting, a machine or a run folder that the training can't work with; the message says what to do."""


class DataError(RecipeError, ValueError):
    """The text asked for can't be read, or is too small for the run."""
