from lungjax.config import Config, EvalConfig, InputSpec
from lungjax.models.inputs import CPU_BATCH, prediction_batch_size


def test_batch_size_by_pixels_platform_and_devices():
    for platform, devices, size, expected in (
        ("cpu", 1, (224, 224), CPU_BATCH),
        ("cpu", 4, (600, 600), 4 * CPU_BATCH),
        ("gpu", 1, (224, 224), 64),
        ("tpu", 8, (224, 224), 8 * 64),
        ("gpu", 1, (32, 32), 256),
        ("gpu", 2, (448, 224), 2 * 32),
        ("gpu", 1, (256, 256), 48),  # 49 fit: a multiple of eight
        ("gpu", 3, (800, 800), 3 * 5),
        ("gpu", 3, (4000, 4000), 3),
    ):
        config = Config(input=InputSpec(size=size))
        assert prediction_batch_size(config, devices, platform) == expected, (platform, devices, size)
        fixed = Config(input=InputSpec(size=size), eval=EvalConfig(batch_size=12))
        assert prediction_batch_size(fixed, devices, platform) == 12
