"""Settings of the service: its limits, and who may use it."""

from dataclasses import dataclass, field

from lungjax.serve.uploads import MIB, Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Settings of the service."""

    host: str = "127.0.0.1"  # address to listen on
    names: tuple[str, ...] = ()  # further accepted Host headers
    token: str = field(default="", repr=False)  # "" for none
    file: Limits = field(default_factory=Limits)
    request_bytes: int = 256 * MIB
    upload_bytes: int = 512 * MIB  # in memory, of all requests
    files: int = 64  # per request
    requests: int = 128  # in progress
    connections: int = 1024  # open
    queue: int = 256  # images that wait for the device
    explains: int = 32  # saliency maps that wait for the device
    read_seconds: float = 10.0  # to receive a body, plus one second for each 64 KiB
    seconds: float = 60.0  # to decode a request and compute its response

    @property
    def public(self) -> bool:
        """Whether other machines can reach the service."""
        return self.host not in LOOPBACK and not self.host.startswith("127.")

    @property
    def request_pixels(self) -> int:
        """The maximum number of pixels of all files of a request."""
        return 4 * self.file.pixels

    def limits(self) -> dict[str, int | float]:
        """Returns the limits that /model reports to clients."""
        own = {name: getattr(self, name) for name in ("files", "request_bytes", "request_pixels", "seconds")}
        of_files = {name: getattr(self.file, name) for name in ("pixels", "min_side", "frames")}
        return own | of_files | {"file_bytes": self.file.bytes}
