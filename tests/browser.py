"""A real chromium that visits the playground."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=30_000)

PIXELS = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png");
}"""


@dataclass
class Visit:
    """A page that was opened at `url`, with what its console said and where its requests went."""

    page: Page
    url: str
    prefix: str = ""  # of the ids of what is open: "video-" for videos
    console: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def refused(self) -> None:
        """chromium itself writes a line about every answer that is an error; to be called where one is wanted."""
        self.console = [line for line in self.console if not line.startswith("Failed to load resource")]

    def status(self, said: str) -> None:
        expect(self.page.locator(f"#{self.prefix}status")).to_contain_text(said)

    def ask(self, prompt: str, seed: str = "7", nfe: int = 4) -> None:
        """Fills the form, generates and waits for the finished picture."""
        self.begin(prompt, seed, nfe)
        expect(self.page.locator("#picture")).to_have_attribute("alt", prompt)
        self.status("Done")

    def begin(self, prompt: str, seed: str = "7", nfe: int = 4) -> None:
        """Fills the form and generates."""
        self.page.fill(f"#{self.prefix}prompt", prompt)
        self.page.fill(f"#{self.prefix}seed", seed)
        self.page.check(f"input[name={self.prefix}nfe][value='{nfe}']")
        self.page.click(f"#{self.prefix}generate")

    def compare(self) -> None:
        self.page.click(f"#{self.prefix}compare")
        self.status("Compared")


def visited(url: str, browser: Browser, options: dict[str, Any], rungs: int = 4, part: str = "") -> Iterator[Visit]:
    """Opens the page, or a part of it as "#video", which shows so many rungs of NFE; at the end its console must be empty, and
    every request must have gone to `url`."""
    context = browser.new_context(**options)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    page = context.new_page()
    page.set_default_timeout(30_000)
    visit = Visit(page, url, "video-" if part else "")
    page.on("console", lambda message: visit.console.append(message.text))
    page.on("pageerror", lambda error: visit.console.append(str(error)))
    context.on("request", lambda request: visit.requests.append(request))
    page.goto(f"{url}/{part}")
    expect(page.locator(f"input[name={visit.prefix}nfe]")).to_have_count(rungs)
    yield visit
    context.close()
    assert visit.console == []
    strangers = [request.url for request in visit.requests if not request.url.startswith((url + "/", "data:", "blob:"))]
    assert strangers == []


def shown(visit: Visit, selector: str = "#picture") -> np.ndarray:
    """uint8 [H, W, 3] of an image as the browser decoded it."""
    return pixels(base64.b64decode(visit.page.locator(selector).evaluate(PIXELS).partition(",")[2]))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def copied(visit: Visit, button: str) -> str:
    visit.page.click(button)
    visit.status("Copied")
    text: str = visit.page.evaluate("() => navigator.clipboard.readText()")
    return text
