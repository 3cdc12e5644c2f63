import pytest

from lungjax import config as configs
from lungjax.config import experiments, overrides


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
