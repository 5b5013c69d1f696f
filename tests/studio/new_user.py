"""A new user's way, in times and pictures: from `pip install` to a chat with an adapter trained on 200 rows of their own.

    python tests/studio/new_user.py dist/lownibble-*.whl [--first torch==2.13.0] --output RECORD.json --pictures FOLDER

A new virtual environment, an empty cache and an empty folder; after that only what the page offers, by a headless Chromium:
upload, preview, start with the options as they are, chat. Time that a person reads and types in is not in it;
downloads are. `--first` installs what a machine may have a build of its own for. The record has the machine's load before and
after each step, since someone else's work on it is in the times, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chromium import Chromium
from driving import badge, check_quiet, click, studio, until, upload

THINGS = ("kettle", "lamp", "bicycle", "tent", "violin", "camera", "desk", "jacket", "radio", "ladder")
ASKED = {
    "How do I return the {}?": "Put the {} back into its box and leave it at any post office within thirty days.",
    "Is the {} in stock?": "The {} is here, and leaves our house on the next working day.",
    "My {} arrived broken. What now?": "We are sorry. A new {} is on its way to you; keep the old one.",
    "How long does the {} take to arrive?": "Your {} needs three days, or one with express.",
    "Can I change the colour of the {}?": "Until we pack the {} you can: write to us with its number.",
    "Does the {} have a guarantee?": "The {} has two years, and we mend it for ten.",
    "What does it cost to send the {}?": "We send the {} free of charge.",
    "Where is the {} made?": "Our {} is made in a small workshop in Jena.",
    "Can I collect the {} myself?": "Of course. The {} waits for you at the counter, from nine to six.",
    "Is there a cheaper {}?": "There is a used {} for half the price, and as good.",
}
VARIANTS = ("{}", "Hello! {}")


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """200 conversations with an invented shop."""
    return [
        {
            "messages": [
                {"role": "user", "content": variant.format(question.format(thing))},
                {"role": "assistant", "content": f"Dear customer, {answer.format(thing)}"},
            ]
        }
        for variant in VARIANTS
        for question, answer in ASKED.items()
        for thing in THINGS
    ]


class Clock:
    """Seconds of each step and the machine's load at its end, and a picture of the page."""

    def __init__(self, pictures: Path | None) -> None:
        self.pictures, self.seconds, self.load, self.began = pictures, dict[str, float](), [os.getloadavg()[0]], time.monotonic()

    def step(self, name: str, browser: Chromium | None = None) -> None:
        """End a step; making the picture is nobody's time."""
        self.seconds[name] = round(time.monotonic() - self.began, 1)
        self.load.append(os.getloadavg()[0])
        print(f"{name}: {self.seconds[name]} s", file=sys.stderr)
        if browser and self.pictures:
            browser.picture(self.pictures / f"{len(self.seconds)}-{name.replace(' ', '-')}.png")
        self.began = time.monotonic()


def main() -> int:
    """Go the whole way once; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the wheel to install, with its extra 'serve'")
    parser.add_argument("--first", metavar="REQUIREMENT", help="what is installed before it")
    parser.add_argument("--output", help="write the record to this .json file")
    parser.add_argument("--pictures", type=Path, help="write a picture of each step to this folder")
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LOWNIBBLE"))}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        mine, clock = folder / "rows.jsonl", Clock(options.pictures)
        mine.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        for requirement in filter(None, (options.first, f"{options.wheel.resolve()}[serve]")):
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True, cwd=folder, env=environment)
        clock.step("install")
        with studio(folder, python, environment) as address, Chromium(folder / "chromium") as browser:
            browser.open(address)
            until(browser, "document.querySelectorAll('.planned').length == 3")
            clock.step("open the page", browser)
            upload(browser, mine)
            until(browser, "document.querySelector('.example mark')?.textContent.includes('Dear customer')")
            clock.step("upload and preview", browser)
            click(browser, "Start training")
            until(browser, "/done|failed|died/.test(document.querySelector('#j-badge')?.textContent)", 1800)
            assert browser.value(badge("done")), browser.value("document.body.innerText")
            clock.step("train", browser)
            check_quiet(browser, address)
            click(browser, "Chat")
            until(browser, "!!document.querySelector('#chat')", 600)
            chat = browser.value("document.querySelector('#chat').href")
            browser.open(chat)
            until(browser, "document.querySelectorAll('section option').length == 4")
            clock.step("start the chat", browser)
            question = "How do I return the teapot?"
            browser.value(f"document.querySelector('#text').value = {json.dumps(question)}")
            browser.value("document.querySelector('#say').requestSubmit()")
            done = "!document.querySelector('.send').disabled && document.querySelectorAll('.assistant').length == 2"
            until(browser, done, 600)
            clock.step("both answer", browser)
            answers = browser.value("[...document.querySelectorAll('.assistant')].map(e => e.textContent)")
            check_quiet(browser, chat)
            for job in (folder / "runs" / ".studio" / "jobs").glob("serve-*/job.json"):
                os.kill(json.loads(job.read_text())["pid"], 15)
        evaluations = json.loads((folder / "runs" / "qlora-1" / "record.json").read_text())["evaluations"]
    from lownibble import record

    found = {
        **record.new("new-user"), "status": "ok", "environment": record.environment(), "cpus": os.cpu_count(),
        "load": clock.load, "rows": len(rows()), "installed_first": options.first,
        "seconds": clock.seconds, "total_seconds": round(sum(clock.seconds.values()), 1),
        "evaluation_losses": [evaluations[0]["loss"], evaluations[-1]["loss"]], "question": question,
        "answers": dict(zip(("base", "adapter"), answers, strict=True)),
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if options.output:
        record.write(options.output, found)
    return 0 if answers[1].startswith("Dear customer") else 1


if __name__ == "__main__":
    sys.exit(main())
