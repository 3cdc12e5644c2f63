"""Every network that public weights exist for has a clean record of them, and the command says what a file is."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from test_weight_files import write_safetensors

from lungjax import models
from lungjax.config import Config, check
from lungjax.weights import catalogue
from lungjax.weights.readers import open_tensors
from lungjax.weights.rules import layouts

FAMILIES = {
    "efficientnet_": "b0 b1 b2 b3 b4 b5 b6 b7 lite0 lite1 lite2 lite3 lite4",
    "efficientnetv2_": "b0 b1 b2 b3 s m l xl",
    "resnet": "18 34 50 101 152 50_v15 101_v15 152_v15 50v2 101v2 152v2",
    "bit_": "r50x1 r101x1 r50x3 r101x3 r152x2 r152x4",
    "convnext_": "tiny small base large xlarge",
    "convnextv2_": "atto femto pico nano tiny base large huge",
    "densenet": "121 161 169 201",
    "vgg": "16 19",
    "mobilenetv3_": "small large",
}
REQUIRED = ["mobilenet", "mobilenetv2"] + [f"{name}{v}" for name, text in FAMILIES.items() for v in text.split()]
# Of these graphs no second copy is published in a format with names that a rule table could know.
ALONE = {"resnet50", "resnet101", "resnet152", "resnet50v2", "resnet101v2", "resnet152v2", "efficientnetv2_xl",
         "efficientnet_lite3", "efficientnet_lite4"}  # fmt: skip


def test_every_network_has_a_first_choice_and_a_second_where_there_is_one():
    assert {record.model for record in catalogue.RECORDS} == set(REQUIRED)
    for model in REQUIRED:
        found = catalogue.records(model)
        assert catalogue.primary(model) is catalogue.find(model) is found[0]
        assert (len(found) > 1) == (model not in ALONE), model


@pytest.mark.parametrize(
    "model,name",
    [
        ("efficientnet_b0", "efficientnet_b0.keras"),
        ("efficientnet_lite0", "efficientnet_lite0.pypi"),
        ("efficientnet_lite3", "efficientnet_lite3.in1k"),
        ("efficientnetv2_s", "efficientnetv2_s.keras"),
        ("efficientnetv2_xl", "efficientnetv2_xl.in21k_ft_in1k"),
        ("resnet50", "resnet50.keras"),
        ("resnet50_v15", "resnet50_v15.tv_in1k"),
        ("resnet50v2", "resnet50v2.keras"),
        ("bit_r50x1", "bit_r50x1.goog_s"),
        ("convnext_tiny", "convnext_tiny.fb_in1k"),
        ("convnext_xlarge", "convnext_xlarge.fb_in22k_ft_in1k"),
        ("convnextv2_atto", "convnextv2_atto.fcmae_ft_in1k"),
        ("densenet121", "densenet121.keras"),
        ("densenet161", "densenet161.tv_in1k"),
        ("mobilenetv3_small", "mobilenetv3_small.keras"),
    ],
)
def test_the_first_choices(model, name):
    assert catalogue.primary(model).name == name


@pytest.mark.parametrize("record", catalogue.RECORDS, ids=lambda record: record.name)
def test_records_are_sound(record):
    model, tag = record.name.split(".")
    assert model == record.model and re.fullmatch(r"[a-z0-9_]+", tag)
    assert re.fullmatch(r"|md5:[0-9a-f]{32}|sha256:[0-9a-f]{8}|sha256:[0-9a-f]{64}", record.checksum)
    assert re.fullmatch(r"https://[\w./-]+", record.url) or (not record.url and record.package)
    assert re.fullmatch(r"[\w.-]+\.(h5|safetensors|npz|pth|pt)", record.filename)
    assert "/" not in record.filename and record.url.endswith((record.filename, "/model.safetensors", ""))
    check(Config(input=record.input))
    assert record.input.channels == len(record.input.mean) == len(record.input.std) == 3
    assert 0.8 < record.crop <= 1 and record.classes in (1000, 21843) and 10 <= record.megabytes < 5000
    assert record.top1 is None or 65 < record.top1 < 88
    assert record.noncommercial == record.model.startswith("convnextv2")


def test_names_and_files_are_unique():
    assert len({record.name for record in catalogue.RECORDS}) == len(catalogue.RECORDS)
    assert len({record.filename for record in catalogue.RECORDS}) == len(catalogue.RECORDS)


@pytest.mark.parametrize("model", REQUIRED)
def test_rules_and_fields_are_those_of_the_network(model):
    network = models.MODELS[model]()
    for record in catalogue.records(model):
        assert record.layout in layouts(model), record.name
        for name, value in record.network:
            assert name in {field.name for field in fields(network)}, record.name
            assert name != "padding" or value in network.paddings


def test_inputs_of_the_five_ways_to_normalise():
    def fed(name, pixel):
        spec = catalogue.find(name).input
        return [(p / 255 - m) / s for p, m, s in zip(pixel, spec.mean, spec.std, strict=True)]

    pixel = (10, 128, 250)  # red, green, blue
    caffe = [pixel[0] - 123.68, pixel[1] - 116.779, pixel[2] - 103.939]
    assert fed("resnet50.keras", pixel) == pytest.approx(caffe) == fed("vgg16.keras", pixel)
    assert fed("efficientnetv2_s.keras", pixel) == pytest.approx([p / 128 - 1 for p in pixel])
    for name in ("resnet50v2", "mobilenet", "mobilenetv2", "mobilenetv3_small", "bit_r50x1", "efficientnetv2_s.in1k"):
        assert fed(name, pixel) == pytest.approx([p / 127.5 - 1 for p in pixel])
    rgb = [(10 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (250 / 255 - 0.406) / 0.225]
    for name in ("efficientnet_b0", "efficientnetv2_b0", "densenet121", "convnext_tiny", "vgg16.tv_in1k"):
        assert fed(name, pixel) == pytest.approx(rgb)


def test_fields_that_only_some_sources_want():
    assert dict(catalogue.find("efficientnet_b0.ra_in1k").network) == {"epsilon": 1e-5, "padding": "symmetric"}
    assert dict(catalogue.find("efficientnet_b7.torchvision_v1").network) == {"padding": "symmetric"}
    assert dict(catalogue.find("densenet121.tv_in1k").network) == {"epsilon": 1e-5}
    for name in ("efficientnet_b0.aa_in1k", "efficientnet_b0.keras", "mobilenetv3_small.in1k", "convnext_tiny.fb_in1k"):
        assert not catalogue.find(name).network


@pytest.mark.parametrize(
    "name,message",
    [
        ("efficientnet_b9.keras", r"weights 'efficientnet_b9.keras': unknown; the nearest: efficientnet_b\d.keras"),
        ("bit_r50x1.goog", "bit_r50x1 has bit_r50x1.goog_s, bit_r50x1.goog_m_in1k"),
        ("", "unknown"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        catalogue.find(name)
    with pytest.raises(ValueError, match="cbr_small: no public ImageNet weights"):
        catalogue.primary("cbr_small")


def test_the_listing_is_a_table():
    lines = catalogue.listing().splitlines()
    assert len(lines) == len(catalogue.RECORDS) + 1 and lines[0].split()[:3] == ["name", "MB", "top-1"]
    line = next(line for line in lines if line.startswith("convnextv2_huge.fcmae_ft_in1k "))
    assert line.split()[1:6] == ["2641", "86.3", "224", "1000", "cc-by-nc-4.0"]
    assert [row.split()[0] for row in catalogue.listing(r"vgg19\.[tk]").splitlines()[1:]] == [
        "vgg19.keras", "vgg19.tv_in1k", "vgg19.torchvision_v1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--match=vgg99: no record"):
        catalogue.listing("vgg99")
    with pytest.raises(ValueError, match="not a regular expression"):
        catalogue.listing("(")


# The command. EfficientNet-Lite0 by the names and shapes of EfficientNet-PyTorch, from the paper's table.
STAGES = ((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320))


def lite0(classes=1000):
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("_bn0", 32)
    inputs, number = 32, 0
    for repeats, kernel, expand, width in STAGES:
        for _ in range(repeats):
            block, middle = f"_blocks.{number}", inputs * expand
            if expand > 1:
                shapes[f"{block}._expand_conv.weight"] = (middle, inputs, 1, 1)
                norm(f"{block}._bn0", middle)
            shapes[f"{block}._depthwise_conv.weight"] = (middle, 1, kernel, kernel)
            norm(f"{block}._bn1", middle)
            shapes[f"{block}._project_conv.weight"] = (width, middle, 1, 1)
            norm(f"{block}._bn2", width)
            inputs, number = width, number + 1
    shapes["_conv_head.weight"] = (1280, 320, 1, 1)
    norm("_bn1", 1280)
    shapes |= {"_fc.weight": (classes, 1280), "_fc.bias": (classes,)}
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


def identify(tmp_path, arrays):
    from lungjax.weights import identify

    return identify.by_content(open_tensors(write_safetensors(tmp_path / "w", arrays)))


def test_a_file_is_known_by_its_tensors(tmp_path):
    assert "the tensors of efficientnet_lite0.pypi; no published checksum" in identify(tmp_path, lite0())
    answer = identify(tmp_path, lite0(classes=7))
    assert "the tensors of efficientnet_lite0.pypi, but for its classifier" in answer and "(7, 1280)" in answer


def test_what_differs_from_the_nearest_network_is_named(tmp_path):
    without = lite0()
    del without["_blocks.3._bn1.running_var"]
    with pytest.raises(ValueError, match="nearest is efficientnet_lite0, but\n.*only in the network: .*/bn/var"):
        identify(tmp_path, without)
    with pytest.raises(ValueError, match="nearest is efficientnet_lite0, but\n.*only in the file: _extra.weight"):
        identify(tmp_path, lite0() | {"_extra.weight": np.zeros(3)})
    turned = lite0()
    turned["_conv_head.weight"] = turned["_conv_head.weight"].transpose(1, 0, 2, 3)
    with pytest.raises(ValueError, match="nearest is efficientnet_lite0, but\n.*top_conv/kernel: _conv_head.weight"):
        identify(tmp_path, turned)
    with pytest.raises(ValueError, match="its tensors .net.0.weight, ....* are not named as in any file"):
        identify(tmp_path, {"net.0.weight": np.zeros((3, 3))})


def command(*arguments, **environment):
    line = [sys.executable, "-m", "lungjax.weights", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)


def test_the_command_lists_without_jax(tmp_path):
    result = command("--list", "--match=efficientnet_lite0")
    assert result.returncode == 0 and [line.split()[0] for line in result.stdout.splitlines()] == [
        "name", "efficientnet_lite0.pypi", "efficientnet_lite0.in1k",
    ]  # fmt: skip
    code = "import sys; from lungjax.weights import __main__; print([m for m in ('jax', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_command_answers_mistakes_in_one_line(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"<html>")
    for arguments, message in (
        ((), "one of --list"),
        (("--list", "more"), "unexpected argument 'more'"),
        (("--fetch=vgg17",), "lungjax: weights 'vgg17': unknown"),
        ((f"--check={tmp_path}/w.h5",), "w.h5: a web page"),
    ):
        result = command(*arguments)
        assert result.returncode != 0 and message in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
