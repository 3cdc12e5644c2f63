"""SavedModel, with TensorFlow: python -m pytest tests/export_extra/test_savedmodel.py (pip install tensorflow-cpu)"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_onnx import make

from lungjax import models
from lungjax.config import metadata
from lungjax.export import savedmodel

tf = pytest.importorskip("tensorflow", reason="SavedModel needs TensorFlow: pip install tensorflow-cpu")


@pytest.mark.parametrize("name", ["cbr_tiny", "xray_cnn", "mobilenetv3_small"])
def test_file_equals_network(name, tmp_path):
    functions = make(name)
    path, worst = savedmodel.write(functions, tmp_path)
    assert worst <= 1e-5
    loaded = tf.saved_model.load(str(path))
    for batch in (1, 3, 8):
        pixels = functions.sample(batch)
        expected = functions.reference(pixels)
        for outputs in (loaded.signatures["serving_default"](pixels=tf.constant(pixels)), loaded.predict(pixels)):
            for key in ("logits", "features"):
                assert np.abs(outputs[key].numpy() - expected[key]).max() <= 1e-5 * np.ptp(expected[key])
            np.testing.assert_allclose(outputs["probabilities"].numpy(), expected["probabilities"], atol=1e-5)
    assert metadata.read(path / "assets.extra/model.json") == functions.metadata
    assert str(Path(models.__file__).parent.parent).encode() not in (path / "saved_model.pb").read_bytes()


def test_wrong_export_is_not_kept(tmp_path):
    (tmp_path / "savedmodel").mkdir()
    (tmp_path / "savedmodel/old").write_text("")
    functions = make("xray_cnn")
    wrong = replace(functions)
    scaled = jax.tree.map(lambda leaf: 1.01 * leaf, functions.variables)
    wrong.__dict__["weights"] = replace(functions, variables=scaled).weights
    with pytest.raises(ValueError, match="differ"):
        savedmodel.write(wrong, tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["savedmodel", "savedmodel/old"]
