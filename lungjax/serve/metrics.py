"""What /metrics counts, in a registry of its own. No label ever has a word of a user's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Meters:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("lungjax_requests", "Requests by route and status.", ("route", "status"), registry=to)
        words = "From a request's first byte to its answer's last."
        self.seconds = Histogram("lungjax_request_seconds", words, ("route",), buckets=SECONDS, registry=to)
        self.images = Counter("lungjax_images", "Images answered.", ("route",), registry=to)
        self.refused = Counter("lungjax_refused", "Files and requests refused, by reason.", ("reason",), registry=to)
        self.batches = Histogram("lungjax_batch_images", "Images computed at once.", buckets=BATCHES, registry=to)
        words = "Computing one batch or one heat map."
        self.device = Histogram("lungjax_device_seconds", words, ("kind",), buckets=SECONDS, registry=to)
        self.waiting = Gauge("lungjax_queue_images", "Images that wait for the device.", registry=to)
        self.running = Gauge("lungjax_running_requests", "Requests that are being read or answered.", registry=to)
        self.held = Gauge("lungjax_held_bytes", "Bytes of uploads in memory.", registry=to)

    def page(self) -> bytes:
        """Returns them in Prometheus' text format."""
        return generate_latest(self.registry)
