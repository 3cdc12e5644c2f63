"""Connections whose requests do not arrive, or whose answers come before all of the request did.

uvicorn waits for the rest of a request's head for ever. And it closes a connection while the client still sends, for
which the kernel resets it, and the client may lose the answer that it already had: so what still comes is read and
dropped for a moment, after the end of the answer was sent.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 15.0  # for a request's line and headers
STUCK = 30.0  # seconds that a client may leave an answer unread, which is held for it
LINGER = (2.0, 64 * 2**20)  # seconds and bytes that are read and dropped after an answer that came early


class Patient(H11Protocol):
    """uvicorn's protocol, which closes a connection if a request's head takes longer than SECONDS."""

    transport: Any  # `_Lingering`
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts to wait."""
        lingering: Any = _Lingering(transport, self)
        super().connection_made(lingering)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits on if these bytes were not a whole head."""
        if self.transport.lingers:
            self.transport.drop(len(data))
            return
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops to wait."""
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        self.transport.lost()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for the client to read its answer, but not for ever."""
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK, self.transport.abort)

    def resume_writing(self) -> None:
        """Goes on: it has read."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    @property
    def unread(self) -> bool:
        """Whether more of a request may come, or of what is none."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

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


class _Lingering:
    """A transport that, where its protocol has not read all, closes in two steps: first the sending side, then all."""

    def __init__(self, transport: Any, protocol: Patient) -> None:
        self._transport = transport
        self._protocol: Patient | None = protocol  # until the connection is gone
        self.lingers, self._dropped = False, 0
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is to be sent or answered."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Closes it, where something is unread in two steps."""
        if self.is_closing() or self._protocol is None:
            return
        if not self._protocol.unread:
            self._transport.close()
            return
        self.lingers = True
        self._end = self._protocol.loop.call_later(LINGER[0], self._transport.abort)
        try:
            self._transport.write_eof()
        except OSError:  # the client is gone
            self._transport.abort()
        self._transport.resume_reading()

    def drop(self, count: int) -> None:
        """Counts bytes that came after the answer."""
        self._dropped += count
        if self._dropped > LINGER[1]:
            self._transport.abort()

    def lost(self) -> None:
        """Ends the wait, and forgets the protocol: as a circle the two would stay until garbage is collected."""
        if self._end is not None:
            self._end.cancel()
        self._protocol = None
