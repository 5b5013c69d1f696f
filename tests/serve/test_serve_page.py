"""The page at `/` in a headless Chromium. Oracle: what the API answers to the same questions."""

import time

import pytest
from chromium import BINARY, Chromium

TURNS = (
    "[...document.querySelectorAll('section')].map(s => [...s.querySelectorAll('.turn')].map(t => [t.className, t.textContent]))"
)


@pytest.fixture
def browser(tmp_path):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    with Chromium(tmp_path / "chromium") as chromium:
        yield chromium


def until(browser, expression, seconds=30):
    end = time.monotonic() + seconds
    while not browser.value(expression):
        assert time.monotonic() < end, f"{expression} is still {browser.value(expression)}"
        time.sleep(0.05)


def foreign(browser, url):
    """Complaints, and requests to other places than the server."""
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    loud = [e for e in browser.complaints() if e["method"] != "Network.requestWillBeSent"]
    return loud, [one for one in asked if not one.startswith(url)]


def test_two_models_side_by_side(live, browser):
    made = live()
    browser.open(made.url)
    until(browser, "document.querySelectorAll('option').length == 8")
    assert browser.value("[...document.querySelectorAll('select')].map(s => s.value)") == ["model", "one"]
    browser.value("document.querySelector('#tokens').value = 8; document.querySelector('select').value = 'two'; 0")
    for number, text in enumerate(("w1 w5", "w9"), 1):
        browser.value(f"document.querySelector('#text').value = '{text}'; document.querySelector('#say').requestSubmit(); 0")
        until(
            browser,
            f"!document.querySelector('.send').disabled && document.querySelectorAll('.assistant').length == {2 * number}",
        )
    found = browser.value(TURNS)
    client = made.client()
    for name, turns in zip(("two", "one"), found, strict=True):
        messages = []
        for text in ("w1 w5", "w9"):
            messages.append({"role": "user", "content": text})
            answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=8)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        assert [text for _, text in turns] == [message["content"] for message in messages]
    until(browser, "document.querySelector('#state').textContent.includes('adapters held: 2')")
    assert all("tokens/s" in text for text in browser.value("[...document.querySelectorAll('.rate')].map(r => r.textContent)"))
    assert foreign(browser, made.url) == ([], [])
    browser.value("document.querySelector('#clear').click()")
    assert browser.value(TURNS) == [[], []]


def test_links_narrow_windows_and_names_that_are_no_markup(live, browser, adapters):
    made = live()
    browser.open(f"{made.url}/?left=one&right=three&ask=%3Cimg%20src=x%20onerror=alert(1)%3E", width=360, dark=True)
    until(browser, "document.querySelectorAll('.assistant').length == 2")
    assert browser.value("[...document.querySelectorAll('select')].map(s => s.value)") == ["one", "three"]
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.documentElement.scrollWidth") <= 360
    assert foreign(browser, made.url) == ([], [])


def test_errors_and_keys(live, browser):
    made = live(api_key="secret")
    browser.open(made.url)
    until(browser, "!document.querySelector('#keyed').hidden")
    browser.value("document.querySelector('#key').value = 'secret'; document.querySelector('#key').onchange(); 0")
    until(browser, "document.querySelectorAll('option').length == 8")
    browser.value("document.querySelector('#tokens').value = 100000; document.querySelector('#text').value = 'w1'; 0")
    browser.value("document.querySelector('#say').requestSubmit(); 0")
    until(browser, "document.querySelectorAll('.error').length == 2")
    assert "the context is 256" in browser.value("document.querySelector('.error').textContent")
