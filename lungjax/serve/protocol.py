"""Limits on connections, which uvicorn lacks: idle ones would otherwise stay open until no descriptor is left."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # for a request's line and headers


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for request line and headers, and a maximum number of connections."""

    _timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    def __init__(self, *args: Any, max_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_connections = max_connections

    def connection_made(self, transport: Any) -> None:
        """Starts the timer; above the maximum, closes the longest idle connection, but none with an accepted upload."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._update_timer()
        if len(self.connections) > self._max_connections:
            connections: Any = self.connections
            others = (connection for connection in connections if not connection._computes)  # with this one
            oldest = min(others, key=lambda connection: connection._priority)
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Passes bytes on, and starts or stops the timer."""
        super().data_received(data)
        self._update_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection open for the response if the client stops sending after a complete request."""
        if self._awaits_head or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def on_response_complete(self) -> None:
        """Notes when the connection became idle."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _computes(self) -> bool:
        scope: Any = self.scope
        return not self._awaits_head and scope.get("lungjax", {}).get("accepted", False)

    @property
    def _priority(self) -> tuple[bool, float]:
        return self.transport.get_write_buffer_size() > 0, self._idle_since  # unread responses are lost last

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
