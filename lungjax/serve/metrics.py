"""Prometheus metrics served at /metrics, in a separate registry. Labels never contain text from users."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Metrics of one service."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lungjax_requests", "Requests.", ("route", "status"), registry=registry)
        words = "From the first byte of a request to the last byte of its response."
        self.seconds = Histogram("lungjax_request_seconds", words, ("route",), buckets=SECONDS, registry=registry)
        self.images = Counter("lungjax_images", "Predicted images.", ("route",), registry=registry)
        self.refused = Counter("lungjax_refused", "Refused files and requests.", ("reason",), registry=registry)
        self.batches = Histogram("lungjax_batch_images", "Images per batch.", buckets=BATCHES, registry=registry)
        words = "Computation of one batch or one saliency map."
        self.device = Histogram("lungjax_device_seconds", words, ("kind",), buckets=SECONDS, registry=registry)
        self.waiting = Gauge("lungjax_queue_images", "Images waiting for the device.", registry=registry)
        self.running = Gauge("lungjax_running_requests", "Requests in progress.", registry=registry)
        self.upload_bytes = Gauge("lungjax_upload_bytes", "Bytes of uploads in memory.", registry=registry)
