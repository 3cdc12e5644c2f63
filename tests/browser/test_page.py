"""The page of `python -m lungjax.serve` in a real browser: python -m pytest tests/browser

Needs the `browser` extra and Chromium (Debian: apt-get install chromium), and takes about a minute. The tests train and
serve a small network, drop, choose and paste files on the page, and compare its content with the service's responses.
"""

import csv
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import conftest
import numpy as np
import pytest
import scans
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from services import running

import lungjax

expect.set_options(timeout=60_000)
TESTS = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")  # Debian's; if missing, the one of `playwright install chromium`
CLASSES = ("left", "middle", "right")
EVIL = """<img src=x onerror="document.title='broken'"><b>bold&amp;.png"""
FORMULA = "=1+1,two.png"
TOKEN = "a-token-of-the-test"
PHONE, DESK = {"width": 360, "height": 800}, {"width": 1280, "height": 900}
# Runs before the page's scripts: counts violations of the content policy, and layout shifts.
WATCH = """window.violations = []; window.shift = 0;
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + event.blockedURI));
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) shift += entry.value;
}).observe({type: "layout-shift", buffered: true});"""
# Controls and images without a name for screen readers.
NAMELESS = """[...document.querySelectorAll("img, button, input, select")].filter((node) => node.checkVisibility()
  && !node.getAttribute("alt") && !node.innerText?.trim() && !node.getAttribute("aria-label") && !node.labels?.length)
  .map((node) => node.outerHTML)"""
# Elements that are wider than the window, except in scrollable boxes.
OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth;
  const out = (node) => { const b = node.getBoundingClientRect(); return b.right > width + 1 || b.left < -1; };
  return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && out(node)
    && !node.closest(".wide, pre, .unseen, .skip")).map((node) => node.outerHTML.slice(0, 150));
})()"""
CARD = """(() => {
  const cards = [...document.querySelectorAll("#cards > .card")];
  const node = cards.find((one) => one.querySelector(".name").textContent == %s);
  const text = (selector) => node.querySelector(selector)?.innerText ?? null;
  const wide = (row, selector) => row.querySelector(selector).getBoundingClientRect().width;
  return {warning: text(".warning"), best: text(".top-class"), words: node.innerText,
    elements: node.querySelectorAll("h3 *").length,
    bars: [...node.querySelectorAll(".bars li")].map((row) => [row.children[0].textContent,
      parseFloat(row.children[1].textContent), row.children[2].textContent.includes("positive"),
      row.querySelector(".track b") ? 100 * wide(row, ".track b") / wide(row, ".track") : null])};
})()"""


@contextmanager
def served(run, token=""):
    """Serves a run on a free port; yields the address."""
    with running(lungjax.load(run), token=token) as service:
        yield f"http://127.0.0.1:{service.port}/"


def post(address, path):
    """Returns the answer to a request with the file as its body."""
    request = urllib.request.Request(address, path.read_bytes(), {"Content-Type": "application/octet-stream"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def drop(page, *paths, results=0):
    """Drops files or folders on the page and waits for the number of results, by default one per path."""
    ready(page)
    drop_zone = page.locator("#drop")
    drop_zone.scroll_into_view_if_needed()
    box, before = drop_zone.bounding_box(), page.locator("#cards > .card").count()
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": list(map(str, paths)), "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    finished(page, before + (results or len(paths)))


def ready(page):
    """Waits until the page shows the model."""
    page.locator("#layout").wait_for()


def finished(page, count):
    """Waits until there are `count` cards with results."""
    expect(page.locator("#cards > .card")).to_have_count(count)
    page.wait_for_function("() => { const bar = document.getElementById('progress'); return bar.value == bar.max; }")


def card(page, path):
    """Returns the content of a card; each of `bars` has class, percentage, whether positive, and width in percent."""
    return page.evaluate(CARD % json.dumps(path.name))


def wait_for_map(page):
    """Waits for the first saliency map."""
    page.wait_for_function("() => [...document.querySelectorAll('.heat')].some((map) => map.naturalWidth)")


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
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM if CHROMIUM.exists() else None)


@pytest.fixture
def opened(browser):
    """Opens pages; on teardown checks that none contacted another site, logged an error, or stored data."""
    pages = []

    def at(address, before=""):
        page = browser.new_page(viewport=DESK)
        page.add_init_script(WATCH + before)
        errors, messages, urls = [], [], []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: messages.append(message))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        pages.append((page, address, errors, messages, urls))
        return page

    yield at
    for page, address, errors, messages, urls in pages:
        assert all(url.startswith((address, "data:", f"blob:{address}")) for url in urls), urls
        logged = [message.text for message in messages if message.type in ("error", "warning")]
        assert all(text.startswith("Failed to load resource") for text in logged), logged  # for 4xx answers
        assert page.evaluate("violations") == errors == []
        assert page.evaluate("document.cookie + localStorage.length + sessionStorage.length") == "00"
        assert page.evaluate("indexedDB.databases().then((databases) => databases.length)") == 0
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
    maps = post(f"{service}explain?class={expected['predicted']}&method=gradcam", files["slice"])["results"][0]
    assert page.locator(".heat").get_attribute("src") == maps["heat"]
    assert page.locator(".frame img").first.get_attribute("src") == maps["image"]
    expect(page.locator("#announcement")).to_contain_text(expected["predicted"])  # for screen readers


def test_model_description(opened, service, trained):
    page = opened(service)
    ready(page)
    model = json.loads((trained / "model.json").read_text("utf-8"))
    shown = page.locator("aside").text_content().replace("\xa0", " ")
    facts = ("page_test", *CLASSES, "folder/small", "64 x 64 pixels, grayscale", "axial")
    assert [words for words in (*facts, *model["about"]["warnings"]) if words not in shown] == []
    low, high = model["scores"]["slice"]["intervals"]["accuracy"]
    assert f"{100 * model['scores']['slice']['accuracy']:.1f} %{100 * low:.1f} to {100 * high:.1f}" in shown
    rates = json.loads((trained / "report.json").read_text("utf-8"))["facts"]["novelty"]
    for kind, rate in {"val images (false alarms)": rates["false_alarms"]["val"], **rates["detection"]}.items():
        assert f"{kind}{rate['n']}{100 * rate['rate']:.1f} %{100 * rate['interval'][0]:.1f} to" in shown
    rows = page.evaluate("""[...document.querySelector("aside table").rows].map((row) =>
      [...row.cells].map((cell) => cell.firstChild?.textContent ?? ""))""")
    expected = [[name, *(str(model["counts"][split][name]) for split in ("train", "val", "test"))] for name in CLASSES]
    assert rows == [["", "train", "val", "test"], *expected]


def test_saliency_map_controls(opened, service, files):
    page = opened(service)
    drop(page, files["slice"])
    wait_for_map(page)
    heat, image, caption = page.locator(".heat"), page.locator(".frame img").first, page.locator("figcaption")
    first = heat.get_attribute("src")
    page.locator("input[type=range]").fill("80")
    expect(heat).to_have_css("opacity", "0.8")
    page.locator(".controls input[type=checkbox]").click()
    assert image.is_visible() and not heat.is_visible()
    page.locator(".controls input[type=checkbox]").click()
    menu = page.locator(".controls select")
    other = next(name for name in CLASSES if name != menu.input_value())
    menu.select_option(other)
    expect(caption).to_contain_text(other)
    assert heat.get_attribute("src") != first
    for method in ("gradcam", "occlusion"):
        page.locator("#method").select_option(method)
        expect(caption).to_contain_text(method)
        expected = post(f"{service}explain?class={other}&method={method}", files["slice"])["results"][0]["heat"]
        assert heat.get_attribute("src") == expected


def test_photo_garbage_and_html_in_names(opened, service, files):
    page = opened(service)
    drop(page, *files.values())
    photo = card(page, files["photo"])
    assert "Warning" in photo["warning"] and "unlike" in photo["warning"].lower()
    assert len(photo["bars"]) == 3
    assert card(page, files["slice"])["warning"] is None
    bad = card(page, files["garbage"])
    assert "supported formats" in bad["words"] and bad["bars"] == []
    expect(page.locator("#progress-text")).to_contain_text("1 failed")
    evil = card(page, files["evil"])
    assert evil["elements"] == 0 and len(evil["bars"]) == 3
    assert page.title() == "page_test · lungjax"


def test_too_large_file(opened, service, files, tmp_path):
    page = opened(service)
    ready(page)
    limit = page.evaluate("fetch('model').then((answer) => answer.json()).then((model) => model.limits.file_bytes)")
    big, requests = tmp_path / "big.png", []
    with big.open("wb") as file:
        file.truncate(limit + 1)
    page.on("request", lambda request: requests.append(request.url))
    drop(page, files["slice"], big)
    assert card(page, files["slice"])["best"]
    assert "MiB" in card(page, big)["words"]
    assert len([url for url in requests if "predict" in url]) == 1


def test_operating_point_menu(opened, service, files):
    page = opened(service)
    drop(page, files["slice"], files["formula"])
    rules = page.evaluate("[...document.getElementById('rule').options].map((one) => one.value)")
    assert rules == ["youden", "sensitivity_0.95"]
    texts = set()
    for rule in reversed(rules):
        page.locator("#rule").select_option(rule)
        texts.add(page.locator("#cards").inner_text())
        for name in ("slice", "formula"):
            expected = post(f"{service}predict?rule={rule}", files[name])["results"][0]["decisions"]
            called = {one: positive for one, _, positive, _ in card(page, files[name])["bars"]}
            assert called == {one: expected[one]["called"] for one in CLASSES}
    assert len(texts) == 2


def test_downloads(opened, service, files):
    page = opened(service)
    drop(page, files["formula"], files["evil"], files["garbage"])
    texts = {}
    for kind in ("csv", "json"):
        with page.expect_download() as download:
            page.locator(f"#{kind}").click()
        assert download.value.suggested_filename == f"page_test-results.{kind}"
        texts[kind] = download.value.path().read_text("utf-8")
    expected = post(f"{service}predict", files["formula"])["results"][0]
    document = json.loads(texts["json"])
    assert "research use only" in document["notice"]
    assert [one["file"] for one in document["results"]] == [FORMULA, EVIL, "garbage.png"]
    assert document["results"][0]["probabilities"] == expected["probabilities"]
    assert "error" in document["results"][2]
    rows = list(csv.DictReader(texts["csv"].splitlines()))
    assert [row["file"] for row in rows] == [f"'{FORMULA}", EVIL, "garbage.png"]  # the first is not a formula
    for name in CLASSES:
        assert float(rows[0][f"p_{name}"]) == expected["probabilities"][name]
        assert rows[0][f"called_{name}"] == ("yes" if expected["decisions"][name]["called"] else "no")
    assert rows[2]["error"]
    assert "research use only" in rows[0]["notice"]


def test_keyboard(opened, service, files):
    page = opened(service)
    ready(page)
    for _ in range(2):
        page.keyboard.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    expect(page.locator("#choose-label")).to_have_css("outline-style", "solid")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([files["slice"], files["evil"]])
    finished(page, 2)
    page.locator(".card .remove").first.press("Enter")
    finished(page, 1)
    expect(page.locator(":focus")).to_have_attribute("aria-label", f"Remove {EVIL}")
    page.locator("#clear").press("Enter")
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator(".card")).to_have_count(0)


def test_paste(opened, service):
    page = opened(service)
    ready(page)
    page.evaluate("""(async () => {
      const canvas = document.createElement("canvas");
      canvas.getContext("2d").fillRect(0, 0, 300, 150);
      const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
      const data = new DataTransfer();
      data.items.add(new File([blob], "image.png", {type: "image/png"}));
      document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
    })()""")
    finished(page, 1)
    expect(page.locator(".card .bars .called")).to_have_count(3)


def test_dropped_dicom_folder(opened, service, tmp_path):
    paths = [Path(path) for path in scans.series(tmp_path / "series", scans.body((5, 40, 32)))]
    page = opened(service)
    drop(page, tmp_path / "series", results=len(paths))
    assert page.locator("#cards .name").all_text_contents() == sorted(path.name for path in paths)
    assert f"{len(paths)} images" in page.locator(".card.series").inner_text()
    slices = [[number for _, number, *_ in card(page, path)["bars"]] for path in paths]
    series = [float(text.split()[0]) for text in page.locator(".card.series .bars .number").all_text_contents()]
    assert series == pytest.approx(np.mean(slices, axis=0), abs=0.11)


def test_lost_service(opened, service, files):
    page = opened(service)
    ready(page)
    page.context.set_offline(True)
    drop(page, files["slice"])
    assert "does not respond" in card(page, files["slice"])["words"]
    page.context.set_offline(False)
    page.locator(".answer button").click()
    expect(page.locator(".card .number").first).to_contain_text("%")


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
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    drop(page, files["slice"])
    assert card(page, files["slice"])["best"]
    page.wait_for_function("() => document.querySelector('.frame img')?.naturalWidth")  # the file itself
    assert page.locator(".frame img").get_attribute("src").startswith("blob:")
    assert page.locator(".heat, .controls input").count() == 0
    assert not [url for url in requests if "explain" in url]


def test_token_and_synthetic_data_warning(opened, trained, files, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    text = (trained / "model.json").read_text("utf-8")
    (run / "model.json").write_text(text.replace('"folder/small"', '"phantom_ct/default"'), "utf-8")
    with served(run, TOKEN) as address:
        page = opened(address)
        page.locator("#token").wait_for()
        assert not page.locator("#layout").is_visible()
        page.locator("#secret").fill("wrong")
        page.locator("#token button").click()
        page.locator("#refused").wait_for()
        page.locator("#secret").fill(TOKEN)
        page.locator("#token button").click()
        drop(page, files["slice"])
        assert card(page, files["slice"])["best"]
        wait_for_map(page)
        assert page.locator("#synthetic").is_visible()
        assert TOKEN not in page.evaluate("document.documentElement.outerHTML + location.href")


def test_screen_sizes(opened, service, files):
    page = opened(service)
    ready(page)
    assert not page.locator("#synthetic").is_visible()
    drop(page, *files.values())
    wait_for_map(page)
    assert page.evaluate("shift") < 0.1  # a good score by web.dev/articles/cls
    assert page.evaluate(NAMELESS) == []
    for width, height in (PHONE.values(), DESK.values(), (640, 450), (800, 600)):  # 640 x 450: desk at 200 % zoom
        for colors in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=colors)
            page.evaluate("scrollTo(0, document.body.scrollHeight)")
            time.sleep(0.2)
            assert "research use only" in page.locator("#notice").inner_text()
            box = page.locator("#notice").bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= height  # always visible
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(OVERFLOW) == []
