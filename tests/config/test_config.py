import re
import subprocess
import sys
from pathlib import Path

import pytest

from lungjax import config as configs
from lungjax.config import Config, overrides


def test_override_values():
    for assignment, value in (
        ("optim.lr=3e-4", 3e-4), ("train.epochs=2", 2.0), ("train.steps=1e3", 1000), ("train.maximize=false", False),
        ("input.size=96,128", (96, 128)), ("input.size=(96, 128)", (96, 128)), ("input.size=64", (64, 64)),
        ("model.head.hidden=64,32", (64, 32)), ("model.head.hidden=[]", ()), ("model.head.dropout=0.5", 0.5),
        ("model.padding=same", "same"), ("model.padding=None", None), ("data.dataset=folder/mine", "folder/mine"),
        ("input.mean=0.5", (0.5,)), ("input.mean=None", None),
        ("optim.lr_factors=(stem|stage1)=0.1, ^head/(a|b)=10", ("(stem|stage1)=0.1", "^head/(a|b)=10")),
    ):  # fmt: skip
        result = configs.fields_of(overrides.override(Config(), assignment))[assignment.partition("=")[0]]
        assert result == value and type(result) is type(value), assignment


def test_override_errors():
    for assignment, words in (
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]), ("optimm.lr=1", ["optim.lr"]), ("optim.lr", ["path=value"]),
        ("optim.lr=fast", ["optim.lr", "float", "fast"]), ("train.batch_size=2.5", ["train.batch_size", "int", "2.5"]),
        ("train.maximize=maybe", ["train.maximize", "bool"]), ("input.size=1,2,3", ["input.size", "int, int"]),
        ("optim=adam", ["section", "optim.name"]), ("optim.lr.x=1", ["optim.lr"]),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            overrides.override(Config(), assignment)
        assert all(word in str(error.value) for word in words), assignment


def test_json_round_trip():
    config = Config()
    for assignment in ("model.head.hidden=64", "input.mean=0.1,0.2,0.3", "model.head.positive_class=COVID, 19"):
        config = overrides.override(config, assignment)
    text = overrides.to_json(config)
    assert overrides.from_json(text) == config
    with pytest.raises(ValueError, match="optim.lrx.*did you mean.*optim.lr"):
        overrides.from_json(text.replace('"lr"', '"lrx"'))
    with pytest.raises(ValueError, match="optim.lr.*expected float"):
        overrides.from_json(text.replace('"lr": 0.001', '"lr": "x"'))
    for number in ("NaN", "1e999", '"1e999"', "-Infinity", "1" * 400):
        with pytest.raises(ValueError, match="config.json"):
            overrides.from_json(text.replace('"lr": 0.001', f'"lr": {number}'))
    for seed in (2**64, f'"{2**64}"', 1e30, '"nan"', '"[]"', '"{[]: 1}"', f'"{"(" * 300}"'):
        with pytest.raises(ValueError, match="config.json"):
            overrides.from_json(text.replace('"seed": 0', f'"seed": {seed}'))
    for damaged in (text[:-5], b"\xff{}", bytes(9), "[" * 99999, "[]"):
        with pytest.raises(ValueError, match="config.json"):
            overrides.from_json(damaged)


def test_name_of_the_invalid_field():
    for assignment in (
        "input.crop=centre", "optim.name=adan", "train.batch_size=0", "train.epochs=-1", "train.accumulate=3",
        "input.channels=2", "input.std=0", "input.mean=0.1,0.2", "input.std=0.2,0.2,0", "model.head.dropout=1",
        "model.head.output=sigmoid", "model.head.pool=mean", "model.head.activation=gelu", "model.gray=sum",
        "model.padding=full", "model.epsilon=0", "optim.frozen_batch_norm=keras", "optim.lr=0", "input.box_margin=0.1",
        "augment.box_jitter=0.05", "augment.mixup=-1", "augment.zoom=0.5,0.1", "eval.sensitivity=2", "data.fold=1",
        "eval.prevalence=0.1", "eval.prevalence=a:2", "eval.prevalence=a:x", "eval.prevalence=a:.1,a:.2",
        "data.folds=2", "train.fraction=0", "train.seed=4294967296",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(assignment.split("=")[0])):
            configs.check(overrides.override(Config(), assignment))


def test_use_of_every_field():
    package = Path(configs.__file__).parents[1]
    code = "\n".join(p.read_text() for p in package.rglob("*.py") if p.parent.name != "config")
    unread = [path for path in configs.fields_of(Config()) if not re.search(rf"\.{path.split('.')[-1]}\b", code)]
    assert not unread


def test_imports_of_config_experiments_and_tables():
    code = (
        "import sys; import lungjax.main, lungjax.tables.published; from lungjax.config import experiments; "
        "[experiments.load(n) for n in experiments.names()]; "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_network_channels():
    gray, three = (0.5,), (0.1, 0.2, 0.3)
    for channels, mean, std, expected in (
        (1, None, None, 1), (1, gray, None, 1), (3, gray, gray, 3), (1, three, None, 3), (1, None, three, 3),
    ):  # fmt: skip
        assert configs.InputSpec(channels=channels, mean=mean, std=std).network_channels == expected
