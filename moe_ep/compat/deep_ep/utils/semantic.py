"""Small words of the language."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def value_or(value: Value | None, default: Value) -> Value:
    """``value``, or ``default`` where it is None."""
    return default if value is None else value


def weak_lru(maxsize: int | None = 128, typed: bool = False) -> Callable[[Callable], Callable]:
    """functools.lru_cache for methods, which does not keep their objects alive."""

    def decorate(method: Callable) -> Callable:
        @functools.lru_cache(maxsize, typed)
        def remember(reference: weakref.ref, *args, **kwargs):
            return method(reference(), *args, **kwargs)

        @functools.wraps(method)
        def call(self, *args, **kwargs):
            return remember(weakref.ref(self), *args, **kwargs)

        return call

    return decorate
