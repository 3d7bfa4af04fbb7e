"""The lock: every package that Dither and its tests install, with versions, hashes, licenses and platforms.

constraints.txt says which versions go together; this asks the package index, through pip, what they pull in and which
files there are of each for three platforms, and writes

    constraints.txt           every version, those included that only other packages ask for
    requirements.lock         the same with hashes, for `pip install --require-hashes -r requirements.lock`
    tools/dependencies.json   what the SBOM, the licenses and the campaign read, so that they need no network

    python tools/lock.py      takes some minutes; nothing is downloaded but metadata, nothing installed

The hashes are those of the files for CPython 3.11 on Linux x86-64, macOS arm64 and Windows x86-64; packages of which an
index has no wheel are named with their source archive.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata as metadata_here
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, LOCK, FACTS = ROOT / "constraints.txt", ROOT / "requirements.lock", ROOT / "tools" / "dependencies.json"
EXTRAS = ("calibrate", "bnb", "compressed", "tasks", "test", "dev")  # gptq is compiled on the machine that wants it
PLATFORMS = {
    "Linux x86-64": ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 36))),
    "macOS arm64": ("macosx_15_0_arm64",),
    "Windows x86-64": ("win_amd64",),
}
PYTHON = "3.11"
UNSAID = {"axe-playwright-python": "MIT"}  # no word in its metadata; its LICENSE is this text
_NOT_FOUND = re.compile(r"No matching distribution found for ([^\s=<>!~;]+)")


def wanted() -> dict[str, list[str]]:
    """What pyproject.toml asks for: for running, and for everything else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    more = [line for extra in EXTRAS for line in extras[extra] if not line.startswith("dither")]
    return {"runtime": project["dependencies"], "all": [*project["dependencies"], *dict.fromkeys(more)]}


def pip_report(words: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip would install, and its complaint where it would not."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["--target", scratch, "--report", str(report), *words]
        # Files of this machine (find-links) are not what others get.
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_FIND_LINKS": ""}
        )
        return (json.loads(report.read_text())["install"] if ran.returncode == 0 else []), ran.stderr


def resolved() -> dict[str, dict[str, Any]]:
    """Name → metadata of everything that is needed."""
    found, said = pip_report(["-c", str(CONSTRAINTS), *wanted()["all"]])
    if not found:
        raise SystemExit(said[-2000:])
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in found}


def files_for(pins: dict[str, str], tags: Sequence[str], doubtful: set[str]) -> dict[str, tuple[str, str]]:
    """Name → file and hash of its wheel for a platform; a name without one is left out, and is `doubtful` from then on.

    pip stops at the first package without a wheel, so that those are asked for one by one.
    """
    words = ["--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
    words += [word for tag in tags for word in ("--platform", tag)]
    waiting = [[name for name in pins if name not in doubtful], *([name] for name in sorted(doubtful))]
    files = {}
    while waiting:
        names = waiting.pop(0)
        found, said = pip_report([*words, *(f"{name}=={pins[name]}" for name in names)])
        files |= {canonicalize_name(item["metadata"]["name"]): _file(item) for item in found}
        missing = _NOT_FOUND.search(said)
        if not found and missing is None:
            raise SystemExit(said[-2000:])
        if not found and missing is not None:
            doubtful.add(canonicalize_name(missing[1]))
            rest = [name for name in names if name not in doubtful]
            waiting += [rest] if rest else []
    return files


def source_of(name: str, version: str) -> tuple[str, str]:
    found, said = pip_report(["--no-deps", "--no-binary", name, f"{name}=={version}"])
    if not found:
        raise SystemExit(said[-2000:])
    return _file(found[0])


def _file(item: dict[str, Any]) -> tuple[str, str]:
    info = item["download_info"]
    return info["url"].rsplit("/", 1)[1], info["archive_info"]["hashes"]["sha256"]


def license_of(metadata: dict[str, Any]) -> str:
    """As the package says it: an SPDX expression, a short text, or its classifiers."""
    text = metadata.get("license_expression") or metadata.get("license") or ""
    told = [c.rsplit(" :: ", 1)[1] for c in metadata.get("classifier", []) if c.startswith("License :: ")]
    if not text and not told:  # an older pip leaves the expression out: it stands in what is installed
        with suppress(PackageNotFoundError):
            here = metadata_here(metadata["name"])
            text = here.get("License-Expression") or UNSAID.get(metadata["name"], "")
    short = text if text and "\n" not in text and len(text) < 60 else ""
    return short or "; ".join(told) or (text.strip().splitlines()[0][:60] if text.strip() else "")


def requires(metadata: dict[str, Any], known: Sequence[str]) -> list[str]:
    """Which of the locked packages this one asks for, extras left out."""
    needed = [Requirement(line) for line in metadata.get("requires_dist", [])]
    plain = [
        need for need in needed if need.marker is None or need.marker.evaluate({"extra": "", "python_version": PYTHON})
    ]
    return sorted({str(canonicalize_name(need.name)) for need in plain} & set(known))


def reached(start: Sequence[str], needs: dict[str, list[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [str(canonicalize_name(Requirement(line).name)) for line in start]
    while waiting:
        name = waiting.pop()
        if name in needs and name not in seen:
            seen.add(name)
            waiting += needs[name]
    return seen


def facts() -> dict[str, Any]:
    found = resolved()
    pins = {name: metadata["version"].split("+")[0] for name, metadata in sorted(found.items())}
    needs = {name: requires(found[name], list(pins)) for name in pins}
    running = reached(wanted()["runtime"], needs)
    doubtful: set[str] = set()
    wheels = {platform: files_for(pins, tags, doubtful) for platform, tags in PLATFORMS.items()}
    packages = []
    for name, version in pins.items():
        files = {platform: wheels[platform][name] for platform in PLATFORMS if name in wheels[platform]}
        if not files:
            files = {"source": source_of(name, version)}
        packages.append(
            {
                "name": name,
                "version": version,
                "license": license_of(found[name]),
                "for": "running" if name in running else "options and tests",
                "requires": needs[name],
                "files": {platform: {"name": file, "sha256": sha256} for platform, (file, sha256) in files.items()},
            }
        )
    return {"python": PYTHON, "platforms": list(PLATFORMS), "packages": packages}


def write(found: dict[str, Any]) -> None:
    FACTS.write_text(json.dumps(found, indent=1) + "\n")
    marker = f'python_version >= "{PYTHON}"'
    lines = CONSTRAINTS.read_text().splitlines()
    known = {str(canonicalize_name(line.partition("==")[0])) for line in lines}
    lines += [f"{p['name']}=={p['version']}; {marker}" for p in found["packages"] if p["name"] not in known]
    CONSTRAINTS.write_text("\n".join(sorted(lines, key=str.lower)) + "\n")
    locked = []
    for package in found["packages"]:
        hashes = sorted({file["sha256"] for file in package["files"].values()})
        head = f"{package['name']}=={package['version']}"
        locked.append(" \\\n    ".join([head, *(f"--hash=sha256:{digest}" for digest in hashes)]))
    LOCK.write_text(
        "# Written by tools/lock.py: CPython 3.11 on Linux x86-64, macOS arm64, Windows x86-64.\n"
        + "\n".join(locked)
        + "\n"
    )


if __name__ == "__main__":
    write(facts())
