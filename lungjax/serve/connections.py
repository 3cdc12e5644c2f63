"""Connections whose requests do not arrive: uvicorn waits for the rest of a request's head for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 15.0  # for a request's line and headers


class Patient(H11Protocol):
    """uvicorn's protocol, which closes a connection if a request's head takes longer than SECONDS."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts to wait."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits on if these bytes were not a whole head."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops to wait."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    @property
    def _headless(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if not self._headless and self._late is not None:
            self._late.cancel()
            self._late = None
        elif self._headless and self._late is None:
            self._late = self.loop.call_later(SECONDS, self._end)

    def _end(self) -> None:
        self._late = None
        if self._headless and not self.transport.is_closing():
            self.transport.close()
