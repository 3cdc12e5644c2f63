"""The file that Python runs: equal to the network at any batch size, without lungjax, and safe to open."""

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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from conftest import small_bn
from PIL import Image
from random_weights import random_variables
from scipy import special

from lungjax import models
from lungjax.config import Config, HeadConfig, InputSpec, ModelConfig, metadata
from lungjax.config.metadata import Metadata
from lungjax.data.imaging.images import decode
from lungjax.explain import saliency
from lungjax.export import __main__ as command
from lungjax.export import functions, stablehlo, triton
from lungjax.export.functions import Programs
from lungjax.inference import api, artifacts, predictor
from lungjax.models.layers import Conv
from lungjax.models.ops import conv
from lungjax.models.ops.pooling import avg_pool_2x2
from lungjax.runtime import environment, files

SPEC = InputSpec(
    size=(24, 32), channels=1, crop="center", crop_size=(60, 80), interpolation="lanczos",
    mean=(0.2, 0.3, 0.4), std=(0.5, 0.4, 0.3),
)  # fmt: skip
POINT = {"youden": {"threshold": 0.3, "sensitivity": 0.9, "specificity": 0.8}}
TOLD = Metadata(
    "small", ("left", "middle", "right"), SPEC, "folder/small", window=(0.0, 4000.0), temperature=1.7,
    points={"slice": {"left": POINT, "right": POINT}}, about={"best_step": 1, "fingerprint": "0f"},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Each program runs a few times: compiled quickly, not well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "compiler_options", lambda *_, **__: {"xla_backend_optimization_level": 0})
        patch.setattr(artifacts, "OPTIONS", (*artifacts.OPTIONS, "xla_backend_optimization_level"))
        yield


def made(told=TOLD, **fields):
    module = small_bn()(outputs=1 if told.positive is not None else 3, padding="same", **fields)
    variables = random_variables(module, (*told.input.size, told.input.network_channels))
    return Programs(told, module, jax.tree.map(jnp.asarray, variables))


@pytest.fixture(scope="module")
def small():
    return made()


@pytest.fixture(scope="module")
def pyz(small, tmp_path_factory):
    return stablehlo.write(small, tmp_path_factory.mktemp("pyz"))[0]


@pytest.fixture(scope="module")
def exported(pyz):
    return artifacts.read_pyz(pyz)


def images(batch):
    return np.random.default_rng(batch).integers(0, 256, (batch, *SPEC.size, 1), dtype=np.uint8)


def own_logits(programs, pixels):
    """The network's, of a forward pass as in the README."""
    spec = programs.metadata.input
    normal = (pixels.astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
    return np.asarray(programs.module.apply(programs.variables, normal, train=False)[0])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_logits_and_calibrated_probabilities_are_the_networks_at_any_batch_size(small, exported, batch):
    pixels = images(batch)
    wanted = own_logits(small, pixels)
    found = exported.outputs(pixels)
    assert np.abs(found["logits"] - wanted).max() <= 1e-5 * (wanted.max() - wanted.min())
    np.testing.assert_allclose(found["probabilities"], special.softmax(wanted / 1.7, axis=1), atol=1e-6)
    assert len(found["probabilities"]) == batch


def test_maps_are_the_explainers(small, exported):
    pixels = images(3)
    explainer = saliency.Explainer(small.module, small.variables, SPEC)
    for targets in (None, [0, 1, 2], [2, 0, 2]):
        wanted, _ = explainer.maps(pixels, None if targets is None else np.asarray(targets))
        maps, probabilities = exported.gradcam(pixels, np.asarray([-1, -1, -1] if targets is None else targets))
        np.testing.assert_allclose(maps, wanted, atol=1e-5)
        np.testing.assert_allclose(probabilities, exported.predict(pixels), atol=1e-6)
        assert maps.shape == (3, *SPEC.size) and wanted.max() > 0.9
    assert not np.allclose(exported.gradcam(pixels, np.full(3, 0))[0], exported.gradcam(pixels, np.full(3, 2))[0])


def test_a_sigmoid_speaks_for_its_class(tmp_path):
    told = replace(TOLD, classes=("sick", "well"), positive=0, points={})
    programs = made(told, head=HeadConfig(output="sigmoid"))
    exported = artifacts.read_pyz(stablehlo.write(programs, tmp_path)[0])
    pixels = images(2)
    z = own_logits(programs, pixels)[:, 0]
    found = exported.outputs(pixels)
    np.testing.assert_allclose(found["logits"], np.stack([z, 0 * z], 1), atol=1e-5)
    np.testing.assert_allclose(found["probabilities"][:, 0], special.expit(z / 1.7), atol=1e-6)
    explainer = saliency.Explainer(programs.module, programs.variables, SPEC, positive=0)
    for target in (0, 1):
        np.testing.assert_allclose(
            exported.gradcam(pixels, np.full(2, target))[0], explainer.maps(pixels, np.full(2, target))[0], atol=1e-5
        )


def test_programs_are_for_every_platform_and_of_plain_convolutions(exported):
    assert exported.platforms == ("cpu", "cuda", "tpu")
    text = exported.programs["predict"].mlir_module()
    # jax writes each convolution once a platform; two of the network's.
    assert len(re.findall("= stablehlo.convolution", text)) == 2 * 3
    assert not re.search("optimization_barrier|stablehlo.if|stablehlo.dot_general.*x8xf32.*x8xf32", text)


@pytest.mark.parametrize(
    "layer, groups, strides",
    [(Conv(6, 3, groups=-1), 6, 1), (Conv(6, 3, 2, groups=-1), 6, 2), (Conv(4, 1), 1, 1), (Conv(4, 1, 2), 1, 2)],
)
def test_a_layer_is_one_convolution_in_plain_forms_and_equal(layer, groups, strides):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 9, 6)), jnp.float32)
    variables = random_variables_of(layer, x)
    run = jax.jit(lambda x: layer.apply(variables, x))
    usual = run(x)  # traced in the usual form first: the plain one may not be answered from its cache
    with conv.plain_forms():
        text = run.lower(x).as_text()
        np.testing.assert_allclose(run(x), usual, atol=1e-5)
    assert set(re.findall(r"stablehlo\.(\w+)", text)) == {"constant", "convolution"}
    assert len(re.findall("= stablehlo.convolution", text)) == 1
    assert f"feature_group_count = {groups} " in text and f"stride = [{strides}, {strides}]" in text + "stride = [1, 1]"
    assert "convolution" not in run.lower(x).as_text()


def random_variables_of(layer, x):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: np.random.default_rng(1).normal(size=leaf.shape).astype(np.float32), shapes)


def test_halving_is_one_reduction_in_plain_forms():
    with conv.plain_forms():
        assert "reduce_window" in str(jax.make_jaxpr(avg_pool_2x2)(jnp.zeros((1, 4, 4, 2))))
        assert "platform_index" not in str(jax.make_jaxpr(avg_pool_2x2)(jnp.zeros((1, 4, 4, 2))))
    assert "platform_index" in str(jax.make_jaxpr(avg_pool_2x2)(jnp.zeros((1, 4, 4, 2))))


STRANGER = """
import sys, zipimport
sys.modules.update(dict.fromkeys(
    ["flax", "absl", "skimage", "tensorflow_datasets", "orbax", "grain", "matplotlib"]))  # can't be imported
path, out, *names = sys.argv[1:]
sys.path.insert(0, path)
sys.argv = [path, *names, "--maps", out, "--batch=2"]
code = compile(zipimport.zipimporter(path).get_source("__main__"), path + "/__main__.py", "exec")
space = {"__name__": "stranger", "__file__": path + "/__main__.py"}
exec(code, space)
result = space["main"]()
assert all(m.__file__.startswith(path) for n, m in sys.modules.items() if n.split(".")[0] == "lungjax")
import pathlib, numpy as np
told = space["artifacts"].read_pyz(path).metadata
good = [name for name in names if "broken" not in name]
np.save(out + "/pixels.npy", np.stack([space["picture"](pathlib.Path(n), told, None, False)[0] for n in good]))
sys.exit(result)
"""


def test_a_stranger_without_lungjax_gets_the_predictors_answers(pyz, tmp_path):
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (90, 120), np.uint8)
    for name, picture in {
        "gray.png": Image.fromarray(gray),
        "colour.png": Image.fromarray(rng.integers(0, 256, (70, 100, 3), np.uint8)),
        "clear.png": Image.fromarray(rng.integers(0, 256, (64, 81, 4), np.uint8)),
        "deep.png": Image.fromarray(gray.astype(np.uint16) * 15),
        "small.jpg": Image.fromarray(gray[:40, :30]),
    }.items():
        picture.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "gray.png").read_bytes()[:500])
    names = sorted(str(p) for p in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(pyz), str(tmp_path / "maps"), *names], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr  # of the broken one
    assert "broken.png: damaged or truncated" in done.stderr and "research use only" in done.stderr
    rows = {row["file"]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert list(rows) == names
    model = predictor.open_model(pyz)
    good = [name for name in names if "broken" not in name]
    window = TOLD.window
    pictures = np.stack([model.picture(decode(Path(name).read_bytes(), window)).pixels for name in good])
    np.testing.assert_array_equal(np.load(tmp_path / "maps/pixels.npy"), pictures)  # bit for bit
    for name, p in zip(good, model(pictures), strict=True):
        assert rows[name]["predicted"] == TOLD.classes[int(p.argmax())] and not rows[name]["error"]
        np.testing.assert_allclose([float(rows[name][f"p_{c}"]) for c in TOLD.classes], p, atol=2e-6)
        assert rows[name]["called_left"] == ("yes" if p[0] >= 0.3 else "no") and rows[name]["called_middle"] == ""
    maps, _ = model.explain(pictures[:1])
    drawn = np.asarray(Image.open(tmp_path / "maps/clear_gradcam.png"))
    assert np.abs(drawn - maps[0] * 255).max() <= 0.51
    assert "damaged" in rows[names[0]]["error"] and rows[names[0]]["predicted"] == ""


def test_a_network_of_cut_out_images_says_what_it_takes(pyz, tmp_path):
    told = replace(TOLD, stage="lungs")
    altered(pyz, tmp_path / "lungs.pyz", {"model.json": told.to_json().encode()})
    Image.fromarray(images(1)[0, ..., 0]).save(tmp_path / "a.png")
    run = partial(subprocess.run, capture_output=True, text=True)
    done = run([sys.executable, "-c", STRANGER, tmp_path / "lungs.pyz", tmp_path, tmp_path / "a.png"])
    assert "pip install scikit-image" in done.stderr and "--prepared" in done.stderr and not done.stdout


def altered(pyz, path, members, compression=zipfile.ZIP_STORED):
    """Writes a copy of the file with other members; one that is None is left out."""
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


def test_foreign_newer_and_damaged_files_are_named(pyz, tmp_path):
    data = pyz.read_bytes()
    about = json.loads(zipfile.ZipFile(pyz).read("artefact.json"))
    weights = dict(np.load(io.BytesIO(zipfile.ZipFile(pyz).read("weights.npz"))))
    first = next(iter(weights))
    at = data.index(weights[first].tobytes())
    flipped = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
    program = zipfile.ZipFile(pyz).read("predict.stablehlo")
    called = program.replace(b"shape_assertion", b"shape_assertioX")
    assert called != program
    make = partial(altered, pyz, tmp_path / "model.pyz")
    for write, message in [
        (lambda: (tmp_path / "model.pyz").write_bytes(b"hello"), "no zip"),
        (lambda: (tmp_path / "model.pyz").write_bytes(data[: len(data) // 2]), "no zip"),
        (lambda: (tmp_path / "model.pyz").write_bytes(flipped), "weights.npz is damaged"),
        (lambda: make({"artefact.json": None}), "not one of lungjax.export"),
        (lambda: make({"artefact.json": b"[1]"}), "not that of lungjax.export"),
        (lambda: make({"artefact.json": json.dumps({**about, "format": 2}).encode()}), "newer lungjax"),
        (lambda: make({"weights.npz": None}), "weights.npz is missing"),
        (lambda: make({}, zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda: make({"model.json": b"{}"}), "no model.json of lungjax"),
        (lambda: make({"weights.npz": npz(a=np.asarray([print], object))}), "weights.npz can't be read"),
        (lambda: make({"weights.npz": npz(a=np.zeros(3))}), "float32 arrays alone"),
        (lambda: make({"weights.npz": npz(**{**weights, first: weights[first][..., :1]})}), "doesn't fit"),
        (lambda: make({"model.json": replace(TOLD, input=replace(SPEC, size=(32, 32))).to_json().encode()}), "fit"),
        (lambda: make({"predict.stablehlo": b"x" * 99}), "predict.stablehlo can't be read"),
        (lambda: make({"gradcam.stablehlo": program}), "gradcam.stablehlo doesn't fit"),
        (lambda: make({"predict.stablehlo": called}), "calls shape_assertioX outside"),
    ]:
        write()
        with pytest.raises(ValueError, match=message):
            artifacts.read_pyz(tmp_path / "model.pyz")
    with pytest.raises(ValueError, match="no such file"):
        artifacts.read_pyz(tmp_path / "gone.pyz")
    with pytest.raises(ValueError, match=r"wanted uint8 \[B, 24, 32, 1\]"):
        artifacts.read_pyz(pyz).predict(np.zeros((1, 24, 32, 3), np.uint8))


def test_the_compiler_gets_no_option_that_a_file_makes_up(pyz, tmp_path):
    about = json.loads(zipfile.ZipFile(pyz).read("artefact.json"))
    about["compiler_options"] = {"xla_dump_to": str(tmp_path / "dump"), "xla_cpu_prefer_vector_width": 256}
    path = altered(pyz, tmp_path / "model.pyz", {"artefact.json": json.dumps(about).encode()})
    assert artifacts.read_pyz(path).compiler_options == {"xla_cpu_prefer_vector_width": 256}


def test_equal_models_are_equal_files(small, pyz, tmp_path, monkeypatch):
    monkeypatch.setattr(Programs, "check", lambda *_: 0.0)
    data = pyz.read_bytes()
    assert stablehlo.write(small, tmp_path)[0].read_bytes() == data
    for place in (Path(api.__file__).parent, Path(jax.__file__).parent, Path(__file__).parents[1]):  # of this machine
        assert str(place).encode() not in data


def test_an_export_that_differs_is_not_kept_and_an_old_one_stays(small, tmp_path, monkeypatch):
    (tmp_path / "model.pyz").write_bytes(b"old")
    right = Programs.reference
    monkeypatch.setattr(Programs, "reference", lambda *a: {name: 1.01 * value for name, value in right(*a).items()})
    with pytest.raises(ValueError, match=r"model.pyz: its logits differ.*not kept"):
        stablehlo.write(small, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pyz"] and (tmp_path / "model.pyz").read_bytes() == b"old"


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    place = tmp_path / "out"
    for text in ("one", "two"):
        with files.atomic_folder(place, "mark") as new:
            (new / text).write_text(text)
            (new / "mark").write_text("")
        assert sorted(p.name for p in place.iterdir()) == ["mark", text]
    with pytest.raises(KeyError), files.atomic_folder(place, "mark") as new:
        (new / "three").write_text("")
        raise KeyError
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["out", "out/mark", "out/two"]
    with pytest.raises(ValueError, match="has no another, so it is no export"), files.atomic_folder(place, "another"):
        pass
    assert (place / "two").exists()


def run_of(programs, folder):
    """A run's folder as far as exports look at it, and what `api.load` makes of it."""
    (folder / metadata.FILE).write_text(TOLD.to_json())
    (folder / "data.json").write_text(json.dumps({"fingerprint": TOLD.about["fingerprint"]}))
    config = Config(name="small", input=SPEC, model=ModelConfig(name="small_bn", padding="same", dtype="bfloat16"))
    return api.Trained(config, TOLD.classes, programs.module, programs.variables, 1)


def test_the_command_writes_what_the_run_was_trained_to_do_in_float32(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "small_bn", small_bn())
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    trained = run_of(small, tmp_path)
    monkeypatch.setattr(api, "load", lambda _: trained)
    with flagsaver.flagsaver(workdir=str(tmp_path), format=["jax"], out=None):
        command.main([])
    assert re.search(r"model\.pyz: \d\.\d MiB in \d+ s; logits within \de-0\d", capsys.readouterr().out)
    exported = artifacts.read_pyz(tmp_path / "export/model.pyz")
    assert exported.metadata == TOLD
    wanted = own_logits(small, images(3))
    np.testing.assert_allclose(exported.outputs(images(3))["logits"], wanted, atol=1e-5)
    for content, message in [
        (None, "--mode=evaluate"),
        (replace(TOLD, classes=("a", "b", "c")), "is not of these weights"),
    ]:
        (tmp_path / metadata.FILE).unlink(missing_ok=True)
        if content:
            (tmp_path / metadata.FILE).write_text(content.to_json())
        with pytest.raises(ValueError, match=message):
            functions.of_run(tmp_path)


def test_the_command_names_what_is_wrong_before_it_works(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "prepare_jax", lambda: None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for flags, error, message in [
        ({"workdir": None}, app.UsageError, "--workdir=RUN is missing"),
        ({"format": []}, app.UsageError, "--format is empty"),
        ({"format": ["onx"]}, ValueError, "--format=onx: the nearest: onnx"),
        ({"format": ["jax", "onnx"]}, ValueError, r"needs the package jax2onnx: pip install -e '.\[export\]'"),
        ({"format": ["triton"]}, ValueError, "needs the package jax2onnx"),
        ({"format": ["savedmodel"]}, ValueError, "needs the package tensorflow"),
        ({"format": ["jax"]}, ValueError, "no trained run there"),
    ]:
        with (
            flagsaver.flagsaver(**{"workdir": str(tmp_path), "format": ["jax"], "out": None, **flags}),
            pytest.raises(error, match=message),
        ):
            command.main([])
    assert not list(tmp_path.iterdir())


def test_tritons_configuration_says_the_models_shapes():
    told = replace(TOLD, name="my run: 3/a")
    text = triton.config(told)
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert 'name: "my_run_3_a"' in text and triton.model_name(replace(TOLD, name="..")) == "model"
    assert re.search(r'name: "pixels"\s+data_type: TYPE_UINT8\s+dims: \[ 24, 32, 1 \]', text)
    assert re.findall(r'name: "(\w+)"\s+data_type: TYPE_FP32\s+dims: \[ (\d) \]', text) == [
        ("probabilities", "3"), ("logits", "3"),
    ]  # fmt: skip
    assert "(1, 24, 32, 1)" in triton.readme(told) and "research use only" in triton.readme(told)
