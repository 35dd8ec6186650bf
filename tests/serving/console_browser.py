"""A headless Chromium in which the console is used as a person would, by what is written on it.

As a command it takes the screenshots of docs/console from a console that runs:

    python -m tests.serving.console_browser http://127.0.0.1:8000 docs/console
"""

import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

PHONE, DESKTOP = (390, 844), (1280, 900)
SECONDS = 60.0
COLOURS = 96  # of a screenshot, which keeps it small
ACTIONS = {  # tab -> answers by their place, and the buttons that make them
    "Language": {"hallucination": "ask-hallucination", "score": "ask-score"},
    "Molecules": {"molecule": "ask-molecule"},
    "Spectra": {"spectra": "ask-spectra"},
    "Weights": {"spectrum": "ask-spectrum"},
    "Images": {"classify": "ask-classify", "advise": "ask-advise"},
    "Corrosion": {"corrosion": "ask-corrosion"},
}


def missing() -> str | None:
    """Why no browser can be driven here; None when one can."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}: apt-get install chromium chromium-driver" if absent else None


class Browser:
    """The console at an address, in a window of a given size."""

    def __init__(self, driver: Chrome, url: str, size: tuple[int, int]):
        self.driver, self.url, self.size = driver, url, size
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(url)
        self.until(lambda: self.text("overview") and "Asking" not in self.text("overview"), "the overview")

    def until(self, holds: Any, what: str) -> Any:
        """What `holds` returns once it is true. Raises AssertionError when it never is."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if found := holds():
                return found
            time.sleep(0.1)
        raise AssertionError(
            f"{what} did not appear; the page says: {self.driver.find_element(By.TAG_NAME, 'body').text}"
        )

    def one(self, place: str) -> WebElement | None:
        """The element with that id, if it is there."""
        found = self.driver.find_elements(By.ID, place)
        return found[0] if found else None

    def text(self, place: str) -> str:
        """What an element shows; nothing while it is not there."""
        found = self.one(place)
        return found.text if found is not None else ""

    def tabs(self) -> list[str]:
        """The titles of the tabs, those behind the menu of a narrow page too."""
        measured = "#tabs .tab-container.visually-hidden button"  # there all are, to see which find room
        found = self.driver.find_elements(By.CSS_SELECTOR, measured)
        return [tab.get_attribute("textContent").strip() for tab in found]

    def open(self, title: str) -> None:
        """Choose a tab; on a narrow page it may be in the menu behind the others."""

        def chosen() -> bool:
            shown = [tab for tab in self._buttons(title) if tab.is_displayed()]
            if not shown:
                for menu in self.driver.find_elements(By.CSS_SELECTOR, "#tabs .overflow-menu > button"):
                    if menu.is_displayed():
                        menu.click()
                return False
            shown[0].click()
            return True

        self.until(chosen, f"the tab {title}")

    def press(self, button: str) -> None:
        """Press the button with that id."""
        found = self.until(lambda: self.one(button), f"the button {button}")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        self.until(found.is_displayed, f"the button {button}")
        found.click()

    def answer(self, place: str) -> WebElement:
        """The answer in an element, once there is one that is no line of what is missing."""

        def answered() -> WebElement | None:
            found = self.one(place)
            if found is None or found.find_elements(By.CSS_SELECTOR, ".waiting"):
                return None
            return found if found.find_elements(By.CSS_SELECTOR, ".tiles, table, .error, figure") else None

        return self.until(answered, f"the answer in {place}")

    def ask(self, tab: str) -> dict[str, WebElement]:
        """All answers of a tab."""
        self.open(tab)
        found = {}
        for place, button in ACTIONS[tab].items():
            self.press(button)
            found[place] = self.answer(place)
        return found

    def fill(self, place: str, text: str) -> None:
        """Write into the field of an element, instead of what is in it."""
        field = self.until(lambda: self.one(place), place).find_element(By.CSS_SELECTOR, "textarea, input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE)
        field.send_keys(text)

    def value(self, place: str) -> str:
        """What is written in the field of an element."""
        return self.one(place).find_element(By.CSS_SELECTOR, "textarea, input").get_attribute("value")

    def choose(self, place: str, option: str) -> None:
        """Choose one of the options of an element."""
        found = self.until(lambda: self.one(place), place).find_elements(By.TAG_NAME, "label")
        next(label for label in found if label.text.strip() == option).click()

    def upload(self, place: str, file: Path) -> None:
        """Give a file to an element that takes one."""
        field = self.until(lambda: self.one(place), place).find_element(By.CSS_SELECTOR, "input[type=file]")
        field.send_keys(str(file))

    def too_wide(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth") - self.size[0]

    def complaints(self) -> list[str]:
        """Errors that the browser's console shows since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def foreign_requests(self) -> set[str]:
        """Addresses on other hosts that the page asked for since the last call."""
        own = urlsplit(self.url).netloc
        asked = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.add(message["params"]["request"]["url"])
        return {url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != own}

    def photograph(self, file: Path) -> None:
        """Save all of the page, with few colours."""
        import base64

        self.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        time.sleep(0.5)
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        with Image.open(io.BytesIO(base64.b64decode(taken["data"]))) as picture:
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)

    def _buttons(self, title: str) -> list[WebElement]:
        found = self.driver.find_elements(By.CSS_SELECTOR, "#tabs button")
        return [tab for tab in found if tab.get_attribute("textContent").strip() == title]


@contextmanager
def browser() -> Iterator[Chrome]:
    """A headless Chromium that calls nobody by itself."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",  # its sandbox refuses to run as root, as machines that test do
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "no-first-run",
        "no-proxy-server",
        "force-color-profile=srgb",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def main(url: str, folder: str) -> None:
    """A screenshot of every tab after its actions, at both widths."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
            page = Browser(driver, url, size)
            page.photograph(target / f"overview-{name}.png")
            for tab in page.tabs()[1:]:
                page.ask(tab)
                page.photograph(target / f"{tab.lower()}-{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
