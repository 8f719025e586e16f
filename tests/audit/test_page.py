"""The page in a real browser."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import microclip_deploy
from microclip_deploy.audit.clicks import Sheet
from microclip_deploy.audit.desk import Desk
from microclip_deploy.audit.plan import Plan
from microclip_deploy.audit.server import PageServer

PAGE = Path(microclip_deploy.__file__).parent / "audit" / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 30_000


def test_page_holds_no_inline_code_and_script_makes_no_markup() -> None:
    html, script = (PAGE / "index.html").read_text(), (PAGE / "page.js").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script)
    used = set(re.findall(r"\bpage\.(\w+)", script))
    assert used <= set(re.findall(r'\bid="(\w+)"', html))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a browser, or skip the test and say why."""
    reason = "drives a browser: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, plan: Plan, sheet: Sheet, album: Path) -> Iterator[Callable[..., Any]]:
    """Return what opens the page; errors of its script or its policy fail the test."""
    contexts: list[Any] = []
    errors: list[Any] = []
    with PageServer(Desk(plan, sheet, album)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def opened(**how: Any) -> Any:
            contexts.append(browser.new_context(**how))
            page = contexts[-1].new_page()
            page.set_default_timeout(WAIT_MS)
            page.on("pageerror", lambda error: errors.append(error))
            page.on("console", lambda line: errors.append(line.text))
            page.goto(server.url)
            at(page, 0)
            return page

        yield opened
        for context in contexts:
            context.close()
        server.shutdown()
        thread.join()
    assert all("400" in str(error) for error in errors)  # an answer that was refused


def at(page: Any, answered: int) -> None:
    """Wait until so many are answered and the next photo takes keys."""
    page.wait_for_function(
        "n => document.querySelector('#count').textContent === `${n} of 9` "
        "&& !document.querySelector('#ask').classList.contains('busy')",
        arg=answered,
    )


def said(sheet: Sheet) -> list[str]:
    return [click.answer for click in sheet.read() if click.answer]


@pytest.mark.slow
def test_keys_answer_and_take_back(visit: Callable[..., Any], sheet: Sheet, plan: Plan) -> None:
    page = visit()
    for count, key in enumerate(["1", "n", "s"], 1):
        page.keyboard.press(key)
        at(page, count)
    assert said(sheet) == [plan.classes[plan.drawn[0].shown[0]], "neither", "skip"]
    page.keyboard.press("Backspace")
    at(page, 2)
    page.keyboard.press("/")
    page.keyboard.type("1n loo")  # digits and letters are text here
    at(page, 2)
    page.locator("#name").fill("arctic loon")
    page.keyboard.press("Enter")
    at(page, 3)
    assert said(sheet)[2] == "arctic loon"
    page.reload()
    at(page, 3)


@pytest.mark.slow
def test_keys_in_quick_succession_answer_no_unseen_photo(
    visit: Callable[..., Any], sheet: Sheet
) -> None:
    page = visit()
    page.evaluate(
        "() => { for (const key of ['1', '1', '1']) "
        "document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })); }"
    )
    at(page, 1)
    assert len(said(sheet)) == 1


@pytest.mark.slow
def test_unknown_class_and_the_end_are_told(visit: Callable[..., Any], sheet: Sheet) -> None:
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.locator("#name").fill("artic loon")
    page.locator("#other button").click()
    page.get_by_text("did you mean arctic loon").wait_for()
    page.locator("#name").blur()
    for count in range(1, 9):
        page.locator("#candidates button").first.click()
        at(page, count)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("n")
    page.locator("#done").wait_for()
    page.locator("#results").get_by_text("All 9 photos are answered.").wait_for()
    page.locator("#end").click()
    page.locator("#ended").wait_for()
    assert len(said(sheet)) == 9
