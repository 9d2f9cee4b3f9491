"""V2's services beside dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch

from . import all_gather
from .transport import Group, group_size, outside_autograd


class Services:
    """All-gather sessions, and what there is not. Subclasses have ``_sessions`` and ``_check_alive``."""

    _sessions: all_gather.AllGatherSessions

    def _check_alive(self) -> None:
        """Raise if the buffer is destroyed."""
        raise NotImplementedError

    @staticmethod
    def get_agrs_num_max_session_bytes(
        group: Group, shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> int:
        """Bytes of a session that gathers tensors of these shapes."""
        return all_gather.session_bytes(group_size(group), shapes, dtype)

    @staticmethod
    def get_agrs_buffer_size_hint(group: Group, num_max_session_bytes: int) -> int:
        """``num_bytes`` for a buffer with such sessions, in steps of 2 MiB."""
        return all_gather.buffer_bytes(num_max_session_bytes)

    def agrs_set_config(
        self, num_max_session_bytes: int, num_max_all_gathers_per_session: int = all_gather.MOST_TENSORS
    ) -> None:
        """Sizes of the sessions that follow. Collective."""
        self._check_alive()
        self._sessions.configure(num_max_session_bytes, num_max_all_gathers_per_session)

    def create_agrs_session(self) -> None:
        """Begin a session: its all-gathers fill the sessions' memory from the beginning."""
        self._check_alive()
        self._sessions.open()

    def destroy_agrs_session(self) -> None:
        """End the session, and with it the use of what it gathered."""
        self._sessions.close()

    def agrs_new_session(self, enabled: bool = True) -> AbstractContextManager[None]:
        """``with buffer.agrs_new_session(): ...``; does nothing if not ``enabled``."""
        self._check_alive()
        return self._sessions.session(enabled)

    def agrs_get_inplace_tensor(
        self, shape: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype
    ) -> torch.Tensor | list[torch.Tensor]:
        """A tensor to fill (or one for each shape), which `all_gather` need not copy."""
        return self._sessions.in_place(shape, dtype)

    @outside_autograd
    def all_gather(
        self, tensors: torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | Callable[[], None], ...]:
        """``(gathered [R, *shape], ..., handle)``; call ``handle()`` in the same session before they are used."""
        return self._sessions.gather(tensors)

    @staticmethod
    def get_engram_storage_size_hint(*_args: Any, **_options: Any) -> NoReturn:
        _refuse_engram()

    def engram_write(self, *_args: Any, **_options: Any) -> NoReturn:
        _refuse_engram()

    def engram_fetch(self, *_args: Any, **_options: Any) -> NoReturn:
        _refuse_engram()

    @staticmethod
    def get_pp_buffer_size_hint(*_args: Any, **_options: Any) -> NoReturn:
        _refuse_pipeline()

    def pp_set_config(self, *_args: Any, **_options: Any) -> NoReturn:
        _refuse_pipeline()

    def pp_send(self, *_args: Any, **_options: Any) -> NoReturn:
        _refuse_pipeline()

    def pp_recv(self, *_args: Any, **_options: Any) -> NoReturn:
        _refuse_pipeline()


def _refuse_engram() -> NoReturn:
    raise NotImplementedError("moe_ep does not fetch embeddings from other ranks (engram)")


def _refuse_pipeline() -> NoReturn:
    raise NotImplementedError(
        "moe_ep does not send between pipeline stages; use torch.distributed.send and recv"
    )
