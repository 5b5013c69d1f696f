"""The studio's process, and a browser's hand on its page; for the tests and for `new_user.py`."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager


@contextmanager
def studio(folder, python=sys.executable, environment=None):
    """A studio's process in `folder`, and its address; killed in the end, as by a crash."""
    command = [str(python), "-m", "lownibble", "studio", "--port", "0", "--folder", "runs"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process.stderr.readline().split()[-1]
        finally:
            process.kill()


def until(browser, expression, seconds=300):
    """Wait until an expression is true on the page."""
    end = time.monotonic() + seconds
    while not browser.value(expression):
        assert time.monotonic() < end, browser.value("document.body.innerText")
        time.sleep(0.1)


def fill(browser, name, text):
    """Set an option's field, where it is to be seen."""
    browser.value(
        f"(() => {{ const e = document.querySelector('[data-option=\"{name}\"]'); e.value = {json.dumps(text)}; "
        "e.dispatchEvent(new Event(e.tagName == 'SELECT' ? 'change' : 'input')); })()"
    )


def click(browser, text):
    """Click the button or link that says this, once it is to be seen."""
    found = f"[...document.querySelectorAll('button, a')].find(e => e.textContent == {json.dumps(text)} && e.offsetParent)"
    until(browser, f"!!{found}")
    browser.value(f"{found}.click()")


def choose(browser, what):
    """Choose what to run: 'train', 'compare' or 'study'."""
    browser.value(f"document.querySelector('input[name=what][value={what}]').click()")


def upload(browser, path):
    """Give a file to the page, as the file dialog does, and wait for its preview."""
    document = browser("DOM.getDocument")["root"]["nodeId"]
    node = browser("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    browser("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    until(browser, "!document.querySelector('#preview').hidden && !document.querySelector('#look').disabled")


def badge(words):
    """Whether the job's page shows this state."""
    return f"document.querySelector('#j-badge')?.textContent == '{words}'"


def check_quiet(browser, address):
    """No message on the console, nothing asked of elsewhere, nothing wider than the window."""
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert [e for e in browser.complaints() if e["method"] != "Network.requestWillBeSent"] == []
    assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
