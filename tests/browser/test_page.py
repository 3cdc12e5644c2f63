"""The page of `python -m lungjax.serve` in a real browser: python -m pytest tests/browser

Needs `chromium` (Debian: apt-get install chromium) and the extra `serve`; about a minute. A small network is trained
and served. Files are dropped, chosen and pasted on the page; its content is compared with the answers of the service.
LUNGJAX_SCREENSHOTS=FOLDER keeps screenshots.
"""

import csv
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import chromium
import conftest
import numpy as np
import pytest
import scans
from PIL import Image
from services import wait_for
from visits import NAMELESS, OUT, READY, WATCH, card, change, click, drop, finished, picture, post, served, wait_for_map

TESTS = Path(__file__).parent.parent
CLASSES = ("left", "middle", "right")
EVIL = """<img src=x onerror="document.title='broken'"><b>bold&amp;.png"""
FORMULA = "=1+1,two.png"
TOKEN = "a-token-of-the-test"
PHONE, DESK = (360, 800), (1280, 900)
ONLINE = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("page") / "page_test"
    fields = ["name=page_test", "model.name=simple", "input.size=(64,64)", "optim.name=adam", "optim.lr=3e-3"]
    fields += ["train.steps=20", "train.eval_steps=20", "eval.draws=50"]
    command = [sys.executable, str(TESTS / "run_small.py"), str(out), *fields]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metadata = json.loads((out / "model.json").read_text("utf-8"))
    for points in metadata["points"]["slice"].values():  # with so few images both rules have the same threshold
        points["sensitivity_0.95"]["threshold"] /= 2
    (out / "model.json").write_text(json.dumps(metadata), "utf-8")
    return out


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Paths of images and of a file that is not an image, by kind."""
    folder = tmp_path_factory.mktemp("files")
    records = conftest.make_small_data().records
    paths = {"slice": folder / "slice.png", "evil": folder / EVIL, "formula": folder / FORMULA}
    for i, path in enumerate(paths.values()):
        path.write_bytes(records[48 + i]["image"])
    y, x = np.mgrid[:200, :300]
    photo = np.stack([255 * x // 299, 255 * y // 199, 255 - 255 * x // 299], axis=-1)
    paths |= {"photo": folder / "holiday.png", "garbage": folder / "garbage.png"}
    Image.fromarray(photo.astype(np.uint8)).save(paths["photo"])
    paths["garbage"].write_bytes(b"this is no image" * 10)
    return paths


@pytest.fixture(scope="session")
def service(trained):
    with served(trained) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    if chromium.program() is None:
        pytest.fail(chromium.MISSING)
    with chromium.Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser):
    """Opens pages; at the end none has contacted another site, logged an error, or stored anything."""
    pages = []

    def at(address, before=""):
        page = browser.open(address, *DESK, before=WATCH + before)
        pages.append((page, address))
        return page

    yield at
    for page, address in pages:
        asked = {event["request"]["url"].split(",")[0] for event in page.events("Network.requestWillBeSent")}
        assert all(url.startswith((address, "data:", f"blob:{address}")) for url in asked), asked
        assert page.run("violations") == []
        assert page.events("Runtime.exceptionThrown") == []
        assert [e for e in page.events("Runtime.consoleAPICalled") if e["type"] in ("error", "warning")] == []
        # Browsers log every 4xx answer; those are provoked here.
        entries = [event["entry"] for event in page.events("Log.entryAdded")]
        assert [entry for entry in entries if entry["source"] != "network"] == []
        assert page.run("document.cookie + localStorage.length + sessionStorage.length") == "00"
        assert page.run("indexedDB.databases().then((databases) => databases.length)") == 0
        page.close()


def test_dropped_image(opened, service, files):
    page = opened(service)
    drop(page, files["slice"])
    shown = card(page, files["slice"])
    expected = post(f"{service}predict", files["slice"])["results"][0]
    assert [name for name, *_ in shown["bars"]] == list(CLASSES)
    for name, number, called, width in shown["bars"]:
        probability = 100 * expected["probabilities"][name]
        assert number == pytest.approx(probability, abs=0.0501)
        assert width == pytest.approx(probability, abs=1.0)
        assert called == expected["decisions"][name]["called"]
    assert expected["predicted"] in shown["best"]
    point = next(one for one in expected["decisions"].values() if one["called"])
    words = shown["words"].replace("\xa0", " ")
    assert f"threshold of {100 * point['threshold']:.1f} %" in words
    assert f"sensitivity {100 * point['sensitivity']:.1f} %" in words
    assert f"specificity {100 * point['specificity']:.1f} %" in words
    wait_for_map(page)
    asked = f"{service}explain?class={expected['predicted']}&method=gradcam"
    maps = post(asked, files["slice"])["results"][0]
    assert page.run("document.querySelector('.heat').src") == maps["heat"]
    assert page.run("document.querySelector('.frame img').src") == maps["image"]
    page.until(
        f"document.getElementById('announcement').textContent.includes('{expected['predicted']}')"
    )  # for screen readers


def test_model_description(opened, service, trained):
    page = opened(service)
    page.until(READY)
    model = json.loads((trained / "model.json").read_text("utf-8"))
    shown = page.run("document.querySelector('aside').textContent").replace("\xa0", " ")
    facts = ("page_test", *CLASSES, "folder/small", "64 x 64 pixels, grayscale", "axial")
    assert [words for words in (*facts, *model["about"]["warnings"]) if words not in shown] == []
    low, high = model["scores"]["slice"]["intervals"]["accuracy"]
    assert f"{100 * model['scores']['slice']['accuracy']:.1f} %{100 * low:.1f} to {100 * high:.1f}" in shown
    rows = page.run("""[...document.querySelector("aside table").rows].map((row) =>
      [...row.cells].map((cell) => cell.firstChild?.textContent ?? ""))""")
    expected = [[name, *(str(model["counts"][split][name]) for split in ("train", "val", "test"))] for name in CLASSES]
    assert rows == [["", "train", "val", "test"], *expected]


def test_saliency_map_controls(opened, service, files):
    page = opened(service)
    drop(page, files["slice"])
    wait_for_map(page)
    first = page.run("document.querySelector('.heat').src")
    change(page, "input[type=range]", "80", "input")
    assert page.run("getComputedStyle(document.querySelector('.heat')).opacity") == "0.8"
    click(page, ".controls input[type=checkbox]")
    assert not page.run("document.querySelector('.heat').checkVisibility()")
    assert page.run("document.querySelector('.frame img').checkVisibility()")
    click(page, ".controls input[type=checkbox]")
    now = page.run("document.querySelector('.controls select').value")
    other = next(name for name in CLASSES if name != now)
    change(page, ".controls select", other)
    page.until(f"document.querySelector('figcaption').textContent.includes('{other}')")
    assert page.run("document.querySelector('.heat').src") != first
    expected = post(f"{service}explain?class={other}&method=gradcam", files["slice"])["results"][0]["heat"]
    assert page.run("document.querySelector('.heat').src") == expected
    change(page, "#method", "occlusion")
    page.until("document.querySelector('figcaption').textContent.includes('occlusion')")
    expected = post(f"{service}explain?class={other}&method=occlusion", files["slice"])["results"][0]["heat"]
    assert page.run("document.querySelector('.heat').src") == expected


def test_photo_garbage_and_html_in_names(opened, service, files):
    page = opened(service)
    drop(page, *files.values())
    photo = card(page, files["photo"])
    assert "Warning" in photo["warning"]
    assert "unlike" in photo["warning"].lower()
    assert len(photo["bars"]) == 3
    assert card(page, files["slice"])["warning"] is None
    bad = card(page, files["garbage"])
    assert "allowed are PNG" in bad["words"]
    assert bad["bars"] == []
    assert "1 failed" in page.run("document.getElementById('progress-text').textContent")
    evil = card(page, files["evil"])
    assert evil["inside"] == 0
    assert len(evil["bars"]) == 3
    assert page.run("document.title") == "page_test · lungjax"


def test_too_large_file(opened, service, files, tmp_path):
    page = opened(service)
    page.until(READY)
    most = page.run("fetch('model').then((answer) => answer.json()).then((model) => model.limits.file_bytes)")
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(most + 1)
    drop(page, files["slice"], big)
    assert card(page, files["slice"])["best"]
    assert "MiB" in card(page, big)["words"]
    sent = [event for event in page.events("Network.requestWillBeSent") if "predict" in event["request"]["url"]]
    assert len(sent) == 1


def test_operating_point_menu(opened, service, files):
    page = opened(service)
    drop(page, files["slice"], files["formula"])
    rules = page.run("[...document.getElementById('rule').options].map((one) => one.value)")
    assert rules == ["youden", "sensitivity_0.95"]
    texts = []
    for rule in reversed(rules):
        change(page, "#rule", rule)
        texts.append(page.run("document.getElementById('cards').innerText"))
        for name in ("slice", "formula"):
            expected = post(f"{service}predict?rule={rule}", files[name])["results"][0]["decisions"]
            called = {one: positive for one, _, positive, _ in card(page, files[name])["bars"]}
            assert called == {one: expected[one]["called"] for one in CLASSES}
    assert texts[0] != texts[1]


def test_downloads(opened, browser, service, files, tmp_path):
    page = opened(service)
    drop(page, files["formula"], files["evil"], files["garbage"])
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for button in ("#csv", "#json"):
        click(page, button)
    saved = {ending: tmp_path / f"page_test-results.{ending}" for ending in ("csv", "json")}
    wait_for(lambda: all(path.is_file() for path in saved.values()))
    expected = post(f"{service}predict", files["formula"])["results"][0]
    document = json.loads(saved["json"].read_text("utf-8"))
    assert "research use only" in document["notice"]
    assert [one["file"] for one in document["results"]] == [FORMULA, EVIL, "garbage.png"]
    assert document["results"][0]["probabilities"] == expected["probabilities"]
    assert "error" in document["results"][2]
    with saved["csv"].open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["file"] for row in rows] == [f"'{FORMULA}", EVIL, "garbage.png"]  # the first is not a formula
    for name in CLASSES:
        assert float(rows[0][f"p_{name}"]) == expected["probabilities"][name]
        assert rows[0][f"called_{name}"] == ("yes" if expected["decisions"][name]["called"] else "no")
    assert rows[2]["error"]
    assert "research use only" in rows[0]["notice"]


def test_keyboard(opened, service, files):
    page = opened(service)
    page.until(READY)
    page.key("Tab", 9)
    page.key("Tab", 9)
    assert page.run("document.activeElement.id") == "choose"
    assert page.run("getComputedStyle(document.getElementById('choose-label')).outlineStyle") == "solid"
    page.call("Page.setInterceptFileChooserDialog", enabled=True)
    page.key("Enter", 13, "\r")
    wait_for(lambda: page.events("Page.fileChooserOpened"))
    page.choose("#choose", [files["slice"], files["evil"]])
    finished(page, 2)
    page.run("document.querySelector('.card .remove').focus()")
    page.key("Enter", 13, "\r")
    finished(page, 1)
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"Remove {EVIL}"
    click(page, "#clear")
    assert page.run("document.getElementById('results').hidden && !document.querySelector('.card')")


def test_paste(opened, service):
    page = opened(service)
    page.until(READY)
    page.run("""(async () => {
      const canvas = document.createElement("canvas");
      canvas.getContext("2d").fillRect(0, 0, 300, 150);
      const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
      const data = new DataTransfer();
      data.items.add(new File([blob], "image.png", {type: "image/png"}));
      document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
    })()""")
    finished(page, 1)
    assert page.run("document.querySelectorAll('.card .bars .called').length") == 3


def test_dropped_dicom_folder(opened, service, tmp_path):
    paths = [Path(path) for path in scans.series(tmp_path / "series", scans.body((5, 40, 32)))]
    page = opened(service)
    page.until(READY)
    page.drop((300, 300), [tmp_path / "series"])
    finished(page, len(paths))
    names = page.run("[...document.querySelectorAll('#cards .name')].map((node) => node.textContent)")
    assert names == sorted(path.name for path in paths)
    assert f"{len(paths)} images" in page.run("document.querySelector('.card.series').innerText")
    single = [[number for _, number, *_ in card(page, path)["bars"]] for path in paths]
    whole = page.run("""[...document.querySelectorAll('.card.series .bars .number')].map((node) =>
      parseFloat(node.textContent))""")
    assert whole == pytest.approx(np.mean(single, axis=0), abs=0.11)


def test_lost_service(opened, service, files):
    page = opened(service)
    page.until(READY)
    page.call("Network.emulateNetworkConditions", offline=True, **ONLINE)
    drop(page, files["slice"])
    assert "does not respond" in card(page, files["slice"])["words"]
    page.call("Network.emulateNetworkConditions", offline=False, **ONLINE)
    click(page, ".answer button")
    page.until("document.querySelector('.card .number')?.textContent.includes('%')")


def test_busy_service_and_model_without_maps(opened, service, files):
    page = opened(
        service,
        """let busy = 2;
        const real = window.fetch;
        window.fetch = async (path, options) => {
          if (path.startsWith("predict") && busy-- > 0)
            return new Response('{"error": "busy"}', {status: 503, headers: {"Retry-After": "0.1"}});
          const answer = await real(path, options);
          return path === "model" ? new Response(JSON.stringify({...await answer.json(), methods: []})) : answer;
        };""",
    )
    drop(page, files["slice"])
    assert card(page, files["slice"])["best"]
    page.until("document.querySelector('.frame img')?.naturalWidth")  # the file itself
    assert page.run("document.querySelector('.frame img').src").startswith("blob:")
    assert not page.run("document.querySelector('.heat, .controls input')")
    assert not [event for event in page.events("Network.requestWillBeSent") if "explain" in event["request"]["url"]]


def test_token_and_synthetic_data_warning(opened, trained, files):
    text = (trained / "model.json").read_text("utf-8")
    with ExitStack() as stack:
        (trained / "model.json").write_text(text.replace('"folder/small"', '"phantom_ct/default"'), "utf-8")
        stack.callback((trained / "model.json").write_text, text, "utf-8")
        address = stack.enter_context(served(trained, TOKEN))
        page = opened(address)
        page.until("!document.getElementById('token').hidden")
        assert not page.run(READY)
        change(page, "#secret", "wrong")
        click(page, "#token button")
        page.until("!document.getElementById('refused').hidden")
        picture(page, "token")
        change(page, "#secret", TOKEN)
        click(page, "#token button")
        drop(page, files["slice"])
        assert card(page, files["slice"])["best"]
        wait_for_map(page)
        assert page.run("document.getElementById('synthetic').checkVisibility()")
        assert TOKEN not in page.run("document.documentElement.outerHTML + location.href")


def test_layout_is_stable(opened, service, files):
    page = opened(
        service,
        """const real = window.fetch;
        window.fetch = async (path, options) => {
          while (path.startsWith("explain") && !window.go) await new Promise((done) => setTimeout(done, 20));
          return real(path, options);
        };""",
    )
    drop(page, files["slice"])
    tall = "document.querySelector('.card').getBoundingClientRect().height"
    for size in (PHONE, DESK):
        page.screen(*size)
        before = page.run(tall)
        assert page.run("document.querySelector('.controls').disabled")
    page.run("go = true")
    wait_for_map(page)
    assert page.run(tall) == before
    assert not page.run("document.querySelector('.controls').disabled")


def test_screen_sizes(opened, service, files):
    page = opened(service)
    page.until(READY)
    assert not page.run("document.getElementById('synthetic').checkVisibility()")
    picture(page, "empty")
    drop(page, *files.values())
    wait_for_map(page)
    assert page.run("shift") < 0.1  # a good score by web.dev/articles/cls
    assert page.run(NAMELESS) == []
    for (width, height), zoom in ((PHONE, 1), (DESK, 1), (DESK, 2), ((800, 600), 1)):
        for colors in ("light", "dark"):
            page.screen(width, height, colors == "dark", zoom)
            page.run("scrollTo(0, document.body.scrollHeight)")
            time.sleep(0.2)
            assert "research use only" in page.run("document.getElementById('notice').innerText")
            box = page.run("JSON.stringify(document.getElementById('notice').getBoundingClientRect())")
            assert json.loads(box)["top"] >= 0  # always visible
            assert json.loads(box)["bottom"] <= height / zoom
            assert page.run("document.documentElement.scrollWidth") <= round(width / zoom)
            assert page.run(OUT) == []
            page.run("scrollTo(0, 0)")
            picture(page, f"{width}{'_zoomed' if zoom > 1 else ''}_{colors}")
