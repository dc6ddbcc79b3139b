"""The report in a real browser: by keyboard, narrow and wide, light and dark, without its script, and live."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from report_folder import run_folder
from tiller.report import html, live

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium: apt-get install chromium chromium-driver"
)
SHOWN = "return [...document.querySelectorAll('.shots img')].filter(one => one.checkVisibility()).map(one => one.alt)"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # no other machine is asked
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run")


def size(browser: webdriver.Chrome, width: int, script: bool = True) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})


@needs_chromium
def test_the_slider_moves_by_keyboard_and_says_where_it_is(browser: webdriver.Chrome, run: Path) -> None:
    size(browser, 1280)
    browser.get(html.write(run).as_uri())
    slider = browser.find_element(By.ID, "stage")
    slider.send_keys(Keys.ARROW_LEFT)
    assert slider.get_attribute("aria-valuetext") == "epoch 2, 16 pictures scored"
    assert browser.find_element(By.TAG_NAME, "output").text == "epoch 2, 16 pictures scored"
    seen = browser.execute_script(SHOWN)
    assert seen[:2] == ["a cat, noise 1, before training", "a cat, noise 1, epoch 2, 16 pictures scored"]
    assert len(seen) == 4  # two prompts, before and now; the other noise is folded
    assert browser.title != "owned"
    assert browser.get_log("browser") == []  # nothing was blocked, nothing failed


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_page(browser: webdriver.Chrome, run: Path, width: int) -> None:
    size(browser, width)
    browser.get(html.write(run).as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@needs_chromium
def test_without_its_script_the_page_shows_every_picture(browser: webdriver.Chrome, run: Path) -> None:
    size(browser, 1280, script=False)
    browser.get(html.write(run).as_uri())
    boxes = [image.rect for image in browser.find_elements(By.CSS_SELECTOR, ".shots .strip img")[:6]]
    assert [box["width"] > 50 and box["height"] > 50 for box in boxes] == [True] * 6
    assert browser.find_element(By.ID, "stage").rect["height"] == 0
    size(browser, 1280)


@needs_chromium
def test_a_live_page_keeps_its_place_while_it_changes(browser, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 1)
    (run / "finished.json").unlink()
    with live.Server(run) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            size(browser, 390)
            browser.get(server.address)
            browser.find_element(By.ID, "stage").send_keys(Keys.HOME)
            browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
            browser.execute_script("scrollTo({ top: 900, behavior: 'instant' })")
            place = browser.execute_script("return scrollY")
            line = {"epoch": 5, "reward/mean": 0.9, "reward/std": 0.5, "reward_calls": 40}
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            WebDriverWait(browser, 30, 0.1).until(
                lambda page: page.execute_script(
                    "return document.querySelector('.answers').textContent.includes('5 of 4')"
                )
            )
            assert (
                abs(browser.execute_script("return scrollY") - place) < 10
            )  # pixels, where lines changed their height
            assert browser.find_element(By.ID, "stage").get_property("value") == "0"
            assert browser.execute_script("return [...document.querySelectorAll('details')].every(one => one.open)")
        finally:
            server.shutdown()
            thread.join()


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_paper_and_cards(scheme: int) -> None:
    """4.5 to 1 for text and 3 to 1 for lines (WCAG 2.2, 1.4.3 and 1.4.11)."""
    style = resources.files("tiller.report").joinpath("page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6})", re.findall(r":root \{(.*?)\}", style, re.S)[scheme]))
    for name in ("ink", "soft", "accent", "good", "bad", "fair", *(f"c{number}" for number in range(6))):
        for ground in ("paper", "card", "well"):
            dark, light = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= (3 if name.startswith("c") else 4.5), (name, ground)
