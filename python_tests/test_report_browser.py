"""The page of a run in a browser: nothing is fetched, nothing overflows, what can be pressed works.

Runs where the system has Chromium and Python has playwright, whose wheel holds the driver.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oss_ext import report
from run_cases import random_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found on PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not start for root, as CI often is.
        launched = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose names are long and hostile."""
    file = tmp_path_factory.mktemp("run") / "report.html"
    long = "a-name-without-any-place-to-break-it-that-goes-on-and-on"
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    run = random_run(1, (3, 48, 64), named=lambda text: f"{text} {long} {hostile}")
    file.write_text(report.page(run), encoding="utf-8")
    return file


def shown(browser: Any, file: Path, **options: Any) -> Any:
    """The page, and a list ``heard`` on it of all that it said, asked for or popped up."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("dialog", lambda dialog: (page.heard.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("data:", file.as_uri())) or page.heard.append(request.url)
        ),
    )
    page.goto(file.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_and_is_silent(browser: Any, file: Path, width: int, scheme: str) -> None:
    page = shown(browser, file, viewport={"width": width, "height": 800}, color_scheme=scheme)
    # Whatever can be opened or chosen fits as well.
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    page.add_style_tag(content=".panel { display: block !important }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(int(part) for part in background[4:-1].split(",")) < 3 * 128
    assert dark == (scheme == "dark")
    assert page.heard == []
    page.context.close()


def test_buttons_copy_tabs_switch_and_headings_sort(browser: Any, file: Path) -> None:
    page = shown(browser, file, permissions=["clipboard-read", "clipboard-write"])
    command = page.locator("#overview .code")
    command.get_by_role("button").click()
    command.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == command.locator("code").text_content()

    panels = page.locator("#schedules .panel")
    assert [panels.nth(n).is_visible() for n in (0, 1)] == [True, False]
    page.locator("#schedules").get_by_text("5 steps", exact=True).first.click()
    assert [panels.nth(n).is_visible() for n in (0, 1)] == [False, True]
    page.keyboard.press("ArrowLeft")
    assert [panels.nth(n).is_visible() for n in (0, 1)] == [True, False]
    page.get_by_text("log-SNR", exact=True).click()
    seen = [page.locator(f"#schedules .panel .on-{key}").first.is_visible() for key in ("t", "snr")]
    assert seen == [False, True]

    head = page.locator("#comparison th", has_text="PSNR of the mean error")
    column = "rows => rows.map((row) => parseFloat(row.cells[2].dataset.value))"
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        values = page.locator("#comparison tbody tr").evaluate_all(column)
        known = [value for value in values if value == value]
        assert known == sorted(known, reverse=order == "descending")
        assert values[: len(known)] == known  # those that were unable stay below
    assert page.heard == []
    page.context.close()


def test_without_scripts_all_can_be_read(browser: Any, file: Path) -> None:
    page = shown(browser, file, java_script_enabled=False)
    assert page.locator("button.copy:visible").count() == 0
    tab = page.locator("#samples").get_by_text("5 steps", exact=True).first
    tab.click()
    assert page.locator("#samples .panel").nth(1).is_visible()
    page.context.close()


def test_on_paper_every_panel_is_there(browser: Any, file: Path) -> None:
    a4 = {"width": 718, "height": 1047}  # less margins of 1 cm
    page = shown(browser, file, color_scheme="dark", viewport=a4)
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") == a4["width"]
    panels = page.locator("#samples .panel, #schedules .panel, #along .panel")
    assert all(panel.is_visible() for panel in panels.all())
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == "rgb(26, 30, 35)"
    assert not page.locator("nav").is_visible()
    page.context.close()
