"""All experiments, and those of the studies against the published numbers."""

import dataclasses
import functools
import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lungjax import config as configs
from lungjax import models
from lungjax.config import PROTOCOLS, experiments, overrides
from lungjax.models import outputs, trees
from lungjax.models.inputs import normalize
from lungjax.training import optim, program
from lungjax.weights import load

STAGES = ("original", "nobackg", "crop", "lungs_nocrop", "lungs")
TORCH = ("vgg16", "vgg19", "resnet50", "resnet101", "resnet152", "densenet121", "densenet161", "densenet201")
VERSIONS = ("1", "2a", "2b", "3a", "3b")
BOTH = {"protocol": PROTOCOLS}
# iCTCF, networks with the study's top: parameters with and without running statistics, steps per published epoch.
ICTCF = {
    "efficientnetv2_b0": (5_927_699, 5_864_531, 613), "efficientnetv2_b1": (6_939_511, 6_865_879, 613),
    "efficientnetv2_b2": (8_778_657, 8_693_553, 307), "convnext_tiny": (27_822_435, 27_820_899, 613),
    "convnext_small": (49_456_995, 49_455_459, 1225), "convnext_base": (87_569_539, 87_567_491, 1633),
    "resnet50v2": (23_572_867, 23_523_331, 1225), "resnet101v2": (42_634_627, 42_532_867, 1225),
    "resnet152v2": (58_339_715, 58_191_875, 1399),
}  # fmt: skip
# COVID-19 CT: trained parameters.
CT_COV19 = {
    "simple": 25_475, "cbr_tiny": 4_306_819, "cbr_small": 2_111_171, "cbr_largew": 8_437_123, "cbr_larget": 8_536_003,
    "cbr_larget_study": 4_306_819, "bit_r50x1": 6_147, "efficientnet_b0": 3_843, "efficientnet_b3": 4_611,
    "efficientnet_b7": 7_683,
}  # fmt: skip
# COVID-XRay-5K: trained parameters; VGG16 was never trained.
XRAY = {
    "xray_cnn": 422_177, "mobilenetv2": 1_310_914, "resnet101v2": 2_097_346, "densenet201": 1_966_274,
    "resnet18": 2 * 513, "squeezenet1_1": 2 * 513, "vgg16": None,
}  # fmt: skip
# layer4 of torchvision's ResNet-50 has 14,964,736 parameters: 6,039,552 in the first block, 4,462,592 in the other two.
RESNET, BLOCKS = 3 * 2049, (6_039_552, 4_462_592, 4_462_592)
VGG, CONV = 25089 * 4096 + 4097 * 4096 + 3 * 4097, 512 * 512 * 9 + 512
PARAMETERS = {
    # The 6,577,801 of Keras include mean, variance and counter of its normalization layer (7 numbers).
    "nccid_whole_lung:protocol=study": (2, (6_577_801 - 7, 6_515_746)),
    **{f"ct_cov19:model={model},protocol=study": (3, count) for model, count in CT_COV19.items()},
    # Keras's EfficientNetB0 with its top for three classes: 4,007,548 and the dense layer.
    "ct_cov19:model=efficientnet_b0,weights=none,protocol=study": (3, 4_007_548 + 3 * 1281),
    **{f"ictcf:model={model},protocol=study": (3, counts[:2]) for model, counts in ICTCF.items()},
    **{f"covid_xray:model={model},protocol=study": (2, count) for model, count in XRAY.items() if count},
    "covidx_ct:protocol=study": (3, (18_092_419 + 229_056, 994_563)),  # and running statistics
    "covidx_ct:model=resnet50,unfreeze=0,protocol=study": (3, RESNET),
    "covidx_ct:model=resnet50,unfreeze=1,protocol=study": (3, RESNET + BLOCKS[0]),  # "-0" is the first child
    "covidx_ct:model=resnet50,unfreeze=2,protocol=study": (3, RESNET + BLOCKS[0] + BLOCKS[2]),
    "covidx_ct:model=resnet50,unfreeze=4,protocol=study": (3, RESNET + sum(BLOCKS)),  # -3 is the first child again
    "covidx_ct:model=resnet50,unfreeze=1": (3, RESNET + BLOCKS[2]),
    "covidx_ct:model=vgg16,unfreeze=1,protocol=study": (3, VGG),  # the last entry is a pool
    "covidx_ct:model=vgg16,unfreeze=4,protocol=study": (3, VGG + 3 * CONV),
    # kuangliu/pytorch-cifar has 11,173,962 and 23,520,842 with three input channels and ten classes.
    "medmnist:protocol=study": (2, 11_173_962 - 2 * 64 * 9 - 8 * 513),
    "medmnist:model=resnet50": (11, 23_520_842 - 2 * 64 * 9 + 2049),
    "medmnist:subset=chest,size=224": (14, 11_689_512 - 986 * 513),  # torchvision's has 1000 classes
    "covidx_ct:model=vgg16,unfreeze=2": (3, VGG + 2 * CONV),
}
LARGE = "v2_b[12]|convnext_(small|base)|resnet1|resnet50v2|efficientnet_b[37]|densenet201|unfreeze=[012],p|covidx_ct:p"
# The gray levels 0, 128, 255 in the first input channel.
IMAGENET, ROOTS = (-2.11790, 0.07406, 2.24891), (-1.01350, 0.03544, 1.07619)
INPUTS = {
    "ictcf:model=efficientnetv2_b1,protocol=study": (-1, 0, 127 / 128),
    "ictcf:model=convnext_small,protocol=study": (0, 128, 255),
    "ictcf:model=resnet50v2": (-1, 0, 127 / 128),
    "ct_cov19:model=cbr_small,protocol=study": (0, 128 / 255, 1),
    "ct_cov19:model=bit_r50x1,protocol=study": (-1, 1 / 255, 1),
    "ct_cov19:model=efficientnet_b3": IMAGENET,
    # TensorFlow at the time used ImageNet's standard deviations as variances: 0.485 / 0.47854 and so on.
    "ct_cov19:model=efficientnet_b3,protocol=study": ROOTS,
    "nccid_whole_lung:protocol=study": ROOTS,
    "nccid_whole_lung": IMAGENET,
    "covid_xray:model=densenet201,protocol=study": (0, 128 / 255, 1),
    "covid_xray:model=densenet201": IMAGENET,
    "covid_xray:model=resnet101v2": (-1, 1 / 255, 1),
    "covidx_ct:protocol=study": (-2.00809, -0.46859, 1.05891),
    "covidx_ct:version=2a,protocol=study": (-1.94738, -0.40786, 1.11963),
    "covidnet_ct": (0, 128 / 255, 1),
    "medmnist:protocol=study": (-1, 1 / 255, 1),
}
# The data set, the protocol, and the weights that are tested.
DATA = {
    "nccid_whole_lung:protocol=study": ("nccid_whole_lung", "study", "last"),
    "nccid_whole_lung": ("nccid_whole_lung", "clean", "best"),
    "ct_cov19:images=lungs,protocol=study": ("ct_cov19/study_lungs", "study", "best"),
    "ct_cov19:images=lungs": ("ct_cov19/lungs", "clean", "best"),
    "ictcf:protocol=study": ("ictcf/oversampled-features", "study", "last"),
    "ictcf": ("ictcf/features", "clean", "best"),
    "covid_xray:protocol=study": ("covid_xray_5k/oversampled", "study", "last"),
    "covid_xray:model=resnet18,protocol=study": ("covid_xray_5k", "study", "best"),
    "covidx_ct:version=2a,protocol=study": ("covidx_ct/2a", "study", "last"),
    "covidx_ct": ("covidx_ct/3a", "clean", "best"),
    "covidnet_ct:version=2a,protocol=study": ("covidx_ct/2a", "clean", "last"),  # "study" is another study's draw
    "covidnet_ct:version=1,protocol=study": ("covidx_ct/1", "study", "last"),
    "effnetv2_covidxct:protocol=study": ("covidx_ct/3a", "study", "last"),
    "medmnist:subset=chest,size=224,protocol=study": ("medmnist/chest", "study", "best"),
    "medmnist:subset=organa,size=224": ("medmnist/organa_224", "clean", "best"),
}
ERRORS = {
    "nccid_whole_lung:protocol=studie": "did you mean study",
    "ct_cov19:model=cbr_smal": "did you mean cbr_small",
    "ct_cov19:model=cbr_tiny,weights=imagenet": "expected none",
    "ictcf:model=resnet50": "resnet50v2",
    "ictcf:weights=imagenet,protocol=study": "expected none",
    "covid_xray:model=efficientnet_lite0,protocol=study": "use protocol=clean",
    "covid_xray:model=vgg16,dropout=true": "xray_cnn",
    "covidx_ct:unfreeze=5": "expected 0, 1, 2, 3, 4",
    "effnetv2_covidxct:version=1,protocol=study": "version=1.*2a, 3a",
    "transfusion:start=imagnet": "did you mean imagenet",
    "medmnist:size=64": "size",
}


def choices(name, **arguments):
    """Every combination of the arguments for --experiment."""
    for values in itertools.product(*arguments.values()):
        yield f"{name}:" + ",".join(f"{key}={value}" for key, value in zip(arguments, values, strict=True))


def grid():
    options = {"images": STAGES, "class_weight": (False, True), "augment": (False, True), **BOTH}
    yield from choices("nccid_whole_lung", **BOTH)
    efficientnets = [model for model in CT_COV19 if model.startswith("efficientnet")]
    yield from choices("ct_cov19", model=CT_COV19.keys() - efficientnets, **options)
    yield from choices("ct_cov19", model=efficientnets, weights=("imagenet", "none"), **options)
    yield from choices("ictcf", model=(*ICTCF, *(f"efficientnetv2_{size}" for size in ("b3", "s", "m", "l"))), **BOTH)
    yield from choices("covid_xray", model=XRAY, **BOTH)
    yield from choices("covid_xray", dropout=("true",), **BOTH)
    yield "covid_xray:model=efficientnet_lite0"
    yield from choices("covidx_ct", model=TORCH, unfreeze=range(5), version=VERSIONS, protocol=("clean",))
    yield from choices("covidx_ct", model=TORCH, unfreeze=range(5), version=("2a", "3a"), protocol=("study",))
    networks = {"model": ("resnet50", "convnext_tiny"), "weights": ("none", "imagenet", "run:runs/a", "run:runs/A")}
    yield from choices("covidnet_ct", version=VERSIONS, **networks, **BOTH)
    yield from choices("effnetv2_covidxct", version=("2a", "3a"), **networks, **BOTH)
    subsets, sizes = ("pneumonia", "chest", "organa"), (28, 224)
    yield from choices("medmnist", subset=subsets, model=("resnet18", "resnet50"), size=sizes, **BOTH)
    starts = ("random", "imagenet", "run:runs/a", "meanvar:imagenet", "meanvar:run:runs/a")
    yield from choices("transfusion", model=("cbr_tiny", "resnet50"), start=starts, dataset=("folder", "ict/x"), **BOTH)


@functools.cache
def leaf_shapes(model, classes, *size):
    return models.leaf_shapes(models.build(model, classes), size)


def leaves(choice, classes):
    """Returns the leaf shapes by path of an experiment's network: those of all leaves, and of the trained ones."""
    config = load.resolve(experiments.load(choice))
    model = dataclasses.replace(config.model, weights="none")  # so that equal networks are built once
    shapes = leaf_shapes(model, classes, *config.input.size, config.input.network_channels)
    params = {path: shape for path, shape in shapes.items() if not path.endswith(("/mean", "/var"))}
    frozen = optim.frozen_paths(config.optim, trees.unflatten(params))
    return shapes, {path: shape for path, shape in params.items() if path not in frozen}


def test_validity_and_list_of_all_experiments():
    listing = experiments.listing()
    for name in experiments.names():
        config = experiments.load(name)
        configs.check(config)
        assert config.name.startswith(name)  # some append the network, so that runs do not share a folder
        assert f"\n{name} " in "\n" + listing


def test_experiment_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from lungjax.config import Config, TrainConfig\n"
        "def get_config(epochs: float = 1.0) -> Config:\n"
        "    return Config(name='mine', train=TrainConfig(epochs=epochs))\n"
    )
    config = experiments.load(f"{path}:epochs=2.5")
    assert config.train.epochs == 2.5
    saved = tmp_path / "config.json"
    saved.write_text(overrides.to_json(config))
    assert experiments.load(str(saved)) == config


def test_experiment_errors(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(epochs: float = 1.0): return epochs\n")
    for choice, hint in (
        ("fintune", "did you mean finetune"),
        ("finetune:modl=x", "did you mean model"),
        ("finetune:model", "not key=value"),
        ("missing.py", "no such file"),
        ("missing.json", "no such file"),
        (f"{path}:epochs=many", "expected float"),
        (str(path), "not a lungjax Config"),
    ):
        with pytest.raises(ValueError, match=hint):
            experiments.load(choice)


def test_unique_names():
    """Every combination is valid, accepts its input size, and has a unique name that is valid as a folder name."""
    names = {}
    for choice in grid():
        config = experiments.load(choice)
        configs.check(config)
        assert all(np.less_equal(models.build(config.model, 2).minimum_size(), config.input.size)), choice
        assert config.name not in names, (choice, names[config.name])
        names[config.name] = choice
        assert re.fullmatch("[a-z0-9_-]+", config.name) and config.name.startswith(choice.partition(":")[0])
        assert config.name.endswith("_study") == ("protocol=study" in choice)
        if not choice.startswith(("covidnet_ct", "transfusion")):  # the first has mixed precision, the other any data
            assert config.model.dtype == ("float32" if "protocol=study" in choice else None)
    assert len(names) == 2 + 520 + 26 + 17 + 200 + 80 + 80 + 32 + 24 + 40
    tiny = "ct_cov19:model=cbr_tiny,class_weight=true,protocol=study"
    assert names["ct_cov19_cbr_tiny_original_classw_study"] and experiments.load(tiny).name in names


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_published_parameters(large):
    for choice, (classes, expected) in PARAMETERS.items():
        if bool(re.search(LARGE, choice)) == large:
            counts = tuple(sum(map(math.prod, shapes.values())) for shapes in leaves(choice, classes))
            assert expected in (counts, counts[1]), (choice, counts)


def test_input_ranges():
    for choice, expected in INPUTS.items():
        spec = load.resolve(experiments.load(choice)).input
        pixels = jnp.asarray([0, 128, 255], jnp.uint8).reshape(1, 1, 3, 1)
        values = normalize(jnp.repeat(pixels, spec.channels, axis=-1), spec)
        np.testing.assert_allclose(values[0, 0, :, 0], expected, atol=2e-5, err_msg=choice)


def test_class_weights():
    for choice, counts, weights, decimals in (
        ("nccid_whole_lung:protocol=study", (2433, 908), (0.69, 1.84), 2),
        ("ct_cov19:class_weight=true,protocol=study", (2448, 1412, 538), (0.599, 1.038, 2.725), 3),
        ("ct_cov19:protocol=study", (2448, 1412, 538), (1, 1, 1), 3),
    ):
        config, classes = experiments.load(choice), tuple(map(str, range(len(counts))))
        actual = optim.class_weights(config.optim.class_weights, np.repeat(np.arange(len(counts)), counts), classes)
        np.testing.assert_array_equal(np.round(np.asarray(actual, np.float64), decimals), weights)


def test_schedules_and_steps():
    nccid = experiments.load("nccid_whole_lung:protocol=study")
    assert program.step_counts(nccid, 3341) == (424, 53)
    rate = optim.make_schedule(nccid.optim, 424)
    np.testing.assert_allclose([rate(0), rate(208), rate(416), rate(423)], [1e-4, 6.5e-5, 3e-5, 3e-5], rtol=1e-5)
    assert rate(415) > rate(416)
    for model, (*_, steps) in ICTCF.items():  # of 19,585 images
        assert math.ceil(19585 / experiments.load(f"ictcf:model={model},protocol=study").train.batch_size) == steps
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
    rate = optim.make_schedule(experiments.load("medmnist:protocol=study").optim, 100 * 36)
    np.testing.assert_allclose([rate(49 * 36), rate(51 * 36), rate(76 * 36)], [1e-3, 1e-4, 1e-5], rtol=1e-4)


def test_xray_cnn_positive_class():
    positive = outputs.positive_class(experiments.load("covid_xray"), ("covid", "non"))
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray([[3.0]]), positive), [[0.0474, 0.9526]], atol=1e-4)


def test_data_and_tested_weights():
    for choice, expected in DATA.items():
        config = experiments.load(choice)
        assert (config.data.dataset, config.data.protocol, config.train.keep) == expected, choice


def test_wrong_values():
    for choice, word in ERRORS.items():
        with pytest.raises(ValueError, match=word):
            experiments.load(choice)
