"""What the service allows."""

from dataclasses import dataclass, field

from lungjax.serve.uploads import MIB, Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits, and who may ask."""

    host: str = "127.0.0.1"  # the address it is bound to
    names: tuple[str, ...] = ()  # further names by which it may be called
    token: str = field(default="", repr=False)  # "" for none
    file: Limits = field(default_factory=Limits)
    request_bytes: int = 256 * MIB
    held_bytes: int = 512 * MIB  # of all requests that are being read or answered
    files: int = 64  # of one request
    requests: int = 128  # that are being read or answered
    queue: int = 256  # images that wait for the device
    explains: int = 32  # heat maps that wait for the device
    read_seconds: float = 10.0  # for a body, and one more for each 64 KiB of it
    seconds: float = 60.0  # to decode and compute one request

    @property
    def open_to_others(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in LOOPBACK and not self.host.startswith("127.")

    def limits(self) -> dict[str, int | float]:
        """Returns what a client should know, as /model has it."""
        return {
            "files": self.files,
            "file_bytes": self.file.bytes,
            "request_bytes": self.request_bytes,
            "pixels": self.file.pixels,
            "side": self.file.side,
            "least_side": self.file.least,
            "seconds": self.seconds,
        }
