"""listening.py: the page in a real browser, from disk: it plays, switches at one instant, keeps a secret."""

import base64
import json

import numpy as np
import pytest
import soundfile as sf
from conftest import voice
from helpers.browser import Browser, find_browser

from snac48.listening import ListeningPage, as_script, wav_name

SYSTEMS = ("original", "base_snac", "base_snac_sinc48", "ours_24k", "ours_48k")
NAMES = ("speaker/one.wav", "</script><b>two</b>.wav", "three #?%.wav")


def make_page(folder, systems=SYSTEMS):
    page = ListeningPage(str(folder))
    for i, name in enumerate(NAMES):
        rates = [24000 if s in ("base_snac", "ours_24k") else 48000 for s in systems]
        signals = {s: (voice(1.2, rate, 5 * i + k), rate) for k, (s, rate) in enumerate(zip(systems, rates))}
        page.add(name, signals, {s: {"comb": 1.5 * k, "lsd": 0.5 + k} for k, s in enumerate(systems)})
    row = {"lsd": 1.25, "comb": 3.0}
    results = {
        "clips": 3, "seconds": 3.6, "checkpoint": "C", "level_policy": "Nothing is scaled.",
        "systems": {s: row for s in systems if s != "original"}, "original": {"comb": -2.0},
        "intervals": {s: {"lsd": [1.0, 1.5], "comb": [2.0, 4.0]} for s in systems},
        "differences": [{"system": "ours_48k", "against": "base_snac_sinc48",
                         "metrics": {"lsd": {"mean": -0.5, "low": -0.6, "high": -0.4, "real": True}}}],
    }  # fmt: skip
    return page.save(results)


def test_wavs_and_samples_are_the_same_sound(tmp_path):
    index = make_page(tmp_path)
    text = (tmp_path / "audio" / "001.js").read_text()
    assert text.startswith("clip(1, ") and "<" not in text
    for system, (rate, samples) in json.loads(text[len("clip(1, ") : -3]).items():
        wav, found = sf.read(tmp_path / f"001_{wav_name(system)}.wav", dtype="int16")
        assert found == rate and np.array_equal(np.frombuffer(base64.b64decode(samples), "<i2"), wav)
    assert "http" not in index.read_text()  # nothing from a network
    assert as_script({"a": float("nan"), "b": "</script>"}) == '{"a":"NaN","b":"\\u003c/script>"}'


@pytest.fixture(scope="module")
def browser():
    if not find_browser():
        pytest.skip("no chromium here: apt-get install chromium")
    with Browser() as b:
        yield b


@pytest.fixture
def page(browser, tmp_path):
    browser.errors.clear()
    browser.open(make_page(tmp_path))
    yield browser
    assert not browser.errors


def heard(browser) -> float:
    """RMS of what comes out now."""
    return browser.js(
        "(async () => { const a = new AnalyserNode(player.context, {fftSize: 8192}); player.out.connect(a);"
        "await new Promise((r) => setTimeout(r, 250)); const x = new Float32Array(8192);"
        "a.getFloatTimeDomainData(x); return Math.sqrt(x.reduce((s, v) => s + v * v, 0) / 8192) })()"
    )


GAINS = "Object.fromEntries(Object.entries(player.tracks).map(([k, t]) => [k, t.gain.gain.value]))"


def test_the_page_shows_the_tables_and_every_clip(page):
    assert page.js("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == [
        f"{i + 1}. {name}" for i, name in enumerate(NAMES)
    ]
    rows = page.js("[...document.querySelectorAll('#tables tr')].map((r) => r.innerText.split('\\t'))")
    assert rows[0][1:] == ["lsd", "comb"] and [r[0] for r in rows[1:6]] == list(SYSTEMS)
    assert rows[5][1:] == ["1.250 ± 0.250", "3.0 ± 1.0"] and rows[-1][1:] == ["-0.500 *"]
    assert "Nothing is scaled" in page.js("document.body.innerText")
    page.until("document.querySelectorAll('section:first-child canvas[data-drawn]').length === 5")
    # grey where a 24 kHz system can have nothing, colours of one scale elsewhere
    pixel = "drawn[{}].getContext('2d').getImageData(160, {}, 1, 1).data.join()"
    page.js(
        "window.drawn = [...document.querySelectorAll('section:first-child canvas')].map((canvas) => {"
        "const copy = new OffscreenCanvas(320, 160);"
        "const context = copy.getContext('2d', {willReadFrequently: true});"
        "context.drawImage(canvas, 0, 0); return copy }), 0"
    )
    assert page.js(pixel.format(1, 20)) == page.js(pixel.format(3, 20)) == "90,90,90,255"
    assert page.js(pixel.format(0, 20)) != "90,90,90,255" != page.js(pixel.format(1, 120))
    assert page.js("[...document.querySelectorAll('section:first-child dd')].length") == 10


def test_keys_play_and_switch_at_one_instant(page):
    page.key("2")
    page.until("player.playing && player.position() > 0.1")
    assert page.js("player.system") == "base_snac" and heard(page) > 0.001
    assert page.js(GAINS) == {s: float(s == "base_snac") for s in SYSTEMS}
    assert page.js("new Set(Object.values(player.tracks).map((t) => t.source.buffer.duration)).size") == 1
    began = page.js("player.began")
    page.key("5")
    page.until("player.tracks.ours_48k.gain.gain.value === 1")
    assert page.js(GAINS) == {s: float(s == "ours_48k") for s in SYSTEMS}
    assert page.js("player.began") == began  # nothing started anew
    assert heard(page) > 0.001
    assert "5 ours_48k" in page.js("document.querySelector('[aria-pressed=true]').textContent")
    page.key("ArrowDown")
    page.until("player.playing && player.clip === 1")
    assert page.js("player.system") == "ours_48k"
    page.key(" ")
    page.until("!player.playing")
    assert heard(page) == 0
    page.click("#loop")
    page.key(" ")
    page.until("player.playing")
    page.until("!player.playing")  # without loop a clip ends by itself


def test_buttons_and_spectrograms_play_what_they_stand_on(page):
    page.click("section:nth-child(2) [data-system=ours_24k]")
    page.until("player.playing && player.clip === 1 && player.system === 'ours_24k'")
    page.click("section:nth-child(1) .columns > :nth-child(3) .picture")
    page.until("player.playing && player.clip === 0 && player.system === 'base_snac_sinc48'")
    assert page.js("player.position()") > 0.5  # half of 1.2 s: where the click was
    page.key(" ")
    page.until("!player.playing")


def test_blind_keeps_its_secret_until_asked(page):
    page.click("#blind")
    text = "document.body.innerText"
    shown = page.js("document.querySelector('main').innerText")
    assert not any(name in shown for name in (*SYSTEMS, "speaker/one", "lsd", "wav"))
    assert "Nothing is scaled" not in page.js(text)  # the tables are gone, too
    assert page.js("document.querySelectorAll('canvas[data-drawn]').length") == 0
    buttons = (
        "[...document.querySelectorAll('section:first-child .columns button')].map((b) => b.textContent)"
    )
    assert page.js(buttons) == ["A", "B"]
    orders = [page.js("shuffle(), JSON.stringify(blind.order)") for _ in range(30)]
    assert len(set(orders)) > 3  # drawn anew each time
    assert all(sorted(two) == ["base_snac_sinc48", "ours_48k"] for two in json.loads(orders[-1]))
    order = [
        ["base_snac_sinc48", "ours_48k"],
        ["ours_48k", "base_snac_sinc48"],
        ["ours_48k", "base_snac_sinc48"],
    ]
    page.js(f"blind.order = {json.dumps(order)}; buildAll()")  # B stays B, whatever it is
    page.key("2")
    page.until("player.playing")
    assert page.js("player.system") == order[0][1] and page.js("$('choice').textContent") == "clip 1: B"
    page.key("ArrowDown")
    page.until("player.clip === 1 && player.playing")
    assert page.js("$('choice').textContent") == "clip 2: B" and page.js("player.system") == order[1][1]
    for i, two in enumerate(order[:2]):  # ours is better, twice; no answer to the third
        page.click(f"section:nth-child({i + 1}) .answer button:nth-child({1 + 2 * two.index('ours_48k')})")
    page.click("#reveal")
    assert "base_snac_sinc48 better: 0; ours_48k better: 2; no difference: 0" in page.js(text)
    assert "p = 0.500" in page.js(text)
    truths = page.js("[...document.querySelectorAll('.truth')].map((t) => t.textContent)")
    assert truths == [f"A was {a}, B was {b}" for a, b in order]
    page.click("#blind")
    page.until("document.querySelectorAll('section:first-child canvas[data-drawn]').length === 5")


def test_a_page_without_its_folder_says_so(browser, tmp_path):
    index = make_page(tmp_path)
    (tmp_path / "audio" / "000.js").unlink()
    browser.open(index)
    said = browser.until("document.querySelector('.error').textContent")
    assert said == "audio/000.js is missing: keep index.html beside the folder audio"
    browser.errors.clear()
