import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lungjax import overrides, state, train
from lungjax.checkpoint import Checkpoints, newest, restore_best
from lungjax.config import Config, InputSpec, ModelConfig
from lungjax.weights import load


class OneLayer(nn.Module):
    """The network whose state `make` gives."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(4, use_bias=False, name="dense")(images.mean((1, 2)))


def make(step: int) -> state.TrainState:
    kernel = jnp.full((3, 4), float(step))
    return state.TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"dense": {"kernel": kernel}},
        batch_stats={},
        opt_state=({"dense": {"kernel": kernel * 2}}, {}),
    )


def like() -> state.TrainState:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make(0))


def test_the_newest_state_comes_back_with_its_progress(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like()) is None
        for step in (1, 2, 3):
            checkpoints.save(make(step), {**train.new_progress(), "best": 0.1 + step})
    with Checkpoints(tmp_path) as checkpoints:
        found, progress = checkpoints.restore(like())
    assert int(found.step) == 3 and progress["best"] == 3.1
    np.testing.assert_array_equal(found.opt_state[0]["dense"]["kernel"], 6.0)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints/last").iterdir())
    assert kept == [2, 3]


def test_only_the_newest_best_is_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (4, 8, 12):
            checkpoints.save_best(make(step))
    found, step = restore_best(tmp_path, like().variables)
    assert step == newest(tmp_path, "best") == 12
    np.testing.assert_array_equal(found["params"]["dense"]["kernel"], 12.0)
    assert [p.name for p in (tmp_path / "checkpoints/best").iterdir()] == ["12"]


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(5), train.new_progress())
        again = make(5).replace(params={"dense": {"kernel": jnp.zeros((3, 4))}})
        checkpoints.save(again, train.new_progress())
        found, _ = checkpoints.restore(like())
    np.testing.assert_array_equal(found.params["dense"]["kernel"], 0.0)


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(5), train.new_progress())
    saved = tmp_path / "checkpoints/last"
    (saved / "6.orbax-checkpoint-tmp").mkdir()
    (saved / "6.orbax-checkpoint-tmp" / "state").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(like())
    assert int(found.step) == 5
    assert newest(tmp_path, "last") == 5


def test_a_source_without_weights_is_named(tmp_path):
    assert load.parse(ModelConfig(weights="none")) == load.Source()
    with pytest.raises(ValueError, match="model.weights='imagenett': allowed are none.*run:WORKDIR"):
        load.parse(ModelConfig(weights="imagenett"))
    with pytest.raises(ValueError, match="no trained run"):
        load.parse(ModelConfig(weights=f"run:{tmp_path}"))
    with pytest.raises(ValueError, match="no best weights there yet"):
        restore_best(tmp_path)


def test_the_best_without_a_layout_comes_as_numpy(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(make(4))
    found, _ = restore_best(tmp_path)
    assert isinstance(found["params"]["dense"]["kernel"], np.ndarray) and found["batch_stats"] == {}
    np.testing.assert_array_equal(found["params"]["dense"]["kernel"], 4.0)


def test_reading_the_best_leaves_a_save_in_progress_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(make(4))
    unfinished = tmp_path / "checkpoints/best/8.orbax-checkpoint-tmp"
    unfinished.mkdir()
    for layout in (None, like().variables):
        found, step = restore_best(tmp_path, layout)
        assert step == 4
        np.testing.assert_array_equal(found["params"]["dense"]["kernel"], 4.0)
    config = Config(input=InputSpec(size=(8, 8), channels=3), model=ModelConfig(weights=f"run:{tmp_path}"))
    (tmp_path / "config.json").write_text(overrides.to_json(config))
    start = load.leaves(config, OneLayer())
    assert list(start) == ["dense/kernel"]
    np.testing.assert_array_equal(start["dense/kernel"], 4.0)
    assert unfinished.is_dir()
