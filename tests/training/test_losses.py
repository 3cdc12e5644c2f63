import jax.numpy as jnp
import numpy as np
from sklearn.metrics import log_loss

from lungjax.models import outputs
from lungjax.training import step


def loss(logits, labels, weights=None, smoothing=0.0, positive=None, classes=3):
    settings = {"label_smoothing": smoothing, "positive": positive}
    weights = jnp.ones(classes) if weights is None else jnp.asarray(weights)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    return np.asarray(step.cross_entropy(logits, labels, class_weights=weights, **settings))


def test_softmax_loss_against_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 3, 20)
    p = np.asarray(outputs.probabilities(jnp.asarray(logits), None), np.float64)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(loss(logits, labels).mean(), log_loss(labels, p, labels=[0, 1, 2]), rtol=1e-5)


def test_class_weights_and_label_smoothing_by_hand():
    uniform, labels = np.zeros((2, 3), np.float32), np.asarray([0, 2])
    np.testing.assert_allclose(loss(uniform, labels, [1.0, 1.0, 4.0]), np.log(3) * np.asarray([1, 4]), rtol=1e-6)
    logits = np.asarray([[2.0, 0.0, 0.0]], np.float32)
    log_p = logits[0] - np.log(np.exp(logits[0]).sum())
    expected = -(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2])
    np.testing.assert_allclose(loss(logits, [0], smoothing=0.3), [expected], rtol=1e-6)


def test_sigmoid_of_the_positive_class():
    logits = np.asarray([[3.0], [-1.0]], np.float32)
    p = 1 / (1 + np.exp(-logits[:, 0]))
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray(logits), 1), np.stack([1 - p, p], 1), rtol=1e-5)
    np.testing.assert_allclose(outputs.probabilities(jnp.asarray(logits), 0), np.stack([p, 1 - p], 1), rtol=1e-5)
    for positive in (0, 1):
        actual = loss(logits, [positive, 1 - positive], positive=positive, classes=2)
        np.testing.assert_allclose(actual, -np.log([p[0], 1 - p[1]]), rtol=1e-5)
    assert np.isfinite(loss([[500.0], [-500.0]], [0, 1], positive=1, classes=2)).all()
    assert outputs.class_logits(jnp.asarray(logits), 0).tolist() == [[3.0, 0.0], [-1.0, 0.0]]
