"""The experiments of the studies against their published numbers."""

import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lungjax import config as configs
from lungjax import models
from lungjax.config import PROTOCOLS, experiments
from lungjax.models import outputs, trees
from lungjax.models.inputs import normalize
from lungjax.training import optim, program
from lungjax.weights import load

XRAY = ("xray_cnn", "mobilenetv2", "resnet101v2", "densenet201", "vgg16", "resnet18")
CBR = ("simple", "cbr_tiny", "cbr_small", "cbr_largew", "cbr_larget", "cbr_larget_study")
EFFICIENTNETS = ("efficientnet_b0", "efficientnet_b3", "efficientnet_b7")
STAGES = ("original", "nobackg", "crop", "lungs_nocrop", "lungs")
TORCH = ("vgg16", "vgg19", "resnet50", "resnet101", "resnet152", "densenet121", "densenet161", "densenet201")
VERSIONS = ("1", "2a", "2b", "3a", "3b")
# Parameters of each network of iCTCF with the study's top: all of them, and without running statistics.
ICTCF = {
    "efficientnetv2_b0": (5_927_699, 5_864_531), "efficientnetv2_b1": (6_939_511, 6_865_879),
    "efficientnetv2_b2": (8_778_657, 8_693_553), "convnext_tiny": (27_822_435, 27_820_899),
    "convnext_small": (49_456_995, 49_455_459), "convnext_base": (87_569_539, 87_567_491),
    "resnet50v2": (23_572_867, 23_523_331), "resnet101v2": (42_634_627, 42_532_867),
    "resnet152v2": (58_339_715, 58_191_875),
}  # fmt: skip
BOTH = {"protocol": PROTOCOLS}


def choices(name, **arguments):
    """Every combination of the arguments as --experiment would have it."""
    for values in itertools.product(*arguments.values()):
        yield f"{name}:" + ",".join(f"{key}={value}" for key, value in zip(arguments, values, strict=True))


def grid():
    options = {"images": STAGES, "class_weight": (False, True), "augment": (False, True), **BOTH}
    yield from choices("nccid_whole_lung", **BOTH)
    yield from choices("ct_cov19", model=(*CBR, "bit_r50x1"), **options)
    yield from choices("ct_cov19", model=EFFICIENTNETS, weights=("imagenet", "none"), **options)
    yield from choices("ictcf", model=ICTCF, **BOTH)
    yield from choices("covid_xray", model=XRAY, **BOTH)
    yield from choices("covidx_ct", model=TORCH, unfreeze=range(5), version=VERSIONS, protocol=("clean",))
    yield from choices("covidx_ct", model=TORCH, unfreeze=range(5), version=("2a", "3a"), protocol=("study",))
    networks = {"model": ("resnet50", "convnext_tiny"), "weights": ("none", "imagenet", "run:runs/a", "run:runs/A")}
    yield from choices("covidnet_ct", version=VERSIONS, **networks, **BOTH)
    yield from choices("effnetv2_covidxct", version=("2a", "3a"), **networks, **BOTH)
    starts = ("random", "imagenet", "run:runs/a", "meanvar:imagenet", "meanvar:run:runs/a")
    yield from choices("transfusion", model=("cbr_tiny", "resnet50"), start=starts, dataset=("folder", "ict/x"), **BOTH)


def test_every_combination_has_a_unique_name():
    """All combinations are valid, with unique names that can be folder names."""
    seen = {}
    for choice in grid():
        config = experiments.load(choice)
        configs.check(config)
        assert config.name not in seen, (choice, seen[config.name])
        seen[config.name] = choice
        name, _, arguments = choice.partition(":")
        assert re.fullmatch("[a-z0-9_-]+", config.name) and config.name.startswith(name)
        assert config.name.endswith("_study") == ("protocol=study" in arguments)
    assert len(seen) == 2 + 520 + 18 + 12 + 200 + 80 + 80 + 32 + 40


def test_names_in_tables():
    names = {
        "ct_cov19:model=cbr_tiny,class_weight=true,protocol=study": "ct_cov19_cbr_tiny_original_classw_study",
        "nccid_whole_lung": "nccid_whole_lung",
        "covidx_ct:protocol=study": "covidx_ct_densenet201_k4_3a_study",
    }
    assert {choice: experiments.load(choice).name for choice in names} == names


def test_networks_accept_their_input():
    """Networks and weights exist, heads fit, images are large enough."""
    for choice in [
        *choices("ct_cov19", model=(*CBR, "bit_r50x1", *EFFICIENTNETS), images=("lungs",), **BOTH),
        *choices("ictcf", model=ICTCF, **BOTH),
        *choices("covid_xray", model=XRAY, **BOTH),
        *choices("covidx_ct", model=TORCH, **BOTH),
        "nccid_whole_lung", "covidnet_ct", "effnetv2_covidxct", "transfusion",
    ]:  # fmt: skip
        config = load.resolve(experiments.load(choice))
        assert all(np.less_equal(models.minimum_size(config.model), config.input.size)), choice


def leaves(choice, classes):
    """Returns (all leaves, those that are trained) of the network of an experiment: shapes by path."""
    config = load.resolve(experiments.load(choice))
    network = models.build(config.model, classes)
    shapes = models.leaf_shapes(network, (*config.input.size, config.input.network_channels))
    params = {path: shape for path, shape in shapes.items() if not path.endswith(("/mean", "/var"))}
    frozen = optim.frozen_paths(config.optim, trees.unflatten(params))
    return shapes, {path: shape for path, shape in params.items() if path not in frozen}


def counts(choice, classes):
    return tuple(sum(map(math.prod, found.values())) for found in leaves(choice, classes))


SLOW = pytest.mark.slow
# torchvision's layer4 of a ResNet-50 has 14,964,736 parameters: three blocks of 6,039,552 and twice 4,462,592.
RESNET, BLOCKS = 3 * 2049, (6_039_552, 4_462_592, 4_462_592)
VGG, CONV = 25089 * 4096 + 4097 * 4096 + 3 * 4097, 512 * 512 * 9 + 512


@pytest.mark.parametrize(
    ("experiment", "classes", "trained"),
    [
        ("ct_cov19:model={},protocol=study", 3, {
            "simple": 25_475, "cbr_tiny": 4_306_819, "cbr_larget_study": 4_306_819, "cbr_small": 2_111_171,
            "cbr_largew": 8_437_123, "cbr_larget": 8_536_003, "bit_r50x1": 6_147,
        }),
        pytest.param("ct_cov19:model={},protocol=study", 3, {
            "efficientnet_b0": 3_843, "efficientnet_b3": 4_611, "efficientnet_b7": 7_683,
            # Keras's EfficientNetB0 with its top for three classes: 4,007,548 and the dense layer.
            "efficientnet_b0,weights=none": 4_007_548 + 3 * 1281,
        }, marks=SLOW),
        ("covid_xray:model={},protocol=study", 2, {"xray_cnn": 422_177, "mobilenetv2": 1_310_914, "resnet18": 2 * 513}),
        pytest.param(
            "covid_xray:model={},protocol=study", 2, {"resnet101v2": 2_097_346, "densenet201": 1_966_274}, marks=SLOW
        ),
        ("covidx_ct:model={}", 3, {
            "resnet50,unfreeze=0,protocol=study": RESNET,
            "resnet50,unfreeze=1,protocol=study": RESNET + BLOCKS[0],  # "-0" is the first child
            "resnet50,unfreeze=2,protocol=study": RESNET + BLOCKS[0] + BLOCKS[2],
            "resnet50,unfreeze=4,protocol=study": RESNET + 14_964_736,  # -3 is the first child again
            "resnet50,unfreeze=1": RESNET + BLOCKS[2],
            "vgg16,unfreeze=1,protocol=study": VGG,  # the last entry is a pool
            "vgg16,unfreeze=4,protocol=study": VGG + 3 * CONV,
            "vgg16,unfreeze=2": VGG + 2 * CONV,
        }),
    ],
)  # fmt: skip
def test_published_trained_parameters(experiment, classes, trained):
    for arguments, number in trained.items():
        assert counts(experiment.format(arguments), classes)[1] == number, arguments


def test_published_parameters_of_nccid():
    # Keras also counts mean, variance and counter of its normalization layer (7 numbers).
    assert counts("nccid_whole_lung:protocol=study", 2) == (6_577_801 - 7, 6_515_746)


@pytest.mark.parametrize("model", ["convnext_tiny", *(pytest.param(m, marks=SLOW) for m in ICTCF)])
def test_published_parameters_of_ictcf(model):
    assert counts(f"ictcf:model={model},protocol=study", 3) == ICTCF[model]


@pytest.mark.slow
def test_covidx_ct_densenet_blocks():
    assert counts("covidx_ct:protocol=study", 3) == (18_092_419 + 229_056, 994_563)  # and running statistics
    shapes, trained = leaves("covidx_ct:protocol=study", 3)
    assert {path.split("/")[0] for path in trained} == {"head", *(f"stage4_block{i}" for i in (1, 30, 31, 32))}
    assert "stage4_block1/bn1/mean" in shapes
    _, trained = leaves("covidx_ct:unfreeze=2", 3)
    assert {path.split("/")[0] for path in trained} == {"stage4_block31", "stage4_block32", "top_bn", "head"}


def test_input_normalization():
    """Gray levels 0, 128 and 255 in the first channel."""
    for choice, expected in [
        ("ictcf:model=efficientnetv2_b1,protocol=study", (-1, 0, 127 / 128)),
        ("ictcf:model=convnext_small,protocol=study", (0, 128, 255)),
        ("ictcf:model=resnet50v2,protocol=study", (0, 128, 255)),
        ("ictcf:model=resnet50v2", (-1, 0, 127 / 128)),
        ("ct_cov19:model=cbr_small,protocol=study", (0, 128 / 255, 1)),
        ("ct_cov19:model=efficientnet_b7,weights=none", (0, 128 / 255, 1)),
        ("ct_cov19:model=bit_r50x1,protocol=study", (-1, 1 / 255, 1)),
        ("ct_cov19:model=efficientnet_b3", (-2.11790, 0.07406, 2.24891)),
        # TensorFlow of the time took ImageNet's standard deviations for variances: 0.485 / 0.47854 and so on.
        ("ct_cov19:model=efficientnet_b3,protocol=study", (-1.01350, 0.03544, 1.07619)),
        ("nccid_whole_lung:protocol=study", (-1.01350, 0.03544, 1.07619)),
        ("nccid_whole_lung", (-2.11790, 0.07406, 2.24891)),
        ("covid_xray:model=densenet201,protocol=study", (0, 128 / 255, 1)),
        ("covid_xray:model=densenet201", (-2.11790, 0.07406, 2.24891)),
        ("covid_xray:model=resnet101v2", (-1, 1 / 255, 1)),
        ("covidx_ct:protocol=study", (-2.00809, -0.46859, 1.05891)),
        ("covidx_ct:version=2a,protocol=study", (-1.94738, -0.40786, 1.11963)),
        ("covidnet_ct", (0, 128 / 255, 1)),
    ]:
        spec = load.resolve(experiments.load(choice)).input
        pixels = jnp.asarray([0, 128, 255], jnp.uint8).reshape(1, 1, 3, 1)
        inputs = normalize(jnp.repeat(pixels, spec.channels, axis=-1), spec)
        np.testing.assert_allclose(inputs[0, 0, :, 0], expected, atol=2e-5, err_msg=choice)


def test_published_class_weights():
    for choice, counts, weights, decimals in [
        ("nccid_whole_lung:protocol=study", (2433, 908), (0.69, 1.84), 2),
        ("ct_cov19:class_weight=true,protocol=study", (2448, 1412, 538), (0.599, 1.038, 2.725), 3),
        ("ct_cov19:protocol=study", (2448, 1412, 538), (1, 1, 1), 3),
    ]:
        config, classes = experiments.load(choice), tuple(map(str, range(len(counts))))
        labels = np.repeat(np.arange(len(counts)), counts)
        result = optim.class_weights(config.optim.class_weights, labels, classes)
        np.testing.assert_array_equal(np.round(np.asarray(result, np.float64), decimals), weights)


def test_nccid_schedule_is_shorter_than_the_run():
    config = experiments.load("nccid_whole_lung:protocol=study")
    assert program.step_counts(config, 3341) == (424, 53)
    rate = optim.make_schedule(config.optim, 424)
    np.testing.assert_allclose([rate(0), rate(208), rate(416), rate(423)], [1e-4, 6.5e-5, 3e-5, 3e-5], rtol=1e-5)
    assert rate(415) > rate(416)


def test_batch_sizes_of_ictcf():
    published = (613, 613, 307, 613, 1225, 1633, 1225, 1225, 1399)  # steps per epoch of 19,585 images
    sizes = [experiments.load(f"ictcf:model={model},protocol=study").train.batch_size for model in ICTCF]
    assert tuple(math.ceil(19585 / size) for size in sizes) == published


def test_steps_of_the_other_studies():
    xray = experiments.load("covid_xray:protocol=study")
    assert program.step_counts(xray, 1236)[0] == 3 * 100 and xray.train.batch_size == 32
    frozen = experiments.load("covid_xray:model=mobilenetv2,protocol=study")
    assert program.step_counts(frozen, 1236)[0] == 10 * 96 and frozen.train.batch_size == 8
    covidx = experiments.load("covidx_ct:protocol=study")
    assert program.step_counts(covidx, 80910) == (round(10 * 80910 / 64), round(80910 / 64))
    assert experiments.load("covidx_ct:version=2a,protocol=study").train.steps == round(3 * 76488 / 64)
    # Repeats 2, 3, 1 of the classes of 2A: 230,766 slices per epoch of the official script.
    assert experiments.load("covidnet_ct:version=2a").train.steps == round(20 * 230_766 / 8)
    rate = optim.make_schedule(experiments.load("covid_xray:model=resnet18,protocol=study").optim, 100 * 121)
    np.testing.assert_allclose([rate(7 * 121 - 1), rate(7 * 121), rate(15 * 121)], [1e-4, 1e-5, 1e-6], rtol=1e-4)


def test_positive_class_of_the_xray_cnn():
    config = experiments.load("covid_xray")
    positive = outputs.positive_class(config, ("covid", "non"))
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray([[3.0]]), positive), [[0.0474, 0.9526]], atol=1e-4)


def test_data_and_tested_weights_of_protocols():
    for choice, dataset, protocol, keep in [
        ("nccid_whole_lung:protocol=study", "nccid_whole_lung", "study", "last"),
        ("nccid_whole_lung", "nccid_whole_lung", "clean", "best"),
        ("ct_cov19:images=lungs,protocol=study", "ct_cov19/study_lungs", "study", "best"),
        ("ct_cov19:images=lungs", "ct_cov19/lungs", "clean", "best"),
        ("ictcf:protocol=study", "ictcf/oversampled-features", "study", "last"),
        ("ictcf", "ictcf/features", "clean", "best"),
        ("covid_xray:protocol=study", "covid_xray_5k", "study", "last"),
        ("covid_xray:model=resnet18,protocol=study", "covid_xray_5k", "study", "best"),
        ("covidx_ct:version=2a,protocol=study", "covidx_ct/2a", "study", "last"),
        ("covidx_ct", "covidx_ct/3a", "clean", "best"),
        (
            "covidnet_ct:version=2a,protocol=study",
            "covidx_ct/2a",
            "clean",
            "last",
        ),  # "study" is the draw of another study
        ("covidnet_ct:version=1,protocol=study", "covidx_ct/1", "study", "last"),
        ("effnetv2_covidxct:protocol=study", "covidx_ct/3a", "study", "last"),
    ]:
        config = experiments.load(choice)
        assert (config.data.dataset, config.data.protocol, config.train.keep) == (dataset, protocol, keep), choice


def test_argument_errors():
    for choice, hint in [
        ("nccid_whole_lung:protocol=studie", "protocol=studie: the nearest: study"),
        ("ct_cov19:model=cbr_smal", "model=cbr_smal: the nearest: cbr_small"),
        ("ct_cov19:images=lung", "images=lung: the nearest: lungs"),
        ("ct_cov19:model=cbr_tiny,weights=imagenet", "model=cbr_tiny, weights=imagenet.*allowed are none"),
        ("ct_cov19:model=bit_r50x1,weights=none", "allowed are imagenet"),
        ("ictcf:model=resnet50", "resnet50v2"),
        ("ictcf:weights=imagenet,protocol=study", "weights=imagenet.*allowed are none"),
        ("covid_xray:model=resnet50", "model=resnet50"),
        ("covidx_ct:unfreeze=5", "unfreeze=5.*allowed are 0, 1, 2, 3, 4"),
        ("covidx_ct:version=2b,protocol=study", "version=2b.*allowed are 2a, 3a"),
        ("covidnet_ct:version=4", "version=4"),
        ("effnetv2_covidxct:version=1,protocol=study", "version=1.*2a, 3a"),
        ("transfusion:start=imagnet", "start=imagnet: the nearest: imagenet"),
    ]:
        with pytest.raises(ValueError, match=hint):
            experiments.load(choice)
