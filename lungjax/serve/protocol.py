"""A time limit for the head of a request, which uvicorn lacks: idle connections would otherwise stay open."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # for a request's line and headers


class HeadTimeoutProtocol(H11Protocol):
    """uvicorn's protocol; closes a connection whose request line and headers take longer than HEAD_SECONDS."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the timer."""
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Passes bytes on, and starts or stops the timer."""
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _update_timer(self) -> None:
        if self._awaits_head and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close_late)
        elif not self._awaits_head and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_late(self) -> None:
        self._timer = None
        if self._awaits_head:
            self.transport.close()
