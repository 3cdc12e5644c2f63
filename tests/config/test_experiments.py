import pytest

from lungjax import config as configs
from lungjax.config import experiments, overrides


def test_every_experiment_loads_checks_and_is_listed():
    listing = experiments.listing()
    for name in experiments.names():
        config = experiments.load(name)
        configs.check(config)
        assert config.name.startswith(name)  # some add their network, so that two runs don't share a folder
        assert f"\n{name} " in "\n" + listing


def test_arguments_after_the_colon():
    config = experiments.load("cbr_folder:dataset=folder/mine,model=cbr_tiny")
    assert (config.data.dataset, config.model.name) == ("folder/mine", "cbr_tiny")


def test_a_file_and_a_saved_configuration_work_too(tmp_path):
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


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("cbr_foldr", "nearest: cbr_folder"),
        ("cbr_folder:modl=x", "no argument 'modl'; the nearest: model"),
        ("cbr_folder:model", "not key=value"),
        ("missing.py", "no such file"),
        ("missing.json", "no such file"),
    ],
)
def test_mistakes_are_named(choice, words):
    with pytest.raises(ValueError, match=words):
        experiments.load(choice)


def test_an_argument_of_the_wrong_type_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(epochs: float = 1.0): return epochs\n")
    with pytest.raises(ValueError, match="epochs.*expected float"):
        experiments.load(f"{path}:epochs=many")
    with pytest.raises(ValueError, match="returned float, not a lungjax Config"):
        experiments.load(str(path))
