"""The page in headless Chromium; needs `chromium` and `chromedriver` (Debian: chromium-driver)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from idlm import LLM, SamplingParams
from tests.server.live import Live, serving, until

SCREENSHOTS = os.environ.get("IDLM_SCREENSHOTS")  # a folder: keep pictures there
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.fixture(scope="module")
def live_default(default_llm: LLM) -> Iterator[Live]:
    with serving(default_llm) as live:
        yield live


def look(browser: webdriver.Chrome, size: str, dark: bool = False) -> None:
    """Set the size of the window and the colour scheme."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def picture(browser: webdriver.Chrome, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def text(browser: webdriver.Chrome, selector: str) -> str:
    return find(browser, selector).get_property("textContent")  # type: ignore[return-value]


def no_errors(browser: webdriver.Chrome) -> None:
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def fits(browser: webdriver.Chrome) -> bool:
    """Whether nothing is wider than the window."""
    script = "return document.documentElement.scrollWidth <= window.innerWidth"
    return bool(browser.execute_script(script))


def at_most(browser: webdriver.Chrome, tokens: int) -> None:
    """Set the most tokens of an answer; the settings are closed again."""
    find(browser, "#settings-button").click()
    field = find(browser, "[name=max_tokens]")
    field.clear()
    field.send_keys(str(tokens))
    find(browser, "#settings-button").click()


def test_chat_by_keyboard(browser: webdriver.Chrome, live_default: Live, default_llm: LLM) -> None:
    look(browser, "desktop")
    browser.get(live_default.url)
    until(lambda: "stride 4" in text(browser, "#model"))
    at_most(browser, 48)
    find(browser, "[data-view=chat]").send_keys(Keys.ENTER)  # gives the focus to the message
    browser.switch_to.active_element.send_keys("Why is the sky blue?", Keys.ENTER)
    until(lambda: find(browser, "#chat-form .stop").is_displayed())
    until(lambda: "tokens per forward" in text(browser, "#chat-meter"))
    until(lambda: not find(browser, "#chat-form .stop").is_displayed(), 60)
    params = SamplingParams(temperature=0, seed=1, max_tokens=48)
    offline = default_llm.chat([{"role": "user", "content": "Why is the sky blue?"}], params)[0]
    assert text(browser, ".message.assistant") == offline.text
    classes = [
        element.get_attribute("class")
        for element in browser.find_elements(By.CSS_SELECTOR, ".message.assistant .token")
    ]
    sources = [source.value for source in offline.sources][: len(classes)]  # the end token: no text
    assert classes == [f"token {source}" for source in sources] and len(set(classes)) == 3
    assert f"{offline.stats.tokens_per_forward:.2f} tokens per forward" in text(
        browser, "#chat-meter"
    )
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chat-meter .place")) == 3
    picture(browser, "chat-desktop-light")
    no_errors(browser)
    for name, dark in (("desktop", True), ("phone", False), ("phone", True)):
        look(browser, name, dark)
        assert fits(browser)
        picture(browser, f"chat-{name}-{'dark' if dark else 'light'}")


def test_stop_ends_the_answer_and_keeps_it(browser: webdriver.Chrome, live_default: Live) -> None:
    look(browser, "desktop")
    browser.get("about:blank")
    browser.get(live_default.url)
    until(lambda: "stride 4" in text(browser, "#model"))
    browser.switch_to.active_element.send_keys("Tell me a long story.", Keys.ENTER)
    until(lambda: len(text(browser, ".message.assistant")) > 10)
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(lambda: not find(browser, "#chat-form .stop").is_displayed())
    until(live_default.idle, 5)
    assert not browser.find_elements(By.CSS_SELECTOR, ".message.error")


def test_race(browser: webdriver.Chrome, live_default: Live) -> None:
    look(browser, "desktop")
    browser.get("about:blank")
    browser.get(f"{live_default.url}/#race")
    until(lambda: "stride 4" in text(browser, "#model"))
    at_most(browser, 64)
    find(browser, "#race-form textarea").send_keys(Keys.ENTER)
    until(lambda: len(text(browser, "#idlm-text")) > 100, 60)
    picture(browser, "race-running")
    until(lambda: "Identical: all 64 tokens" in text(browser, "#verdict"), 90)
    assert text(browser, "#ar-text") == text(browser, "#idlm-text")
    assert "1.00 tokens per forward" in text(browser, "#ar-meter")
    no_errors(browser)
    for name, dark in (("desktop", False), ("desktop", True), ("phone", False), ("phone", True)):
        look(browser, name, dark)
        assert fits(browser)
        picture(browser, f"race-{name}-{'dark' if dark else 'light'}")


def test_the_page_asks_for_the_key(browser: webdriver.Chrome, tiny_llm: LLM) -> None:
    with serving(tiny_llm, api_key="secret") as live:
        browser.get(live.url)
        until(lambda: "key is missing" in text(browser, "#model"))
        find(browser, "[name=key]").send_keys("secret", Keys.TAB)
        until(lambda: "test-model" in text(browser, "#model"))
        picture(browser, "key")


def test_a_failure_is_shown(browser: webdriver.Chrome, tiny_llm: LLM) -> None:
    with serving(tiny_llm) as live:
        browser.get("about:blank")
        browser.get(live.url)
        until(lambda: "test-model" in text(browser, "#model"))
        field = browser.switch_to.active_element
        browser.execute_script("arguments[0].value = 'The dog '.repeat(300)", field)
        field.send_keys(Keys.ENTER)
        until(lambda: "Shorten it" in text(browser, "#log"))


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    page = live.http.get("/")
    assert (
        page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    )
    assert "http" not in page.text.replace("text/html", "")
    for name in ("app.js", "api.js", "chat.js", "race.js", "view.js", "style.css"):
        file = httpx.get(f"{live.url}/static/{name}")
        assert file.status_code == 200 and "//" not in file.text.replace("// ", "")
