"""Connections with slow requests, slow readers, and answers that are sent before the complete request arrived.

uvicorn waits for the end of a request's head without a limit. It also closes a connection while the client is still
sending; the kernel then resets it, and the client may lose the answer. Here, after the end of the answer, the remaining
bytes are read and dropped for a moment.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0  # for a request's line and headers
STUCK_SECONDS = 30.0  # for a client that does not read its answer
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 * 2**20  # that are read and dropped after an early answer


class LingeringProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for a request's head and for reading an answer, and a lingering close."""

    transport: Any  # `_LingeringTransport`
    _head_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the timer of the head."""
        lingering: Any = _LingeringTransport(transport, self)
        super().connection_made(lingering)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        """Drops bytes after the answer, or passes them on."""
        if self.transport.lingers:
            self.transport.drop(len(data))
            return
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        for timer in (self._head_timer, self._stuck_timer):
            if timer is not None:
                timer.cancel()
        self.transport.lost()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the timer of a client that does not read its answer."""
        super().pause_writing()
        self._stuck_timer = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops that timer."""
        super().resume_writing()
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()

    @property
    def unread(self) -> bool:
        """Whether more of a request, valid or not, may arrive."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _update_timer(self) -> None:
        if not self._awaits_head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._awaits_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def _close_late(self) -> None:
        self._head_timer = None
        if self._awaits_head and not self.transport.is_closing():
            self.transport.close()


class _LingeringTransport:
    """A transport that closes in two steps if its protocol has not read everything: the sending side, then all."""

    def __init__(self, transport: Any, protocol: LingeringProtocol) -> None:
        self._transport = transport
        self._protocol: LingeringProtocol | None = protocol  # until the connection is lost
        self.lingers, self._dropped = False, 0
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more will be sent."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Closes the connection, in two steps if something is unread."""
        if self.is_closing() or self._protocol is None:
            return
        if not self._protocol.unread:
            self._transport.close()
            return
        self.lingers = True
        self._timer = self._protocol.loop.call_later(LINGER_SECONDS, self._transport.abort)
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone
            self._transport.abort()
        self._transport.resume_reading()

    def drop(self, count: int) -> None:
        """Counts bytes after the answer; aborts above LINGER_BYTES."""
        self._dropped += count
        if self._dropped > LINGER_BYTES:
            self._transport.abort()

    def lost(self) -> None:
        """Stops the timer and drops the reference to the protocol, which would keep both alive as a cycle."""
        if self._timer is not None:
            self._timer.cancel()
        self._protocol = None
