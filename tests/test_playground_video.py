"""The playground's videos, in a real chromium against the real server and a tiny student of random weights."""

import io
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Route, expect

from server.engine.device import DeviceLock, Priority
from server.gateway.keys import create
from server.jobs.store import JobStore
from tests.browser import Visit, copied, shown, visited
from tests.conftest import Server, start_server
from tests.tiny_video import build_tiny_video

PROMPT = "a small red circle moves left on a white background"
SHELL_TROUBLE = '"a" $HOME \'s é'
FRAMES, FPS, SECONDS = 25, 8, 3.125
WATCH_STATUS = """element => {
  window.said = [];
  new MutationObserver(() => window.said.push(element.textContent)).observe(element, {childList: true});
}"""
STROKES = [("ArrowLeft", "Picture"), ("ArrowLeft", "Video"), ("Home", "Picture"), ("ArrowRight", "Video"), ("End", "Video")]
NO_H264 = "HTMLMediaElement.prototype.canPlayType = () => ''"
Held = Callable[[], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("playground-videos")


@pytest.fixture(scope="module")
def repository(folder: Path, bundled_repository: Path) -> Path:
    """The bundled student of pictures, and one of videos."""
    build_tiny_video(folder / "repository")
    shutil.copytree(bundled_repository / "scenes", folder / "repository" / "scenes")
    return folder / "repository"


@pytest.fixture(scope="module")
def server(repository: Path, folder: Path) -> Iterator[Server]:
    server = serve_videos(repository, folder / "jobs", FEWSTEP_LOCKS=str(folder / "locks"))
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def held(folder: Path) -> Held:
    """A context in which the device is busy: no NFE begins, whatever has been asked for."""

    @contextmanager
    def hold() -> Iterator[None]:
        lock = DeviceLock("cpu", Priority.HIGH, folder / "locks")
        with lock.held():
            yield
        lock.close()

    return hold


@pytest.fixture
def options() -> dict[str, Any]:
    """What a test changes about its browser window."""
    return {}


@pytest.fixture
def visit(server: Server, browser: Browser, options: dict[str, Any]) -> Iterator[Visit]:
    yield from visited(server.url, browser, options, part="#video")


def serve_videos(repository: Path, jobs: Path, *flags: str, **environment: str) -> Server:
    return start_server(repository, "inprocess", "--set", f"jobs_folder={jobs}", *flags, **environment)


def ask(visit: Visit, prompt: str = PROMPT, seed: str = "7", nfe: int = 4) -> None:
    """Makes a video and waits for its player."""
    visit.begin(prompt, seed, nfe)
    visit.status("Done: ")
    expect(player(visit)).to_have_attribute("aria-label", prompt)


def player(visit: Visit) -> Locator:
    return visit.page.locator("#video-player")


def playable(video: Locator) -> None:
    """Waits until chromium has decoded the first frame."""
    video.evaluate("v => v.readyState >= 2 || new Promise(done => v.addEventListener('loadeddata', done, {once: true}))")


def tiles(visit: Visit, prompt: str) -> Locator:
    """The videos of this prompt in the history."""
    return visit.page.locator(f"#video-history button[title^='{prompt} ·']")


def in_progress(visit: Visit) -> None:
    expect(visit.page.locator("#video-status")).to_have_text(re.compile(r"NFE \d of \d\."))


def stored(visit: Visit) -> list[Any]:
    """All videos that the server knows."""
    data: list[Any] = httpx.get(f"{visit.url}/v1/videos", params={"limit": 100}).json()["data"]
    return data


def posts(visit: Visit, path: str = "/v1/videos") -> list[Any]:
    return [request for request in visit.requests if request.method == "POST" and request.url == visit.url + path]


def frames_of(video: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# ---- tabs ----


def test_the_arrow_keys_choose_a_tab_and_the_address_keeps_it(visit: Visit) -> None:
    page, tab = visit.page, visit.page.get_by_role("tab")
    expect(page.get_by_role("tab", selected=True)).to_have_text("Video")
    expect(page.get_by_role("tabpanel")).to_have_attribute("id", "video-panel")
    tab.nth(1).focus()
    for key, name in STROKES:
        page.keyboard.press(key)
        expect(page.get_by_role("tab", selected=True)).to_have_text(name)
        assert page.evaluate("() => document.activeElement.innerText") == name
        assert page.evaluate("() => location.hash") == f"#{name.lower()}"
    page.click("#picture-tab")
    expect(page.locator("#prompt")).to_be_visible()
    expect(page.locator("#video-prompt")).to_be_hidden()
    assert page.locator("#student option").all_inner_texts() == ["scenes"]
    page.evaluate("() => { location.hash = '#video' }")
    expect(page.locator("#video-prompt")).to_be_visible()
    assert page.locator("#video-student option").all_inner_texts() == ["tiny-video"]
    expect(page.locator("#video-length")).to_have_text(f"{FRAMES} frames at {FPS} per second: {SECONDS} s.")


def test_without_a_video_student_there_are_no_tabs(browser: Browser, bundled_repository: Path) -> None:
    server = start_server(bundled_repository, "inprocess")
    try:
        for visit in visited(server.url, browser, {}):
            expect(visit.page.locator("#tabs")).to_be_hidden()
            visit.page.evaluate("() => { location.hash = '#video' }")
            expect(visit.page.locator("#prompt")).to_be_visible()
            assert not [request for request in visit.requests if "/v1/videos" in request.url]
    finally:
        assert server.stop() == 0


# ---- videos ----


def test_a_video_is_made_with_progress_previews_and_a_player(visit: Visit, held: Held) -> None:
    visit.page.locator("#video-status").evaluate(WATCH_STATUS)
    with held():
        visit.begin(SHELL_TROUBLE, str(2**64 - 1))
        in_progress(visit)  # so the page hears of every NFE
        expect(visit.page.locator("#video-progress")).to_have_attribute("max", "4")
    visit.status("Done: 4 NFE")
    said = [line for line in visit.page.evaluate("() => window.said") if re.match(r"NFE [1-4] of 4\.", line)]
    assert list(dict.fromkeys(said)) == [f"NFE {nfe} of 4." for nfe in (1, 2, 3, 4)]
    film = visit.page.locator("#video-film button")
    expect(film).to_have_count(4)
    first, second, third = (shown(visit, f"#video-film button:nth-child({number}) img") for number in (1, 2, 3))
    assert first.shape == second.shape == third.shape == (32, 64, 3)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    playable(player(visit))
    facts = player(visit).evaluate("v => [v.duration, v.videoWidth, v.videoHeight, v.loop, v.muted, v.controls]")
    assert facts == [SECONDS, 64, 32, True, True, True]
    expect(player(visit)).to_have_css("opacity", "1")  # its colours are those of the file
    assert player(visit).get_attribute("poster").startswith("blob:")
    visit.page.wait_for_function("() => document.getElementById('video-player').currentTime > 0")
    assert posts(visit)[-1].headers["idempotency-key"]
    [video] = [video for video in stored(visit) if video["prompt"] == SHELL_TROUBLE]
    assert (video["seed"], video["num_inference_steps"], video["status"]) == (2**64 - 1, 4, "completed")


def test_a_prediction_can_be_looked_at_again(visit: Visit, held: Held) -> None:
    with held():
        visit.begin(PROMPT, nfe=2)
        in_progress(visit)
    visit.status("Done: 2 NFE")
    visit.page.locator("#video-film button").first.click()
    expect(visit.page.locator("#video-picture")).to_have_attribute("alt", f"{PROMPT} (after NFE 1 of 2)")
    expect(player(visit)).to_be_hidden()
    visit.page.locator("#video-film button").last.click()
    expect(player(visit)).to_be_visible()
    expect(visit.page.locator("#video-picture")).to_be_hidden()


def test_the_waterfall_sums_to_the_total(visit: Visit) -> None:
    ask(visit, nfe=3)
    rows = visit.page.locator("#video-stages tr")
    assert rows.locator("th").all_inner_texts()[1:] == [
        "Text encoder",
        "NFE 1",
        "NFE 2",
        "NFE 3",
        "VAE decoder",
        "Video encode",
    ]
    total = float(visit.page.locator("#video-total .ms").inner_text().split()[0])
    stages = [float(text) for text in rows.locator(".ms").all_inner_texts()]
    assert sum(stages) == pytest.approx(total, abs=0.5 * len(stages))


def test_the_strip_shows_the_same_seed_at_every_nfe_side_by_side(visit: Visit) -> None:
    before = len(stored(visit))
    visit.page.fill("#video-prompt", PROMPT)
    visit.page.fill("#video-seed", "11")
    visit.compare()
    cards = visit.page.locator("#video-comparison figure")
    expect(cards).to_have_count(4)
    for index in range(4):
        assert re.fullmatch(rf"{index + 1} NFE\s+[0-9.]+ ms", cards.nth(index).locator("figcaption").inner_text())
        playable(cards.nth(index).locator("video"))
        assert cards.nth(index).locator("video").evaluate("v => v.duration") == SECONDS
    made = stored(visit)
    assert len(made) == before + 4
    assert [(video["seed"], video["num_inference_steps"]) for video in made[:4]] == [(11, 4), (11, 3), (11, 2), (11, 1)]
    pause = visit.page.locator("#video-play-strip")
    expect(pause).to_have_text("Pause")
    pause.click()
    assert cards.locator("video").evaluate_all("all => all.every(video => video.paused)")
    cards.nth(1).locator("button").click()
    visit.status("Video and settings are back.")
    assert visit.page.locator("input[name=video-nfe]:checked").input_value() == "2"


@pytest.mark.parametrize("format", ["mp4", "webp", "gif"])
def test_a_download_is_the_whole_video(visit: Visit, tmp_path: Path, format: str) -> None:
    ask(visit, seed="5", nfe=2)
    with visit.page.expect_download() as download:
        visit.page.click(f"#video-download-{format}")
    assert download.value.suggested_filename == f"tiny-video-5-2nfe.{format}"
    download.value.save_as(tmp_path / "video")
    [made] = [video["id"] for video in stored(visit)[:1]]
    content = httpx.get(f"{visit.url}/v1/videos/{made}/content", params={"format": format}).content
    assert (tmp_path / "video").read_bytes() == content
    if format == "mp4":
        assert len(frames_of(content)) == FRAMES
    else:
        assert Image.open(io.BytesIO(content)).format == format.upper()


@pytest.mark.parametrize("button", ["#video-copy-curl", "#video-copy-python"])
def test_the_copied_code_makes_the_same_video(visit: Visit, tmp_path: Path, button: str) -> None:
    ask(visit, SHELL_TROUBLE, "9", 2)
    code = copied(visit, button)
    command = ["sh", "-ec", code] if "curl" in button else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    [made] = [video["id"] for video in stored(visit) if video["prompt"] == SHELL_TROUBLE and video["seed"] == 9][-1:]
    content = httpx.get(f"{visit.url}/v1/videos/{made}/content").content
    assert (tmp_path / "video.mp4").read_bytes() == content


@pytest.mark.parametrize("knows_it", [True, False])
def test_a_browser_without_h264_shows_the_animation(visit: Visit, knows_it: bool) -> None:
    if knows_it:
        visit.page.add_init_script(NO_H264)
        visit.page.reload()
    else:
        visit.page.route("**/content?format=mp4", lambda route: route.fulfill(body=b"nothing that can be played"))
    visit.begin(PROMPT, nfe=1)
    expect(visit.page.locator("#video-unplayable")).to_be_visible()
    expect(visit.page.locator("#video-picture")).to_have_attribute("alt", PROMPT)
    expect(player(visit)).to_be_hidden()
    visit.page.wait_for_function("() => document.getElementById('video-picture').complete")
    assert visit.page.locator("#video-picture").get_attribute("src").startswith("blob:")
    assert shown(visit, "#video-picture").shape == (32, 64, 3)


@pytest.mark.parametrize("options", [{"reduced_motion": "reduce"}])
def test_nothing_moves_by_itself_for_those_who_want_no_motion(visit: Visit, held: Held) -> None:
    with held():
        visit.begin(PROMPT, nfe=2)
        in_progress(visit)
    visit.status("Done: 2 NFE")
    playable(player(visit))
    assert player(visit).evaluate("v => v.paused && v.currentTime === 0")
    visit.page.locator("#video-film button").first.click()
    assert visit.page.locator("#video-picture").get_attribute("src").startswith("data:image/png")  # one frame of the animation


# ---- jobs ----


def test_cancel_stops_a_video_that_is_being_made(visit: Visit, held: Held) -> None:
    prompt = "a blue ring"
    with held():
        visit.begin(prompt)
        in_progress(visit)
        visit.page.click("#video-cancel")
        visit.status("Cancelled.")
    expect(visit.page.locator("#video-cancel")).to_be_disabled()
    expect(visit.page.locator("#video-problem")).to_be_hidden()
    expect(tiles(visit, prompt)).to_have_attribute("data-state", "Cancelled")
    [video] = [video for video in stored(visit) if video["prompt"] == prompt]
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    ask(visit)


def test_cancel_ends_a_comparison(visit: Visit, held: Held) -> None:
    before = len(stored(visit))
    with held():
        visit.page.fill("#video-prompt", PROMPT)
        visit.page.click("#video-compare")
        in_progress(visit)
        visit.page.keyboard.press("Escape")
        visit.status("Cancelled.")
    assert len(stored(visit)) == before + 1


def test_reload_finds_the_video_that_is_being_made(visit: Visit, held: Held) -> None:
    with held():
        visit.begin("a green star", "18446744073709551615", 3)
        in_progress(visit)
        visit.page.reload()
        in_progress(visit)
        assert visit.page.input_value("#video-prompt") == "a green star"
        assert visit.page.input_value("#video-seed") == "18446744073709551615"
        assert visit.page.locator("input[name=video-nfe]:checked").input_value() == "3"
    expect(player(visit)).to_have_attribute("aria-label", "a green star")
    visit.page.reload()
    expect(player(visit)).to_have_attribute("aria-label", "a green star")


def test_history_is_what_the_server_has_page_by_page(visit: Visit, held: Held) -> None:
    for seed in range(14):
        body = {"prompt": "many", "seed": seed, "num_inference_steps": 1}
        assert httpx.post(f"{visit.url}/v1/videos", json=body).status_code == 200
    visit.page.goto("about:blank")
    visit.page.goto(f"{visit.url}/#video")
    expect(visit.page.locator("#video-history button")).to_have_count(12)
    visit.page.click("#video-more")
    expect(tiles(visit, "many")).to_have_count(14)
    titles = tiles(visit, "many").evaluate_all("all => all.map(button => button.title)")
    assert titles == [f"many · 1 NFE · seed {seed}" for seed in reversed(range(14))]
    expect(tiles(visit, "many").first).to_have_attribute("data-state", "Done")  # without anybody's asking again
    expect(tiles(visit, "many").first.locator("img")).to_be_visible()
    tiles(visit, "many").nth(3).click()
    expect(player(visit)).to_have_attribute("aria-label", "many")
    assert visit.page.input_value("#video-seed") == "10"
    with visit.page.expect_response(lambda answer: answer.request.method == "DELETE"):
        visit.page.click("#video-delete")
    visit.status("Deleted.")
    expect(tiles(visit, "many")).to_have_count(13)
    expect(player(visit)).to_be_hidden()
    assert 10 not in [video["seed"] for video in stored(visit) if video["prompt"] == "many"]


def test_a_deleted_video_is_said_to_be_deleted(visit: Visit, held: Held) -> None:
    with held():
        visit.begin("a gone star")
        in_progress(visit)
        [video] = [video for video in stored(visit) if video["prompt"] == "a gone star"]
        assert httpx.delete(f"{visit.url}/v1/videos/{video['id']}").status_code == 200
        visit.status("The video was deleted.")
    expect(tiles(visit, "a gone star")).to_have_count(0)


# ---- what goes wrong ----


@pytest.mark.parametrize("prompt", ["   ", "a " * 40], ids=["blank", "too many tokens"])
def test_an_error_is_shown_in_the_server_s_words(visit: Visit, prompt: str) -> None:
    visit.page.fill("#video-prompt", prompt)
    visit.page.click("#video-generate")
    said = httpx.post(f"{visit.url}/v1/videos", json={"prompt": prompt}).json()["error"]["message"]
    expect(visit.page.get_by_role("alert")).to_have_text(said)
    visit.refused()


def test_a_video_that_cannot_be_made_says_why(browser: Browser, repository: Path, tmp_path: Path) -> None:
    """It fails in the hands of another process, which has the same store."""
    server = serve_videos(repository, tmp_path, "--set", "video_workers=0")
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    try:
        for visit in visited(server.url, browser, {}, part="#video"):
            visit.begin(PROMPT)
            visit.status("Queued.")
            lease = store.claim("another process")
            assert lease is not None
            store.fail(lease, "numerical_error", "the student's output is not finite: no video was made")
            expect(visit.page.get_by_role("alert")).to_contain_text("output is not finite: no video was made")
            expect(visit.page.locator("#video-noise")).to_be_visible()
            expect(visit.page.locator("#video-downloads")).to_be_hidden()
    finally:
        store.close()
        assert server.stop() == 0


def test_a_request_whose_answer_was_lost_is_one_video(visit: Visit) -> None:
    def lose_the_answer(route: Route) -> None:
        route.fetch()
        route.abort()

    visit.page.route("**/v1/videos", lose_the_answer, times=1)
    ask(visit, "lost", nfe=1)
    visit.refused()
    keys = [request.headers["idempotency-key"] for request in posts(visit)]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert len([video for video in stored(visit) if video["prompt"] == "lost"]) == 1


def test_a_lost_connection_is_made_again_with_the_server(browser: Browser, repository: Path, tmp_path: Path) -> None:
    server = serve_videos(repository, tmp_path, "--set", "video_workers=0")
    try:
        for visit in visited(server.url, browser, {}, part="#video"):
            visit.begin(PROMPT)
            visit.status("Queued.")
            server.stop(signal.SIGKILL)
            visit.status("Connecting again …")
            server = serve_videos(repository, tmp_path, "--port", server.url.rpartition(":")[2])
            visit.status("Done: 4 NFE")
            expect(player(visit)).to_have_attribute("aria-label", PROMPT)
            assert len(stored(visit)) == len(posts(visit)) == 1
            visit.refused()
    finally:
        server.stop(signal.SIGKILL)


def test_a_server_with_keys_shows_each_its_own_videos(browser: Browser, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, other, pictures = (create(file, name, scopes) for name, scopes in KEYS.items())
    server = serve_videos(repository, tmp_path, "--keys-file", str(file))
    try:
        for visit in visited(server.url, browser, {}, rungs=0, part="#video"):
            for used, count in ((key, 1), (other, 0)):
                use_key(visit, used)
                expect(visit.page.locator("#video-prompt")).to_be_visible()
                expect(visit.page.locator("#video-history button")).to_have_count(0)
                if count:
                    ask(visit)
                    playable(player(visit))
                    assert posts(visit)[-1].headers["authorization"] == f"Bearer {used}"
                    assert used not in visit.page.locator("#video-panel .code").inner_text()
                    assert "FEWSTEP_API_KEY" in visit.page.locator("#video-curl").inner_text()
                expect(visit.page.locator("#video-history button")).to_have_count(count)
            use_key(visit, pictures)
            expect(visit.page.get_by_role("alert")).to_contain_text("videos")
            visit.refused()
    finally:
        assert server.stop() == 0


KEYS = {"alice": ["videos", "models"], "bob": ["videos", "models"], "carol": ["images", "models"]}


def use_key(visit: Visit, key: str) -> None:
    expect(visit.page.locator("#access")).to_be_attached()
    if not visit.page.locator("#key").is_visible():
        visit.page.click("#access summary")
    visit.page.fill("#key", key)
    visit.page.get_by_role("button", name="Use this key").click()


# ---- for everybody ----


def show_everything(visit: Visit) -> None:
    ask(visit)
    visit.compare()


@pytest.mark.parametrize("options", [{"color_scheme": "light"}, {"color_scheme": "dark"}], ids=["light", "dark"])
def test_no_rule_of_axe_is_broken(visit: Visit) -> None:
    for stage in ("empty", "full"):
        if stage == "full":
            show_everything(visit)
        visit.page.evaluate("() => Promise.all(document.getAnimations().map(animation => animation.finished))")
        results = Axe().run(visit.page)
        assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("options", [{"viewport": {"width": 320, "height": 640}}, {"viewport": {"width": 800, "height": 600}}])
def test_nothing_scrolls_sideways(visit: Visit) -> None:
    show_everything(visit)
    visit.page.fill("#video-prompt", "x" * 90)
    assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    keyboard = visit.page.keyboard
    keyboard.press("Tab")
    keyboard.press("Enter")  # skips to the prompt
    keyboard.press("ControlOrMeta+A")
    keyboard.type("a white ring moves up")
    keyboard.press("Tab")
    keyboard.press("ArrowLeft")
    keyboard.press("Control+Enter")
    visit.status("Done: 3 NFE")
    expect(player(visit)).to_have_attribute("aria-label", "a white ring moves up")
