"""The vote page in a real browser: by keyboard, on a wide and a narrow screen, light and dark, and read aloud."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiller.vote.booth import Booth
from votes import contests, served

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium: apt-get install chromium chromium-driver"
)
WIDE, NARROW = (1280, 800), (390, 844)
SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> {}"


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


class Screen:
    """The page as somebody sees and hears it."""

    def __init__(self, browser: webdriver.Chrome, url: str, size: tuple[int, int] = WIDE, **media: str):
        self.browser = browser
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == NARROW}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(url)

    def text(self, name: str) -> str:
        return str(self.browser.find_element(By.ID, name).get_property("textContent"))

    def until(self, name: str, wanted: str) -> None:
        """Wait until an element says that."""
        WebDriverWait(self.browser, 10, 0.02).until(
            lambda _: wanted in self.text(name), f"{name} says {self.text(name)!r}, not {wanted!r}"
        )

    def press(self, key: str) -> None:
        ActionChains(self.browser).send_keys(key).perform()

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)


def page(client: Any, rater: str | None = "ann") -> str:
    return f"http://{client.name}/?token={client.token}" + (f"&rater={rater}" if rater else "")


def choices(booth: Booth, rater: str = "ann") -> list[str]:
    """What the rater's votes that stand say, in the order of the contests, as left and right."""
    votes = [votes[rater] for votes in booth.tally.contests() if rater in votes]
    return [
        vote.choice if vote.choice in ("tie", "skip") else "left" if vote.choice == vote.left else "right"
        for vote in votes
    ]


def test_voting_by_keyboard_from_the_first_to_the_last_pair(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with served(tmp_path, contests(tmp_path, 6)) as (client, booth):
        screen = Screen(browser, page(client))
        screen.until("said", "Pair 1 of 6: scene 0")
        assert client.token not in browser.current_url
        keys = (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, "t", Keys.ARROW_DOWN, "s")
        for number, key in enumerate(keys, 2):
            screen.press(key)
            screen.until("said", f"Pair {number} of 6: scene {number - 1}")
            assert screen.text("count") == f"{number} of 6"
            assert screen.run("return document.getElementById('progress').value") == number - 1
        assert choices(booth) == ["left", "right", "tie", "tie", "skip"]
        screen.press("u")
        screen.until("said", "Undone. Pair 5 of 6: scene 4")
        screen.press(Keys.BACKSPACE)
        screen.until("said", "Undone. Pair 4 of 6: scene 3")
        assert choices(booth) == ["left", "right", "tie"]
        for number, key in enumerate((Keys.ARROW_RIGHT, Keys.ARROW_LEFT), 5):
            screen.press(key)
            screen.until("said", f"Pair {number} of 6")
        screen.press("T")
        screen.until("said", "All done. Thank you.")
        assert choices(booth) == ["left", "right", "tie", "right", "left", "tie"]
        assert screen.text("count") == "6 of 6 done"
        for _ in range(2):
            browser.refresh()
            screen.until("said", "All done")
        screen.press("u")
        screen.until("said", "Undone. Pair 6 of 6")
        lines = [json.loads(line) for line in booth.ledger.path.read_text().splitlines()]
        assert all(0 <= line["seconds"] < 60 for line in lines if line.get("choice") in ("first", "second", "tie"))
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_picture_on_the_left_is_the_one_that_wins(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Seen from the pixels: the colour on the left is that of the file which the vote then names."""
    asked = contests(tmp_path, 6)
    with served(tmp_path, asked) as (client, booth):
        screen = Screen(browser, page(client))
        for number in range(1, 7):
            screen.until("said", f"Pair {number} of 6")
            red = screen.run(
                "const canvas = document.createElement('canvas'); const context = canvas.getContext('2d');"
                "context.drawImage(document.getElementById('left-picture'), 0, 0);"
                "return context.getImageData(12, 12, 1, 1).data[0];"
            )
            screen.press(Keys.ARROW_LEFT)
            screen.until("said", f"Pair {number + 1} of 6" if number < 6 else "All done")
            choice = booth.tally.of(asked[number - 1].id)["ann"].choice
            assert red == number - 1 + (120 if choice == "second" else 0)
        assert {vote["ann"].left for vote in booth.tally.contests()} == {"first", "second"}


def test_a_prompt_is_text_and_never_runs(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with served(tmp_path, contests(tmp_path, 1, SCRIPT)) as (client, _):
        screen = Screen(browser, page(client))
        screen.until("said", "Pair 1 of 1")
        assert screen.text("prompt") == SCRIPT.format(0)
        assert browser.title == "Which is better?"
        assert screen.run("return document.querySelectorAll('h1 *').length") == 0
        screen.run(
            "const script = document.createElement('script'); script.text = 'document.title = 1';"
            "document.body.append(script)"
        )
        assert browser.title == "Which is better?"  # the policy forbids scripts that were not in the page


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_is_on_the_screen_and_can_be_read(
    browser: webdriver.Chrome, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    with served(tmp_path, contests(tmp_path, 2, "a red panda {} that reads the newspaper in the evening")) as (
        client,
        _,
    ):
        screen = Screen(browser, page(client), size, color_scheme=scheme)
        screen.until("said", "Pair 1 of 2")
        wide, high = screen.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert wide <= size[0]
        assert high <= size[1]
        boxes = screen.run(
            "return ['left-picture', 'right-picture', 'tie', 'skip', 'undo'].map((id) => {"
            "const box = document.getElementById(id).getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]; })"
        )
        (left, right), buttons = boxes[:2], boxes[2:]
        assert left[2:] == pytest.approx(right[2:])
        assert left[2] > 0.44 * size[0]
        assert (right[0] > left[0] + left[2] - 1) == (size == WIDE)  # beside each other, or one above the other
        assert all(box[3] >= 44 for box in buttons)  # for a thumb
        for name in ("prompt", "count", "note", "tie"):
            assert contrast(*screen.run(COLOURS.replace("NAME", name))) >= 4.5, name


COLOURS = """
const seen = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const element = document.getElementById("NAME");
return [numbers(getComputedStyle(element).color), numbers(seen(element))];
"""


def contrast(one: list[float], other: list[float]) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_it_can_be_used_without_seeing_a_key_or_a_mouse(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """All has a name, is reached by Tab in the order in which it is seen, shows the focus, and tells of changes."""
    with served(tmp_path, contests(tmp_path, 3)) as (client, booth):
        screen = Screen(browser, page(client), reduced_motion="reduce")
        screen.until("said", "Pair 1 of 3")
        names, reached = [], []
        for _ in range(4):
            screen.press(Keys.TAB)
            focused = browser.switch_to.active_element
            reached.append(focused.get_attribute("id"))
            names.append(focused.accessible_name)
            inner = "document.activeElement.querySelector('.stage') || document.activeElement"
            assert screen.run(f"return getComputedStyle({inner}).outlineStyle") == "solid"
        assert reached == ["left", "right", "tie", "skip"]
        assert names[0] == "A is better (left arrow key)"
        assert all(names)
        assert screen.run("return getComputedStyle(document.querySelector('.stage')).transitionDuration") == "0s"
        said = browser.find_element(By.ID, "said")
        assert (said.get_attribute("aria-live"), said.aria_role) == ("polite", "status")
        assert browser.find_element(By.ID, "progress").accessible_name
        screen.press(Keys.ENTER)  # on Skip
        screen.until("said", "Pair 2 of 3")
        assert choices(booth) == ["skip"]
        assert screen.run("return document.documentElement.lang") == "en"


def test_a_name_is_asked_for_and_two_raters_see_how_they_agree(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with served(tmp_path, contests(tmp_path, 3)) as (client, booth):
        for choice in ("left", "tie", "right"):
            client.vote(choice, "ann")
        screen = Screen(browser, page(client, None))
        screen.press("u & me")  # the field has the focus; u undoes nothing in it
        screen.press(Keys.ENTER)
        screen.until("said", "Pair 1 of 3")
        assert screen.text("note") == "u & me"
        for number in range(3):
            vote = list(booth.tally.contests())[number]["ann"]
            ballot = booth.ballots("u & me")[0]
            key = "t" if vote.choice == "tie" else Keys.ARROW_LEFT if vote.choice == ballot.left else Keys.ARROW_RIGHT
            screen.press(key)
            screen.until("said", f"Pair {number + 2} of 3" if number < 2 else "All done")
        assert "agreement α = 1.00 (2 raters, 3 pairs)" in screen.text("note")


def test_without_its_server_the_page_says_so_and_goes_on_later(browser: webdriver.Chrome, tmp_path: Path) -> None:
    with served(tmp_path, contests(tmp_path, 2)) as (client, _):
        screen = Screen(browser, page(client))
        screen.until("said", "Pair 1 of 2")
    screen.press(Keys.ARROW_LEFT)
    screen.until("trouble", "Tiller does not answer. All votes up to here are saved")
    assert screen.text("count") == "1 of 2"


def test_a_live_page_waits_for_the_next_pictures(browser: webdriver.Chrome, tmp_path: Path) -> None:
    asked = contests(tmp_path, 2)
    with served(tmp_path, asked[:1], live=True) as (client, booth):
        screen = Screen(browser, page(client))
        screen.until("said", "Pair 1 of 1")
        screen.press("t")
        screen.until("said", "Waiting for the next pictures")
        booth.close(asked[:1])
        booth.open(asked[1:])
        screen.until("said", "Pair 1 of 1: scene 1")
        assert browser.find_element(By.ID, "pair").is_displayed()
        assert screen.run("return document.getElementById('undo').disabled")  # the first vote has been used
