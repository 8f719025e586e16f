"""The page at /: what it may not contain, and what it does in a real browser."""

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import microclip_deploy
from microclip_deploy.serving import Session
from microclip_deploy.serving.overlay import attention_map, photo_overlay
from tests.server.running import Running

PAGE = Path(microclip_deploy.__file__).parent / "server" / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 30_000
PHONE = {"width": 390, "height": 844}
ROUNDING = 3
"""Levels of 255: the browser rounds colours at each step from the photo to the canvas."""
FAINTEST = 12
"""Levels: what the first level of attention, which rounding may give or take, adds to a pixel."""

Open = Callable[..., Any]


def text_of(suffix: str) -> str:
    [file] = PAGE.glob(f"*.{suffix}")
    return file.read_text()


def test_page_loads_nothing_from_elsewhere() -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import", "".join(map(text_of, ("html", "css"))))
    assert not re.search(r"https?:|import[ (]", text_of("js"))


def test_page_holds_no_inline_code_or_style() -> None:
    html = text_of("html")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", html)


def test_script_makes_no_markup_of_texts() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\("
    assert not re.search(forbidden, text_of("js"))


def test_script_and_page_speak_of_the_same_elements() -> None:
    used = set(re.findall(r"\bpage\.(\w+)", text_of("js")))
    assert used <= set(re.findall(r'\bid="(\w+)"', text_of("html")))


# Of the widest scope and asked for first, so that nothing is exported for tests that are skipped.
@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a browser, or skip the test and say why."""
    reason = "drives a browser: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        # In a container the tests may run as root, for whom Chromium has no sandbox.
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, server: Running) -> Iterator[Open]:
    """Return what opens the page in a context of its own; errors of its script fail the test."""
    contexts, errors = [], []

    def opened(**how: Any) -> Any:
        answers = how.pop("answers", {})
        context = browser.new_context(**how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: errors.append(error))
        for path, answer in answers.items():
            page.route(f"**/{path}*", answer)
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture(scope="module")
def pictures(photos: Path) -> list[str]:
    return [str(path) for path in sorted(photos.rglob("*.png"))]


def give(page: Any, *files: str) -> None:
    """Choose photos and wait for all answers."""
    page.set_input_files("#files", files)
    answered(page)


def answered(page: Any) -> None:
    page.locator("#gallery li").first.wait_for(state="attached")
    page.locator("#progress").wait_for(state="hidden")


def texts(page: Any, where: str) -> list[str]:
    found: list[str] = page.locator(where).all_text_contents()
    return found


def pixels(page: Any) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return int16 (H, W, 3): what is on the canvas."""
    data = page.evaluate("document.querySelector('#canvas').toDataURL().split(',')[1]")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    return np.asarray(image.convert("RGB")).astype(np.int16)


@pytest.mark.slow
def test_photo_gives_what_the_session_says(
    open_page: Open, session: Session, pictures: list[str]
) -> None:
    page = open_page()
    give(page, pictures[0])
    said = session.classify(pictures[0])
    assert texts(page, "#classes bdi") == [guess.name for guess in said.top]
    assert texts(page, "#classes .number") == [f"{guess.probability:.3f}" for guess in said.top]
    assert page.locator("#unknown").is_visible() is said.unknown
    assert len(texts(page, "#cls bdi")) == len(texts(page, "#fg bdi")) == len(said.top)
    assert "network and rest" in texts(page, "#legend span")


@pytest.mark.slow
def test_saliency_is_drawn_as_the_product_draws_it(
    open_page: Open, session: Session, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((560, 560))
    photo.save(tmp_path / "photo.png")
    said = session.classify(photo)
    page = open_page()
    give(page, str(tmp_path / "photo.png"))
    drawn = photo_overlay(photo, session.preprocess.seen(photo.size), said.tokens)
    assert np.abs(pixels(page) - np.asarray(drawn)).max() <= ROUNDING
    page.locator("#opacity").fill("0")
    assert np.abs(pixels(page) - np.asarray(photo)).max() <= ROUNDING
    page.locator("#opacity").fill("50")
    half = (np.asarray(drawn).astype(float) + np.asarray(photo)) / 2
    assert np.abs(pixels(page) - half).max() <= ROUNDING
    page.locator("#opacity").fill("100")
    page.check("input[value=attention]")
    heat = attention_map(np.asarray(photo), said.attention, scale=1)
    assert np.abs(pixels(page) - np.asarray(heat)).max() <= FAINTEST
    assert np.abs(pixels(page) - np.asarray(heat)).mean() < 1
    page.check("input[value=none]")
    assert np.abs(pixels(page) - np.asarray(photo)).max() <= ROUNDING


@pytest.mark.slow
def test_arrow_keys_select_in_the_gallery(open_page: Open, pictures: list[str]) -> None:
    page = open_page()
    give(page, *pictures[:3])
    page.locator("#gallery").focus()
    names = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Home", "End", "ArrowLeft"):
        page.keyboard.press(key)
        names.append(page.locator("#gallery [aria-selected=true]").get_attribute("title"))
        assert texts(page, "#name") == names[-1:]
    assert names == [Path(pictures[i]).name for i in (1, 2, 2, 0, 2, 1)]


@pytest.mark.slow
def test_csv_holds_every_photo_and_no_formula(
    open_page: Open, session: Session, pictures: list[str], tmp_path: Path
) -> None:
    formula, broken = tmp_path / '=1+"2",x.png', tmp_path / "broken.jpg"
    shutil.copy(pictures[0], formula)
    broken.write_bytes(b"no photo")
    page = open_page()
    give(page, str(formula), str(broken))
    assert "1 failed" in page.locator("#count").text_content()
    with page.expect_download() as download:
        page.click("#csv")
    header, good, bad = csv.reader(io.StringIO(Path(download.value.path()).read_text("utf-8")))
    said = session.classify(formula)
    top = said.top
    ranks = [f"{part}_{i + 1}" for i in range(len(top)) for part in ("class", "probability")]
    assert header == ["file", *ranks, "unknown", "model", "version", "error"]
    told = [x for guess in top for x in (guess.name, f"{guess.probability:.6f}")]
    assert good[:-2] == [f"'{formula.name}", *told, str(int(said.unknown)), "tiny"]
    assert good[-1] == ""
    assert bad[:-1] == [broken.name, *[""] * (len(header) - 2)]
    assert "expected" in bad[-1]


@pytest.mark.slow
def test_foreign_texts_stay_texts(open_page: Open, pictures: list[str], tmp_path: Path) -> None:
    script = "<img src=x onerror=window.ran=1>"
    file = tmp_path / f"{script}.png"
    shutil.copy(pictures[0], file)

    def renamed(route: Any) -> None:
        told = route.fetch().json()
        for guess, name in zip(told["classes"], (script, "שלום (דג)", "long" * 400), strict=True):
            guess["name"] = name
        told["classes"][1]["adapted"] = False
        route.fulfill(json=told)

    page = open_page(viewport=PHONE, answers={"v1/classify": renamed})
    give(page, str(file), pictures[1])
    page.wait_for_timeout(100)  # for an image that does not exist to fail
    assert page.evaluate("window.ran") is None
    assert texts(page, "#classes bdi")[0] == script
    assert texts(page, "#name") == [file.name]
    assert texts(page, "#classes .mark") == ["zero-shot"]
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.slow
def test_busy_server_is_asked_again(open_page: Open, pictures: list[str]) -> None:
    busy = [429, 503, 429]

    def answer(route: Any) -> None:
        if busy:
            error = json.dumps({"error": "the queue is full"})
            route.fulfill(status=busy.pop(), headers={"Retry-After": "1"}, body=error)
        else:
            route.continue_()

    page = open_page(answers={"v1/classify": answer})
    page.set_input_files("#files", pictures[:6])
    page.get_by_text("the queue is full").wait_for()
    answered(page)
    assert not busy
    assert texts(page, "#count") == ["6 photos"]
    assert page.locator("#connection").is_hidden()


@pytest.mark.slow
def test_no_more_than_four_requests_at_a_time(open_page: Open, pictures: list[str]) -> None:
    page = open_page()
    page.evaluate(
        """() => {
            const real = window.fetch;
            let now = 0;
            window.most = 0;
            window.fetch = (...what) => {
                window.most = Math.max(window.most, (now += 1));
                return real(...what).finally(() => (now -= 1));
            };
        }"""
    )
    give(page, *pictures)
    assert texts(page, "#count") == [f"{len(pictures)} photos"]
    assert page.evaluate("window.most") == 4


@pytest.mark.slow
def test_key_is_asked_for_and_kept_in_the_session(open_page: Open, pictures: list[str]) -> None:
    def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "expected an API key, found none"})

    page = open_page(answers={"v1/": guarded})
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.get_by_text("does not take this API key").wait_for()
    page.fill("#key", "right")
    page.press("#key", "Enter")
    page.locator("#keyform").wait_for(state="hidden")
    give(page, pictures[0])
    assert page.locator("#answer").is_visible()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [
        1,
        0,
        "",
    ]


@pytest.mark.slow
def test_server_that_comes_back_is_found(open_page: Open, pictures: list[str]) -> None:
    away = [True]

    def answer(route: Any) -> None:
        if away[0]:
            route.abort()
        else:
            route.continue_()

    page = open_page()
    page.locator("#facts bdi").wait_for()
    page.route("**/v1/*", answer)
    page.set_input_files("#files", pictures[:2])
    page.get_by_text("cannot be reached").wait_for()
    away[0] = False
    answered(page)
    assert texts(page, "#count") == ["2 photos"]
    assert page.locator("#connection").is_hidden()


@pytest.mark.slow
def test_another_version_is_told_and_asked_again(open_page: Open, pictures: list[str]) -> None:
    page = open_page()
    give(page, pictures[0])

    def restarted(route: Any) -> None:
        told = route.fetch().json()
        for part in told.get("models", [told]):
            part["version"] = "000000000000"
        route.fulfill(json=told)

    page.route("**/v1/*", restarted)
    give(page, pictures[1])
    page.locator("#change").wait_for()
    page.click("#again")
    page.locator("#again").wait_for(state="hidden")
    answered(page)
    assert page.locator("#change").is_hidden()
    page.locator("#gallery").press("Home")
    assert "000000000000" in page.locator("#about").text_content()


@pytest.mark.slow
def test_folders_can_be_dropped(open_page: Open, photos: Path) -> None:
    page = open_page()
    protocol = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(photos)], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", "drop"):
        place = {"type": step, "x": 200, "y": 200, "data": data}
        protocol.send("Input.dispatchDragEvent", place)
    answered(page)
    names = {tile.get_attribute("title") for tile in page.locator("#gallery li").all()}
    assert names == {f"{photos.name}/{p.relative_to(photos)}" for p in photos.rglob("*.png")}


@pytest.mark.slow
def test_photo_can_be_pasted(open_page: Open, pictures: list[str]) -> None:
    page = open_page()
    page.evaluate(
        """(bytes) => {
            const clipboardData = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" });
            clipboardData.items.add(file);
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        [*Path(pictures[0]).read_bytes()],
    )
    answered(page)
    assert texts(page, "#name") == ["pasted.png"]
    assert page.locator("#answer").is_visible()


@pytest.mark.slow
def test_photo_that_the_browser_cannot_decode_is_answered(
    open_page: Open, session: Session, pictures: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "photo.tiff"
    Image.open(pictures[0]).save(file)
    page = open_page()
    give(page, str(file))
    assert texts(page, "#classes bdi")[0] == session.classify(file).class_name
    assert page.locator("#undecoded").is_visible()
    assert texts(page, "#gallery .tile") == ["tiff"]
    assert page.locator("#canvas").is_visible()


@pytest.mark.slow
def test_page_fits_a_phone_and_the_dark(open_page: Open, pictures: list[str]) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = open_page(viewport=PHONE, color_scheme=scheme)
        give(page, *pictures[:5])
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
