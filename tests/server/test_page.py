"""The page in headless Chromium; needs chromium, chromedriver and `pip install selenium`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")]
NAMED = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(each)
    made = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Page:
    """What a person does there."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def find(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return str(self.find(css).text)

    def until(self, true: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 60, 0.1).until(lambda _: true(), "this did not happen")

    def fill(self, css: str, text: str) -> None:
        self.find(css).clear()
        self.find(css).send_keys(text)

    def fits(self) -> bool:
        """Whether nothing is wider than the window of a phone."""
        metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        width = self.browser.execute_script("return document.documentElement.scrollWidth")
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return bool(width <= 390)


def test_add_chat_inspect_search_forget_and_reload(browser: Any, live: Any, tmp_path: Path) -> None:
    page = Page(browser)
    browser.get(live.url)
    page.until(lambda: "enter a valid API key" in page.text("#status"))
    assert page.fits()
    page.fill("#key", live.keys["ann"] + Keys.TAB)
    page.until(lambda: "Without a memory" in page.text("#size"))

    page.fill("#new-id", "page" + Keys.ENTER)
    page.until(lambda: "made page" in page.text("#status") and Select(page.find("#memory")).first_selected_option.text)
    page.until(lambda: page.text("#size").startswith("0 documents"))
    for name in ("boat", NAMED):
        page.fill("#name", name)
        page.fill("#text", "The boat is called Petrel. " * 8)
        page.find("#add button.main").click()
        page.until(lambda name=name: name in page.text("#documents"))
    assert not browser.find_elements(By.CSS_SELECTOR, "#documents img")  # a name is text
    assert "216 tokens on" in page.text("#growth")
    note = tmp_path / "note.txt"
    note.write_text("Plums are ripe.")
    page.find("#file").send_keys(str(note))
    page.until(lambda: "note.txt" in page.text("#documents"))
    page.find("[aria-label='Forget note.txt']").click()
    page.until(lambda: page.text("#size").startswith("2 documents"))

    page.fill("#question", "What is the boat called?" + Keys.ENTER)
    tokens = page.until(lambda: browser.find_elements(By.CSS_SELECTOR, "button.token"))
    page.until(lambda: "3 documents" in page.text("#size"))  # the conversation was remembered
    assert "The boat is called Petrel." in page.text("#read") and "tokens of memory searched" in page.text("#status")
    shaded = max(tokens, key=lambda token: float(token.get_attribute("title").split()[0]))
    shaded.send_keys(Keys.ENTER)  # from the keyboard
    page.until(lambda: "memory made it" in page.text("#read"))
    assert "% of the output" in page.text("#read") and browser.switch_to.active_element == page.find("#read")
    assert page.fits()

    page.fill("#query", "Petrel" + Keys.ENTER)
    page.until(lambda: "score" in page.text("#found"))
    page.find("[aria-label='Forget boat']").click()
    page.until(lambda: "2 documents" in page.text("#size"))
    browser.refresh()
    page.until(lambda: "2 documents" in page.text("#size"))
    assert "boat" not in page.text("#documents").splitlines()
    page.find("#forget-all").click()
    browser.switch_to.alert.accept()
    page.until(lambda: "Without a memory" in page.text("#size"))
    assert not [each for each in browser.get_log("browser") if "401" not in each["message"]]
