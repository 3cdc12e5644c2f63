"""model.pyz: equal to the network at any batch size, usable without lungjax, and safe to open."""

import csv
import io
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_bn
from PIL import Image
from random_weights import random_variables
from scipy import special

import lungjax
from lungjax import models
from lungjax.config import HeadConfig, InputSpec, ModelConfig
from lungjax.config.metadata import Metadata
from lungjax.explain import saliency
from lungjax.export import __main__ as export
from lungjax.export import stablehlo, triton
from lungjax.export.functions import Functions
from lungjax.inference import artifacts

SPEC = InputSpec(
    size=(24, 32), channels=1, crop="center", crop_size=(60, 80), interpolation="lanczos",
    mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3),
)  # fmt: skip
POINT = {"youden": {"threshold": 0.3, "sensitivity": 0.9, "specificity": 0.8}}
METADATA = Metadata(
    "small", ("left", "middle", "right"), SPEC, "folder/small", window=(0.0, 4000.0), temperature=1.7,
    points={"slice": {"left": POINT, "right": POINT}}, about={"best_step": 1, "fingerprint": "0f"},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small_bn", small_bn())
        yield


def make(metadata=METADATA, **fields):
    config = ModelConfig("small_bn", padding="same", dtype="float32", **fields)
    module = models.build(config, len(metadata.classes))
    variables = random_variables(module, (*metadata.input.size, metadata.input.network_channels))
    return Functions(metadata, config, module, jax.tree.map(jnp.asarray, variables))


@pytest.fixture(scope="module")
def small():
    return make()


@pytest.fixture(scope="module")
def pyz(small, tmp_path_factory):
    return stablehlo.write(small, tmp_path_factory.mktemp("pyz"))[0]


@pytest.fixture(scope="module")
def exported(pyz):
    return artifacts.read_pyz(pyz)


def images(batch):
    return np.random.default_rng(batch).integers(0, 256, (batch, *SPEC.size, 1), dtype=np.uint8)


def network_outputs(functions, pixels):
    """Logits and pooled features of a plain forward pass."""
    spec = functions.metadata.input
    x = (pixels.astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
    logits, features = jax.jit(partial(functions.module.apply, train=False))(functions.variables, x)
    return np.asarray(logits), np.asarray(features["last"]).mean((1, 2))


def test_outputs_at_any_batch_size(small, exported):
    for batch in (1, 3, 8):
        pixels = images(batch)
        logits, features = network_outputs(small, pixels)
        outputs = exported.outputs(pixels)
        assert np.abs(outputs["logits"] - logits).max() <= 1e-5 * np.ptp(logits)
        np.testing.assert_allclose(outputs["probabilities"], special.softmax(logits / 1.7, axis=1), atol=1e-6)
        np.testing.assert_allclose(outputs["features"], features, atol=1e-5)


def network_maps(functions, pixels, targets):
    explainer = saliency.Explainer(functions.module, functions.variables, SPEC, functions.metadata.positive)
    return explainer.maps(pixels, np.asarray(targets))[0]


def test_gradcam_maps(small, exported):
    pixels = images(3)
    predicted = exported.outputs(pixels)["logits"].argmax(1)
    for targets, expected in (([-1, -1, -1], predicted), ([0, 1, 2], [0, 1, 2]), ([2, 0, 2], [2, 0, 2])):
        maps = exported.gradcam(pixels, np.asarray(targets))
        np.testing.assert_allclose(maps, network_maps(small, pixels, expected), atol=1e-5)
        assert maps.shape == (3, *SPEC.size) and maps.max() > 0.9


def test_sigmoid_head(tmp_path):
    functions = make(
        replace(METADATA, classes=("sick", "well"), positive=0, points={}), head=HeadConfig(output="sigmoid")
    )
    exported = artifacts.read_pyz(stablehlo.write(functions, tmp_path)[0])
    pixels = images(2)
    z = network_outputs(functions, pixels)[0][:, 0]
    outputs = exported.outputs(pixels)
    np.testing.assert_allclose(outputs["logits"], np.stack([z, 0 * z], 1), atol=1e-5)
    np.testing.assert_allclose(outputs["probabilities"][:, 0], special.expit(z / 1.7), atol=1e-6)
    for target in (0, 1):
        maps = exported.gradcam(pixels, np.full(2, target))
        np.testing.assert_allclose(maps, network_maps(functions, pixels, [target, target]), atol=1e-5)


def test_forms_of_each_platform(exported):
    assert tuple(exported.programs["predict"].platforms) == ("cpu", "cuda", "tpu")
    text = exported.programs["predict"].mlir_module()
    # On a CPU the first convolution is a sum of slices, isolated in a call; elsewhere it is XLA's own.
    assert 'inlineable = "false"' in text and "stablehlo.convolution" in text


STRANGER = """
import sys, zipimport
sys.modules.update(dict.fromkeys(
    ["flax", "absl", "skimage", "tensorflow_datasets", "orbax", "grain", "matplotlib"]))  # can't be imported
path, out, *names = sys.argv[1:]
sys.path.insert(0, path)
sys.argv = [path, *names, "--maps", out]
code = compile(zipimport.zipimporter(path).get_source("__main__"), path + "/__main__.py", "exec")
space = {"__name__": "stranger", "__file__": path + "/__main__.py"}
exec(code, space)
space["BATCH"] = 2
result = space["main"]()
assert all(m.__file__.startswith(path) for n, m in sys.modules.items() if n.split(".")[0] == "lungjax")
sys.exit(result)
"""


def test_script_without_lungjax(pyz, tmp_path):
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (90, 120), np.uint8)
    for name, array in {
        "alpha.png": rng.integers(0, 256, (64, 81, 4), np.uint8),
        "color.png": rng.integers(0, 256, (70, 100, 3), np.uint8),
        "deep.png": gray.astype(np.uint16) * 15,
        "small.jpg": gray[:40, :30],
    }.items():
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "color.png").read_bytes()[:500])
    (tmp_path / f"{'n' * 246}.png").write_bytes((tmp_path / "color.png").read_bytes())
    names = sorted(str(p) for p in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(pyz), str(tmp_path / "maps"), *names], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr  # since broken.png fails
    assert "broken.png: damaged or truncated" in done.stderr and "research use only" in done.stderr
    rows = {row["file"]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert sorted(rows) == names
    broken = rows.pop(str(tmp_path / "broken.png"))
    assert "damaged" in broken["error"] and broken["predicted"] == ""
    model = lungjax.load(pyz)
    for (name, row), p in zip(rows.items(), model.predict(list(rows)), strict=True):
        assert row["predicted"] == METADATA.classes[int(p.argmax())] and not row["error"], name
        np.testing.assert_allclose([float(row[f"p_{c}"]) for c in METADATA.classes], p, atol=2e-6)
        assert row["called_left"] == ("yes" if p[0] >= 0.3 else "no") and row["called_middle"] == ""
    written = np.asarray(Image.open(tmp_path / "maps/alpha_gradcam.png"))
    assert np.abs(written - model.explain(names[0])[0] * 255).max() <= 0.51


def test_script_without_masks(pyz, tmp_path):
    segmented = replace(METADATA, stage="lungs")
    altered(pyz, tmp_path / "lungs.pyz", {"model.json": segmented.to_json().encode()})
    Image.fromarray(images(1)[0, ..., 0]).save(tmp_path / "a.png")
    run = partial(subprocess.run, capture_output=True, text=True)
    done = run([sys.executable, "-c", STRANGER, tmp_path / "lungs.pyz", tmp_path, tmp_path / "a.png"])
    assert "pip install scikit-image" in done.stderr and "--prepared" in done.stderr and not done.stdout


def test_script_in_a_damaged_file(pyz, tmp_path):
    path = altered(pyz, tmp_path / "model.pyz", {"artifact.json": b"{}"})
    for arguments in ([], ["--help"], [tmp_path / "a.png"]):
        done = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "artifact.json is not from" in done.stderr and done.stderr.count("\n") == 1


def altered(pyz, path, members, compression=zipfile.ZIP_STORED):
    """Writes a copy of the file with replaced members; those that are None are left out."""
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            data = members.get(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return path


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_damaged_and_foreign_pyz(pyz, tmp_path):
    data = pyz.read_bytes()
    weights = dict(np.load(io.BytesIO(zipfile.ZipFile(pyz).read("weights.npz"))))
    first = next(iter(weights))
    at = data.index(weights[first].tobytes())
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    program = zipfile.ZipFile(pyz).read("predict.stablehlo")
    called = program.replace(b"shape_assertion", b"shape_assertioX")
    assert called != program
    path, entry = tmp_path / "model.pyz", b"PK\1\2\x14\3\x14"  # of the zip directory
    make = partial(altered, pyz, path)
    for write, word in (
        (lambda: path.write_bytes(b"hello"), "not a zip"),
        (lambda: path.write_bytes(data[: len(data) // 2]), "not a zip"),
        (lambda: path.write_bytes(flipped), "weights.npz is missing or damaged"),
        (lambda: path.write_bytes(data.replace(entry, entry[:-1] + b"\xff")), "not a zip"),  # of a future version
        (lambda: path.write_bytes(data.replace(entry + b"\0\0", entry + b"\0\1")), "damaged.*encrypted"),
        (lambda: make({"artifact.json": None}), "not from lungjax.export"),
        (lambda: make({"artifact.json": b"[1]"}), "not from lungjax.export"),
        (lambda: make({"artifact.json": b'{"jax": "1", "compiler_options": "no"}'}), "artifact.json is not from"),
        (lambda: make({"weights.npz": None}), "weights.npz is missing or"),
        (lambda: make({}, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: make({"model.json": b"{}"}), "model.json"),
        (lambda: make({"weights.npz": npz(a=np.asarray([print], object))}), "weights.npz can't be read"),
        (lambda: make({"weights.npz": npz(a=np.zeros(3))}), "float32"),
        (lambda: make({"predict.stablehlo": b"x" * 99}), "predict.stablehlo: damaged"),
        (lambda: make({"predict.stablehlo": called}), "shape_assertioX"),
    ):
        write()
        with pytest.raises(ValueError, match=word):
            artifacts.read_pyz(path)
    with pytest.raises(ValueError, match=r"uint8 \[B, 24, 32, 1\]"):
        lungjax.load(pyz).outputs(np.zeros((1, 24, 32, 3), np.uint8))


def test_refresh_of_another_jax_version(pyz, tmp_path, capsys):
    program = zipfile.ZipFile(pyz).read("predict.stablehlo").replace(b"convolution_v1", b"convolution_v9")
    about = json.loads(zipfile.ZipFile(pyz).read("artifact.json")) | {"jax": "0.99.1"}
    members = {"artifact.json": json.dumps(about).encode(), "predict.stablehlo": program}
    old = altered(pyz, tmp_path / "model.pyz", members)
    for word in ("jax 0.99.1, and .* 6 months after or 3 weeks before", re.escape(f"lungjax.export --refresh={old}")):
        with pytest.raises(ValueError, match=word):
            artifacts.read_pyz(old)
    assert commands.run(export, f"--refresh={old}") == 0
    assert f"Guaranteed to run with jax {jax.__version__}" in capsys.readouterr().out
    assert old.read_bytes() == pyz.read_bytes()  # in place, with bit-identical weights
    for network, word in (({"name": "simple"}, "another network"), ({"nam": 1}, "no field"), (None, "artifact.json")):
        altered(pyz, old, {"artifact.json": json.dumps(about | {"networks": [network]}).encode()})
        assert commands.run(export, f"--refresh={old}") == 2 and word in capsys.readouterr().err


def test_compiler_option_filter(pyz, tmp_path):
    about = json.loads(zipfile.ZipFile(pyz).read("artifact.json"))
    about["compiler_options"] = {"xla_dump_to": str(tmp_path / "dump"), "xla_cpu_prefer_vector_width": 256}
    path = altered(pyz, tmp_path / "model.pyz", {"artifact.json": json.dumps(about).encode()})
    assert artifacts.read_pyz(path).compiler_options == {"xla_cpu_prefer_vector_width": 256}


def test_byte_identical_files_of_equal_models(small, pyz, tmp_path):
    data = pyz.read_bytes()
    assert stablehlo.write(small, tmp_path)[0].read_bytes() == data
    for folder in (Path(lungjax.__file__).parent, Path(jax.__file__).parent, Path(__file__).parents[1]):
        assert str(folder).encode() not in data  # no paths of this machine


def test_removal_of_a_wrong_export(small, tmp_path):
    (tmp_path / "model.pyz").write_bytes(b"old")
    scaled = replace(small, variables=jax.tree.map(lambda leaf: 1.01 * leaf, small.variables))
    wrong = replace(small)
    wrong.__dict__["weights"] = scaled.weights  # not the weights of the network it is compared with
    with pytest.raises(ValueError, match="differ"):
        stablehlo.write(wrong, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pyz"] and (tmp_path / "model.pyz").read_bytes() == b"old"


def test_command(trained_run, tmp_path, capsys):
    assert commands.run(export, f"--model={trained_run.workdir}", f"--out={tmp_path}") == 0
    assert re.search(r"model\.pyz: \d\.\d MiB in \d+ s; relative .* \de[-+]0\d; \d+\.\d ms", capsys.readouterr().out)
    run, exported = lungjax.load(trained_run.workdir), lungjax.load(tmp_path)  # the folder with the file
    paths = sorted(trained_run.images.glob("*.png"))[:3]
    assert exported.metadata == run.metadata and exported.methods == ("gradcam",)
    np.testing.assert_allclose(exported.logits(paths), run.logits(paths), atol=1e-5)
    np.testing.assert_allclose(exported.features(paths), run.features(paths), atol=1e-5)
    np.testing.assert_allclose(exported.explain(paths), run.explain(paths), atol=1e-4)
    with pytest.raises(ValueError, match="gradcam"):
        exported.explain(paths, method="occlusion")


def test_command_errors(monkeypatch, tmp_path, capsys):
    for module in ("onnx", "jax2onnx", "tensorflow"):
        monkeypatch.setitem(sys.modules, module, None)
    given = f"--model={tmp_path}"
    cases = (
        ([], 1, "give --model=RUN"), ([given, "--format="], 1, "--format is empty"),
        ([given, "--format=onx"], 2, "did you mean onnx"), ([given], 2, "no trained run"),
        (["--refresh=old.pyz"], 1, "--out=DIR"), ([given, "--format=jax,onnx"], 2, "needs the package jax2onnx"),
        ([given, "--format=triton"], 2, "needs the package jax2onnx"),
        ([given, "--format=savedmodel"], 2, "needs the package tensorflow"),
    )  # fmt: skip
    commands.assert_errors(capsys, export, cases)
    assert not list(tmp_path.iterdir())


def test_triton_names():
    metadata = replace(METADATA, name="my run: 3/a")
    assert 'name: "my_run_3_a"' in triton.config(metadata, 8)
    assert triton.model_name(replace(METADATA, name="..")) == "model"
    assert "(1, 24, 32, 1)" in triton.readme(metadata) and "research use only" in triton.readme(metadata)
