import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lungjax import config as configs
from lungjax.config import Config, overrides


def test_override_reads_each_type_by_the_field():
    config = Config()
    for assignment in (
        "optim.lr=3e-4",
        "train.epochs=2",
        "train.steps=1e3",
        "input.size=96,128",
        "train.maximize=false",
        "model.head.hidden=64,32",
        "model.head.dropout=0.5",
        "model.padding=same",
        "data.dataset=folder/mine",
        "input.mean=0.5",
        "optim.lr_factors=(stem|stage1)=0.1, ^head/(dense|hidden1)=10",
    ):
        config = overrides.override(config, assignment)
    assert config.optim.lr == 3e-4
    assert config.train.epochs == 2.0 and isinstance(config.train.epochs, float)
    assert config.train.steps == 1000 and isinstance(config.train.steps, int)
    assert config.input.size == (96, 128)
    assert config.train.maximize is False
    assert config.model.head.hidden == (64, 32)
    assert config.model.head.dropout == 0.5
    assert config.model.padding == "same"
    assert config.data.dataset == "folder/mine"
    assert config.input.mean == (0.5,)
    assert config.optim.lr_factors == ("(stem|stage1)=0.1", "^head/(dense|hidden1)=10")
    assert overrides.override(config, "model.padding=None").model.padding is None
    assert overrides.override(config, "input.mean=None").input.mean is None
    assert overrides.override(config, "input.size=(96, 128)").input.size == (96, 128)
    assert overrides.override(config, "model.head.hidden=[]").model.head.hidden == ()
    assert overrides.override(config, "input.size=64").input.size == (64, 64)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "optim.lr"]),
        ("optimm.lr=1", ["optim.lr"]),
        ("optim.lr=fast", ["optim.lr", "float", "fast"]),
        ("train.batch_size=2.5", ["train.batch_size", "int", "2.5"]),
        ("train.maximize=maybe", ["train.maximize", "bool"]),
        ("input.size=1,2,3", ["input.size", "int, int"]),
        ("optim=adam", ["section", "optim.name"]),
        ("optim.lr.x=1", ["optim.lr"]),
        ("optim.lr", ["path=value"]),
    ],
)
def test_override_errors_name_field_value_and_what_is_allowed(assignment, words):
    with pytest.raises(ValueError) as error:
        overrides.override(Config(), assignment)
    for word in words:
        assert word in str(error.value)


def test_json_round_trip_is_complete_and_strict():
    config = overrides.override(Config(), "model.head.hidden=64")
    config = overrides.override(config, "input.mean=0.1,0.2,0.3")
    config = overrides.override(config, "model.head.positive_class=COVID, 19")
    text = overrides.to_json(config)
    assert overrides.from_json(text) == config
    with pytest.raises(ValueError, match="optim.lrx.*nearest.*optim.lr"):
        overrides.from_json(text.replace('"lr"', '"lrx"'))
    with pytest.raises(ValueError, match="optim.lr.*expected float"):
        overrides.from_json(text.replace('"lr": 0.001', '"lr": "x"'))
    with pytest.raises(ValueError, match="not JSON"):
        overrides.from_json(text[:-5])


def test_difference_names_each_changed_field():
    other = overrides.override(overrides.override(Config(), "optim.lr=1"), "train.seed=4")
    assert overrides.difference(Config(), other) == ["optim.lr: 0.001 -> 1.0", "train.seed: 0 -> 4"]


@pytest.mark.parametrize(
    "assignment",
    [
        "input.crop=centre",
        "optim.name=adan",
        "train.batch_size=0",
        "train.epochs=-1",
        "train.accumulate=3",
        "input.channels=2",
        "input.std=0",
        "input.mean=0.1,0.2",
        "model.head.dropout=1",
        "model.head.output=sigmoid",
        "model.head.pool=mean",
        "model.head.activation=gelu",
        "optim.frozen_batch_norm=keras",
        "model.gray=sum",
        "model.padding=full",
        "model.epsilon=0",
        "input.std=0.2,0.2,0",
        "input.box_margin=0.1",
        "augment.box_jitter=0.05",
        "optim.lr=0",
    ],
)
def test_check_refuses_nonsense_and_names_the_field(assignment):
    config = overrides.override(Config(), assignment)
    with pytest.raises(ValueError, match=re.escape(assignment.split("=")[0])):
        configs.check(config)


def test_every_field_is_read_somewhere():
    package = Path(configs.__file__).parents[1]
    code = "\n".join(p.read_text() for p in package.rglob("*.py") if p.parent.name != "config")
    unread = [path for path in configs.fields_of(Config()) if not re.search(rf"\.{path.split('.')[-1]}\b", code)]
    assert not unread


def test_sections_carry_a_comment_per_field():
    """At its line's end, or on the lines above it, which may speak for two fields (mean and std)."""
    lines = Path(configs.__file__).with_name("schema.py").read_text().splitlines()
    sections = (configs.InputSpec, configs.DataConfig, configs.ModelConfig, configs.HeadConfig)
    for section in (*sections, configs.OptimConfig, configs.TrainConfig, configs.EvalConfig):
        start = lines.index(f"class {section.__name__}:")
        for field in dataclasses.fields(section):
            number = next(i for i in range(start, len(lines)) if lines[i].startswith(f"    {field.name}: "))
            above = [lines[number - 1].strip(), lines[number - 2].strip()]
            plain = "#" not in above[0] and above[0].startswith(
                tuple(f"{f.name}: " for f in dataclasses.fields(section))
            )
            assert "#" in lines[number] or above[0].startswith("#") or (plain and above[1].startswith("#")), field.name


def test_config_and_experiments_import_no_jax():
    code = (
        "import sys; from lungjax.config import experiments; from lungjax import main; "
        "[experiments.load(n) for n in experiments.names()]; "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_network_gets_as_many_channels_as_the_images_or_the_statistics_have():
    for channels, mean, std, wanted in (
        (1, None, None, 1),
        (1, (0.5,), None, 1),
        (3, None, None, 3),
        (3, (0.5,), (1.0,), 3),
    ):
        assert configs.InputSpec(channels=channels, mean=mean, std=std).network_channels == wanted
    assert configs.InputSpec(channels=1, mean=(0.1, 0.2, 0.3)).network_channels == 3
    assert configs.InputSpec(channels=1, std=(0.1, 0.2, 0.3)).network_channels == 3
