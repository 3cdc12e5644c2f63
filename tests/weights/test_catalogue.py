"""Catalogue rows, checked against rules and published facts; the command that lists, fetches and checks."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from itertools import groupby

import commands
import numpy as np
import pytest
from weight_writers import as_timm, install, leaves, write_safetensors

from lungjax import models
from lungjax.config import Config, check
from lungjax.weights import __main__ as command
from lungjax.weights import catalogue
from lungjax.weights.name_rules import layouts


def test_validity_of_rows():
    assert len(catalogue.RECORDS) == 224
    licenses = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "not stated")
    for record in catalogue.RECORDS:
        model, tag = record.name.split(".")
        assert model == record.model and re.fullmatch(r"[a-z0-9_]+", tag), record
        assert re.fullmatch(r"|md5:[0-9a-f]{32}|sha256:[0-9a-f]{8}|sha256:[0-9a-f]{64}", record.checksum), record
        assert re.fullmatch(r"https://[\w./-]+", record.url) or (not record.url and record.package), record
        assert re.fullmatch(r"[\w.-]+\.(h5|safetensors|npz|pth|pt)", record.filename), record
        assert record.url.endswith((record.filename, "/model.safetensors", "")), record
        check(Config(input=record.input))
        assert record.input.interpolation in ("bilinear", "bicubic"), record
        assert 0.8 < record.crop <= 1 and 5 <= record.megabytes < 5000, record
        assert record.classes in (0, 18, 1000, 21843), record
        assert record.top1 is None or 58 < record.top1 < 88, record
        assert record.license in licenses, record
        assert record.noncommercial == record.model.startswith("convnextv2"), record
        assert record.layout in layouts(model), record
        network = models.MODELS[model]()
        for name, value in record.network:
            assert name in {field.name for field in fields(network)}, record
            assert name != "padding" or value in network.paddings, record
    for column in ("name", "filename"):
        assert len({getattr(record, column) for record in catalogue.RECORDS}) == len(catalogue.RECORDS)
    models_of_rows = [record.model for record in catalogue.RECORDS]
    assert len([model for model, _ in groupby(models_of_rows)]) == len(set(models_of_rows)) == 62  # adjacent rows


# Checksum, normalization, size, top-1, license: from the documentation and code of Keras, timm, torchvision and BiT.
FACTS = {
    "efficientnet_b0.keras": ("md5:902e53a9f72be733fc0bcb005b3ebbac", "imagenet", 224, 77.1, "apache-2.0"),
    "efficientnetv2_s.keras": ("md5:e1d88a8495beba45748fedd0cecbe016", "v2", 384, 83.9, "apache-2.0"),
    "efficientnetv2_xl.in21k_ft_in1k": ("", "half", 512, 86.75, "apache-2.0"),
    "resnet50.keras": ("md5:2cb95161c43110f7111970584f804107", "caffe", 224, 74.9, "mit"),
    "resnet50_v15.torchvision_v1": ("sha256:0676ba61", "imagenet", 224, 76.13, "bsd-3-clause"),
    "bit_r50x1.goog_m_in1k": ("", "half", 480, 80.68, "apache-2.0"),
    "convnextv2_atto.fcmae_ft_in1k": ("", "imagenet", 224, 76.64, "cc-by-nc-4.0"),
    "vgg16.keras": ("md5:64373286793e3c8b2b4e3219cbf3544b", "caffe", 224, 71.3, "cc-by-4.0"),
    "squeezenet1_1.torchvision_v1": ("sha256:b8a52dc0", "imagenet", 224, 58.178, "bsd-3-clause"),
    "mobilenetv3_small.keras": ("md5:8768d4c2e7dee89b9d02b2d03d65d862", "half", 224, 68.1, "apache-2.0"),
    "densenet121.xrv_mimic_ch": ("", "xrv", 224, None, "apache-2.0"),
    "resnet50_v15.xrv": ("", "xrv", 512, None, "apache-2.0"),
    "resnet50.radimagenet": ("", "caffe_255", 224, None, "mit"),
}


def test_rows_against_published_facts():
    for name, (checksum, normalization, size, top1, license) in FACTS.items():
        record = catalogue.find(name)
        mean, std = catalogue.NORMALIZATIONS[normalization]
        assert (record.input.mean, record.input.std) == (mean, std), name
        assert (record.checksum, record.input.size, record.license) == (checksum, (size, size), license), name
        assert record.top1 == (None if top1 is None else pytest.approx(top1, abs=0.01)), name
    for name, network in {
        "efficientnet_b0.ra_in1k": {"epsilon": 1e-5, "padding": "symmetric"},
        "efficientnet_b7.torchvision_v1": {"padding": "symmetric"}, "densenet121.tv_in1k": {"epsilon": 1e-5},
    }.items():  # fmt: skip
        assert dict(catalogue.find(name).network) == network


def test_normalizations():
    pixel = np.asarray([10.0, 128.0, 250.0])  # red, green, blue
    for name, expected in {
        "caffe": pixel - [123.68, 116.779, 103.939], "v2": pixel / 128 - 1, "half": pixel / 127.5 - 1,
        "imagenet": (pixel / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        "caffe_255": (pixel - [123.68, 116.779, 103.939]) / 255, "xrv": (2 * pixel / 255 - 1) * 1024,
    }.items():  # fmt: skip
        mean, std = catalogue.NORMALIZATIONS[name]
        np.testing.assert_allclose((pixel / 255 - mean) / std, expected)


def test_find():
    for name in ("efficientnet_lite0.pypi", "efficientnetv2_xl.in21k_ft_in1k", "bit_r50x1.goog_s"):
        assert catalogue.find(name.partition(".")[0]) == catalogue.find(name) and catalogue.find(name).name == name
    for name, message in {"efficientnet_b9.keras": r"b\d.keras", "bit_r50x1.goog": "goog_m", "": "unknown"}.items():
        with pytest.raises(ValueError, match=message):
            catalogue.find(name)


def test_list_command(capsys):
    assert commands.run(command, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 225 and lines[0].split()[:3] == ["name", "MB", "top-1"]
    line = next(line for line in lines if line.startswith("convnextv2_huge.fcmae_ft_in1k "))
    assert line.split()[1:6] == ["2641", "86.3", "224", "1000", "cc-by-nc-4.0"]
    assert commands.run(command, "--list", r"--match=vgg19\.[tk]") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["name", "vgg19.keras", "vgg19.tv_in1k", "vgg19.torchvision_v1"]


def test_command_errors(tmp_path, capsys):
    (tmp_path / "w.h5").write_bytes(b"<html>")
    cases = (
        ((), 1, "--list"), (("--list", "more"), 1, "'more'"), (("--list", "--match=vgg99"), 2, "vgg99"),
        (("--list", "--match=("), 2, "regular expression"), (("--fetch=vgg17",), 2, "vgg17"),
        ((f"--check={tmp_path}/w.h5",), 2, "web page"),
    )  # fmt: skip
    commands.assert_errors(capsys, command, cases)


def test_smoke_process_without_jax():
    line = [sys.executable, "-X", "importtime", "-m", "lungjax.weights", "--list", "--match=vgg16"]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0 and "vgg16.keras" in result.stdout
    assert not re.search(r"\| +(jax|torch|flax)$", result.stderr, re.M)


def test_check_command(tmp_path, capsys, monkeypatch):
    install(monkeypatch, tmp_path)
    monkeypatch.setattr(catalogue, "RECORDS", [r for r in catalogue.RECORDS if r.model in ("tiny", "wide")])
    tensors, other = as_timm(leaves()), as_timm(leaves(classes=7))
    kernel, statistic = "conv_head.weight", "blocks.1.0.bn2.running_var"
    for change, code, messages in (
        (tensors, 0, ["tiny.half, tiny.torch (epsilon=1e-05, padding=symmetric);"]),
        (other, 0, ["tiny.half, ", "except for the classifier", "(7, 16)"]),
        ({name: tensors[name] for name in tensors if name != statistic}, 2, ["nearest is tiny", "block1/bn/var"]),
        (tensors | {"extra.weight": np.zeros(3)}, 2, ["nearest is tiny", "only in the file: extra"]),
        (tensors | {kernel: tensors[kernel].transpose(1, 0, 2, 3)}, 2, ["nearest is tiny", f"kernel: {kernel}"]),
        ({"net.0.weight": np.zeros((3, 3))}, 2, ["net.0.weight", "any known file"]),
    ):
        path = write_safetensors(tmp_path / "w", change)
        assert commands.run(command, f"--check={path}") == code
        output = "".join(capsys.readouterr())
        assert [message for message in messages if message not in output] == []
