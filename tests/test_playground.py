"""The playground at /, in a real chromium against the real server and the bundled student."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from server.gateway.keys import create
from server.gateway.routes_playground import FILES
from tests.browser import Visit, copied, pixels, shown, visited
from tests.conftest import ROOT, Server, start_server
from tests.tiny_student import build_tiny_student, write_manifest

EXAMPLE = "a large yellow star on a purple background"
SHELL_TROUBLE = 'a "red" ring, $HOME `id` \\n above a child\'s box é'
WATCH_SOURCES = """image => {
  window.seen = [];
  new MutationObserver(changes => window.seen.push(...changes.map(change => change.oldValue)))
    .observe(image, {attributeFilter: ["src"], attributeOldValue: true});
}"""

ACCESSIBLE_NAMES = """all => all.map(element => element.getAttribute("aria-label") || element.labels?.[0]?.innerText
  || element.innerText || element.querySelector("img")?.alt)"""


@pytest.fixture(scope="module")
def server(bundled_repository: Path) -> Iterator[Server]:
    server = start_server(bundled_repository, "inprocess")
    yield server
    assert server.stop() == 0


@pytest.fixture
def options() -> dict[str, Any]:
    """What a test changes about its browser window."""
    return {}


@pytest.fixture
def visit(server: Server, browser: Browser, options: dict[str, Any]) -> Iterator[Visit]:
    yield from visited(server.url, browser, options)


def api_pixels(visit: Visit, prompt: str, seed: int, nfe: int) -> np.ndarray:
    """The same picture by a plain call of the API."""
    body = {"prompt": prompt, "seed": seed, "num_inference_steps": nfe}
    answer = httpx.post(f"{visit.url}/v1/images/generations", json=body, headers={"accept": "image/png"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return pixels(answer.content)


# ---- pictures ----


def test_one_click_on_an_example_makes_its_picture(visit: Visit) -> None:
    expect(visit.page.locator("#picture")).to_be_hidden()
    visit.page.get_by_role("button", name=EXAMPLE).click()
    expect(visit.page.get_by_role("img", name=EXAMPLE).first).to_be_visible()
    visit.status("Done: 4 NFE")
    assert np.array_equal(shown(visit), api_pixels(visit, EXAMPLE, 7, 4))


def test_the_page_works_over_triton_too(browser: Browser, triton_server: Server) -> None:
    for visit in visited(triton_server.url, browser, {}):
        visit.ask(EXAMPLE)
        expect(visit.page.locator("#film button")).to_have_count(4)
        assert np.array_equal(shown(visit), api_pixels(visit, EXAMPLE, 7, 4))


def test_every_example_is_a_button_that_works(visit: Visit) -> None:
    examples = visit.page.locator("#examples button")
    assert examples.count() >= 4
    for index in range(examples.count()):
        examples.nth(index).click()
        expect(visit.page.locator("#picture")).to_have_attribute("alt", examples.nth(index).inner_text())
        visit.status("Done")


@pytest.mark.parametrize(("nfe", "seed"), [(1, 0), (3, 2**64 - 1)])
def test_a_typed_prompt_gives_the_pixels_of_the_plain_api(visit: Visit, nfe: int, seed: int) -> None:
    visit.ask(SHELL_TROUBLE, str(seed), nfe)
    assert np.array_equal(shown(visit), api_pixels(visit, SHELL_TROUBLE, seed, nfe))


def test_previews_are_shown_before_the_picture(visit: Visit) -> None:
    visit.page.locator("#picture").evaluate(WATCH_SOURCES)
    visit.ask("a red circle above a blue square", nfe=4)
    film = visit.page.locator("#film button")
    expect(film).to_have_count(4)
    assert [film.nth(index).get_attribute("data-nfe") for index in range(4)] == ["1", "2", "3", "4"]
    sources = [film.nth(index).locator("img").get_attribute("src") for index in range(4)]
    replaced = [source for source in visit.page.evaluate("() => window.seen") if source]
    assert replaced[:3] == sources[:3]
    arrivals = [float(text.split()[0]) for text in visit.page.locator(".film-ms").all_inner_texts()]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] < arrivals[3]
    frames = [shown(visit, f"#film button:nth-child({number}) img") for number in (1, 2, 3, 4)]
    final = frames[3]
    assert np.array_equal(final, shown(visit))
    assert not any(np.array_equal(frame, final) for frame in frames[:3])


def test_a_frame_can_be_looked_at_again_and_slow_motion_ends_on_the_picture(visit: Visit) -> None:
    prompt = "a red circle above a blue square"
    visit.ask(prompt)
    visit.page.locator("#film button").first.click()
    expect(visit.page.locator("#picture")).to_have_attribute("alt", f"{prompt} (after NFE 1 of 4)")
    visit.page.click("#replay")
    expect(visit.page.locator("#picture")).to_have_attribute("alt", f"{prompt} (after NFE 2 of 4)")
    expect(visit.page.locator("#picture")).to_have_attribute("alt", prompt)


def test_the_waterfall_is_a_table_whose_stages_sum_to_the_total(visit: Visit) -> None:
    visit.ask(EXAMPLE, nfe=3)
    rows = visit.page.locator("#stages tr")
    names = rows.locator("th").all_inner_texts()
    assert names == ["Queue, previews", "Text encoder", "NFE 1", "NFE 2", "NFE 3", "VAE decoder", "Image encode"]
    total = float(visit.page.locator("#total .ms").inner_text().split()[0])
    stages = [float(text) for text in rows.locator(".ms").all_inner_texts()]
    assert sum(stages) == pytest.approx(total, abs=0.5 * len(stages))
    widths = [rows.nth(row).locator(".bar").bounding_box()["width"] for row in range(7)]
    assert widths.index(max(widths)) == stages.index(max(stages))


def test_compare_shows_the_same_seed_at_every_nfe(visit: Visit) -> None:
    visit.page.fill("#prompt", EXAMPLE)
    visit.page.fill("#seed", "11")
    visit.compare()
    cards = visit.page.locator("#comparison figure")
    expect(cards).to_have_count(4)
    for nfe in (1, 2, 3, 4):
        assert re.fullmatch(rf"{nfe} NFE\s+[0-9.]+ ms", cards.nth(nfe - 1).locator("figcaption").inner_text())
        expected = api_pixels(visit, EXAMPLE, 11, nfe)
        assert np.array_equal(shown(visit, f"#comparison figure:nth-child({nfe}) img"), expected)


def test_a_download_is_the_server_s_png_to_the_byte_and_can_be_replayed(visit: Visit, tmp_path: Path) -> None:
    visit.ask(EXAMPLE, "5", 2)
    with visit.page.expect_download() as download:
        visit.page.click("#download")
    assert download.value.suggested_filename == "scenes-5-2nfe.png"
    path = tmp_path / "picture.png"
    download.value.save_as(path)
    assert np.array_equal(pixels(path.read_bytes()), shown(visit))
    command = [sys.executable, str(ROOT / "fewstep.py"), "replay", str(path), "--prompt", EXAMPLE]
    replayed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert "bit-identical" in replayed.stdout


# ---- settings ----


def test_history_brings_back_a_picture_and_all_its_settings(visit: Visit) -> None:
    visit.ask(EXAMPLE, "18446744073709551615", 2)
    first = shown(visit)
    visit.ask("a red circle", "3", 4)
    visit.page.locator("#history button").nth(1).click()
    expect(visit.page.locator("#picture")).to_have_attribute("alt", EXAMPLE)
    assert np.array_equal(shown(visit), first)
    assert visit.page.input_value("#prompt") == EXAMPLE
    assert visit.page.input_value("#seed") == "18446744073709551615"
    assert visit.page.locator("input[name=nfe]:checked").input_value() == "2"
    assert visit.page.input_value("#size") == "128x128"


def test_history_is_bounded(visit: Visit) -> None:
    for seed in range(26):
        visit.ask(EXAMPLE, str(seed), 1)
        expect(visit.page.locator("#history button").first).to_have_attribute("title", re.compile(f"seed {seed}$"))
    expect(visit.page.locator("#history button")).to_have_count(24)


def test_dice_draw_a_new_seed_and_an_empty_seed_is_drawn(visit: Visit) -> None:
    seeds = set()
    for _ in range(3):
        visit.page.click("#dice")
        seeds.add(visit.page.input_value("#seed"))
    assert len(seeds) == 3
    visit.ask(EXAMPLE, "", 1)
    first = visit.page.locator("#caption-facts").inner_text()
    visit.ask(EXAMPLE, "", 1)
    expect(visit.page.locator("#history button")).to_have_count(2)
    assert visit.page.locator("#caption-facts").inner_text() != first


def test_a_key_is_sent_and_kept_only_if_asked(visit: Visit) -> None:
    page = visit.page
    for keep in (False, True):
        page.click("#access summary")
        page.fill("#key", "fs_example")
        page.set_checked("#keep-key", keep)
        page.get_by_role("button", name="Use this key").click()
        visit.ask(EXAMPLE)
        posts = [request for request in visit.requests if request.method == "POST"]
        assert posts[-1].headers["authorization"] == "Bearer fs_example"
        assert "fs_example" not in page.locator("#picture-panel .code").inner_text()
        assert "FEWSTEP_API_KEY" in page.locator("#curl").inner_text()
        page.reload()
        expect(page.locator("input[name=nfe]")).to_have_count(4)
        assert page.input_value("#key") == ("fs_example" if keep else "")
    assert page.evaluate("() => localStorage.length") == 0


def test_a_server_with_keys_asks_for_one(browser: Browser, bundled_repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = create(file, "somebody", ["images", "models"])
    server = start_server(bundled_repository, "inprocess", "--keys-file", str(file))
    try:
        for visit in visited(server.url, browser, {}, rungs=0):
            expect(visit.page.get_by_role("alert")).to_contain_text("an API key is needed")
            visit.page.click("#generate")
            expect(visit.page.get_by_role("alert")).to_contain_text("an API key is needed")
            visit.page.fill("#key", key)  # its field has opened by itself
            visit.page.get_by_role("button", name="Use this key").click()
            expect(visit.page.locator("input[name=nfe]")).to_have_count(4)
            visit.ask(EXAMPLE)
            expect(visit.page.get_by_role("alert")).to_be_hidden()
            visit.refused()
    finally:
        assert server.stop() == 0


def test_a_repeat_is_made_anew_so_that_its_milliseconds_are_real(visit: Visit) -> None:
    for count in (1, 2):
        visit.page.click("#generate")
        expect(visit.page.locator("#history button")).to_have_count(count)
        expect(visit.page.locator("#film button")).to_have_count(4)
        assert float(visit.page.locator("#stages tr", has_text="NFE 4").locator(".ms").inner_text()) > 0


# ---- what goes wrong ----


def test_cancel_stops_waiting_and_the_picture_before_stays(visit: Visit, server: Server) -> None:
    visit.ask(EXAMPLE)
    expect(visit.page.locator("#cancel")).to_be_disabled()
    server.process.send_signal(signal.SIGSTOP)  # a server that takes for ever
    try:
        visit.page.fill("#prompt", "a green cross")
        visit.page.click("#generate")
        expect(visit.page.locator("#stage")).to_have_attribute("aria-busy", "true")
        visit.page.click("#cancel")
        visit.status("Cancelled.")
    finally:
        server.process.send_signal(signal.SIGCONT)
    expect(visit.page.locator("#stage")).to_have_attribute("aria-busy", "false")
    expect(visit.page.locator("#problem")).to_be_hidden()
    expect(visit.page.locator("#picture")).to_have_attribute("alt", EXAMPLE)
    expect(visit.page.locator("#history button")).to_have_count(1)
    visit.ask("a green cross")


def test_an_error_is_shown_in_the_server_s_words(visit: Visit) -> None:
    visit.page.fill("#prompt", "   ")
    visit.page.click("#generate")
    said = httpx.post(f"{visit.url}/v1/images/generations", json={"prompt": "   "}).json()["error"]["message"]
    expect(visit.page.get_by_role("alert")).to_have_text(said)
    visit.refused()
    visit.ask(EXAMPLE)
    expect(visit.page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("seed", ["-1", "1.5", "18446744073709551616", "seven"])
def test_an_impossible_seed_is_refused_in_words(visit: Visit, seed: str) -> None:
    visit.page.fill("#seed", seed)
    visit.page.click("#generate")
    expect(visit.page.get_by_role("alert")).to_contain_text(f"from 0 to 18446744073709551615, not “{seed}”")
    assert not [request for request in visit.requests if request.method == "POST"]


def test_a_server_that_is_gone_is_said_to_be_gone(visit: Visit) -> None:
    visit.page.context.set_offline(True)
    visit.page.click("#generate")
    expect(visit.page.get_by_role("alert")).to_contain_text("cannot be reached")
    visit.refused()


def test_an_error_after_the_first_preview_is_shown_and_leaves_no_half_picture(browser: Browser, tmp_path: Path) -> None:
    fails_at_its_third_nfe(build_tiny_student(tmp_path))
    server = start_server(tmp_path, "inprocess")
    try:
        for visit in visited(server.url, browser, {}):
            visit.page.click("#generate")
            expect(visit.page.get_by_role("alert")).to_contain_text("not finite")
            expect(visit.page.locator("#picture")).to_be_hidden()
            expect(visit.page.locator("#film button")).to_have_count(0)
            assert visit.page.locator("#picture").get_attribute("src").startswith("data:image/png")  # a preview was shown
            expect(visit.page.locator("#examples")).to_be_hidden()  # they are for the bundled student
    finally:
        assert server.stop() == 0


def fails_at_its_third_nfe(student: Path) -> None:
    """Makes the latents overflow there, of the 4."""
    fields = json.loads((student / "1" / "student.json").read_text())
    fields["tables"]["4"][2][1:] = [1e39, 1e39, 0.0]
    write_manifest(student, fields)


# ---- code ----


def test_the_copied_curl_command_gives_the_picture(visit: Visit, tmp_path: Path) -> None:
    visit.ask(SHELL_TROUBLE, "9", 3)
    subprocess.run(["sh", "-ec", copied(visit, "#copy-curl")], cwd=tmp_path, check=True, timeout=60)
    assert np.array_equal(pixels((tmp_path / "picture.png").read_bytes()), shown(visit))


def test_the_copied_python_program_gives_the_picture(visit: Visit, tmp_path: Path) -> None:
    visit.page.click("#access summary")
    visit.page.fill("#key", "fs_example")
    visit.page.get_by_role("button", name="Use this key").click()
    visit.ask(SHELL_TROUBLE, "9", 3)
    environment = os.environ | {"FEWSTEP_API_KEY": "fs_example"}
    subprocess.run([sys.executable, "-c", copied(visit, "#copy-python")], cwd=tmp_path, check=True, timeout=60, env=environment)
    assert np.array_equal(pixels((tmp_path / "picture.png").read_bytes()), shown(visit))


# ---- for everybody ----


def show_everything(visit: Visit) -> None:
    visit.ask(EXAMPLE)
    visit.compare()
    visit.page.click("#access summary")


@pytest.mark.parametrize("options", [{"color_scheme": "light"}, {"color_scheme": "dark"}], ids=["light", "dark"])
def test_no_rule_of_axe_is_broken(visit: Visit) -> None:
    for stage in ("empty", "full"):
        if stage == "full":
            show_everything(visit)
        visit.page.evaluate("() => Promise.all(document.getAnimations().map(animation => animation.finished))")
        results = Axe().run(visit.page)
        assert results.violations_count == 0, results.generate_report()


def test_every_control_has_a_name(visit: Visit) -> None:
    show_everything(visit)
    controls = visit.page.locator("input, select, textarea, button, summary")
    names = controls.evaluate_all(ACCESSIBLE_NAMES)
    assert len(names) > 20
    assert all(name and name.strip() for name in names), names


@pytest.mark.parametrize("options", [{"viewport": {"width": 320, "height": 640}}, {"viewport": {"width": 800, "height": 600}}])
def test_nothing_scrolls_sideways(visit: Visit) -> None:
    show_everything(visit)
    visit.page.fill("#prompt", "x" * 250)
    assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    boxes = visit.page.locator("body *:not(.unseen, .skip)").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert min(left for left, _ in boxes) >= 0  # the key field among them, which is open
    assert max(right for _, right in boxes) <= visit.page.viewport_size["width"]


def test_dark_mode_is_dark(visit: Visit) -> None:
    def brightness(prop: str) -> float:
        colour = visit.page.locator("body").evaluate(f"body => getComputedStyle(body).{prop}")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    light = brightness("backgroundColor"), brightness("color")
    visit.page.emulate_media(color_scheme="dark")
    dark = brightness("backgroundColor"), brightness("color")
    assert light[0] > 200 > 60 > light[1]
    assert dark[1] > 200 > 60 > dark[0]


def test_reduced_motion_stills_everything(visit: Visit) -> None:
    duration = "e => getComputedStyle(e).transitionDuration"
    assert visit.page.locator("#picture").evaluate(duration) != "0s"
    visit.page.emulate_media(reduced_motion="reduce")
    assert visit.page.locator("#picture").evaluate(duration) == "0s"


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    keyboard = visit.page.keyboard
    keyboard.press("Tab")
    assert focused(visit) == "Skip to the prompt"
    keyboard.press("Enter")
    keyboard.press("ControlOrMeta+A")
    keyboard.type("a white ring on a black background")
    for _ in range(20):
        keyboard.press("Tab")
        if visit.page.evaluate("() => document.activeElement.name") == "nfe":
            break
    keyboard.press("ArrowLeft")
    keyboard.press("ArrowLeft")
    ring = "() => getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert visit.page.evaluate(ring) == "solid"
    keyboard.press("Control+Enter")
    visit.status("Done: 2 NFE")
    assert np.array_equal(shown(visit), api_pixels(visit, "a white ring on a black background", 7, 2))


def focused(visit: Visit) -> str:
    text: str = visit.page.evaluate("() => document.activeElement.innerText")
    return text


# ---- the files ----


def test_the_page_may_load_and_ask_nothing_but_its_own_server(server: Server) -> None:
    for path in ("/", *(f"/playground/{name}" for name in FILES)):
        answer = httpx.get(server.url + path)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy == {
            "default-src": "'none'",
            **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
            "img-src": "'self' data: blob:",
            "media-src": "blob:",
            **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
        }
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-type"].split("/")[0] == "text"
        assert not [link for link in re.findall(r"https?://([\w.-]+)", answer.text) if link != "www.w3.org"]


def test_a_known_file_is_not_sent_again(server: Server) -> None:
    first = httpx.get(server.url)
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = httpx.get(server.url, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert httpx.get(server.url, headers={"if-none-match": '"other"'}).content == first.content
    head = httpx.head(server.url)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


@pytest.mark.parametrize("path", ["/playground/nothing.js", "/playground/..%2fapp.py", "/playground/"])
def test_other_paths_are_envelopes(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_a_wheel_holds_every_file_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["server.gateway"]
    folder = ROOT / "server" / "gateway"
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in (folder / "static").rglob("*") if path.is_file()} == packed
    assert {path.name for path in packed} == set(FILES)
