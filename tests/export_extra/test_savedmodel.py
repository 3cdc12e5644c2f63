"""SavedModel, with TensorFlow: python -m pytest tests/export_extra/test_savedmodel.py (pip install tensorflow-cpu)"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from random_weights import random_variables

from lungjax import models
from lungjax.config import InputSpec, ModelConfig, metadata
from lungjax.config.metadata import Metadata
from lungjax.export import savedmodel
from lungjax.export.functions import Programs

tf = pytest.importorskip("tensorflow", reason="SavedModel needs TensorFlow: pip install tensorflow-cpu")


def make(name, side):
    spec = InputSpec(size=(side, side), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    module = models.build(ModelConfig(name=name, dtype="float32"), 3)
    variables = jax.tree.map(jnp.asarray, random_variables(module, (side, side, 3)))
    told = Metadata(name, ("a", "b", "c"), spec, "folder", temperature=0.7)
    return Programs(told, module, {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})})


@pytest.mark.parametrize("name, side", [("cbr_tiny", 128), ("xray_cnn", 64), ("mobilenetv3_small", 64)])
def test_tensorflow_gives_the_networks_answers(name, side, tmp_path):
    programs = make(name, side)
    path, worst = savedmodel.write(programs, tmp_path)
    assert worst <= 1e-5
    loaded = tf.saved_model.load(str(path))
    for batch in (1, 3, 8):
        pixels = programs.sample(batch)
        wanted = programs.reference(pixels)
        for found in (loaded.signatures["serving_default"](pixels=tf.constant(pixels)), loaded.predict(pixels)):
            span = wanted["logits"].max() - wanted["logits"].min()
            assert np.abs(found["logits"].numpy() - wanted["logits"]).max() <= 1e-5 * span
            np.testing.assert_allclose(found["probabilities"].numpy(), wanted["probabilities"], atol=1e-5)
    assert metadata.read(path / "assets.extra/model.json") == programs.metadata
    assert str(Path(models.__file__).parent.parent).encode() not in (path / "saved_model.pb").read_bytes()


def test_one_that_differs_is_not_kept_and_an_old_one_stays(tmp_path, monkeypatch):
    (tmp_path / "savedmodel").mkdir()
    (tmp_path / "savedmodel/old").write_text("")
    right = Programs.reference
    monkeypatch.setattr(Programs, "reference", lambda *a: {name: 1.01 * value for name, value in right(*a).items()})
    with pytest.raises(ValueError, match="savedmodel: its logits differ"):
        savedmodel.write(make("xray_cnn", 64), tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["savedmodel", "savedmodel/old"]
