"""The lock, offline: versions that agree, a hash and a license for each package, a bill of materials that is valid.

    python tools/campaign/dependencies.py [--osv FOLDER_OR_FILE]

Known weaknesses are looked up in a dump of OSV's advisories (https://osv.dev, ecosystem PyPI) where one is given;
without it none are checked, and the figures say so.  `make lock` asks the index; this needs no network.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from frame import ROOT, Ask, Line, Row, main
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

sys.path.append(str(ROOT / "tools"))
import sbom

# What may stand beside an MIT program: permissive, or weak copyleft by file.
FINE = re.compile(
    r"MIT|Apache|BSD|ISC|PSF|Python|MPL|Mozilla|Unlicense|HPND|Zlib|CC0|0BSD|LGPL|Public Domain|NumFOCUS|Dual License",
    re.IGNORECASE,
)


def pins(path: Path) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE)
    return {str(canonicalize_name(name)): number for name, number in lines}


def installed(name: str) -> str | None:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


def advisories(place: Path) -> Iterator[dict[str, Any]]:
    """OSV's records: a folder of JSON files, a zip of them as OSV gives it out, or one file with a list."""
    if place.is_dir():
        yield from (json.loads(path.read_text()) for path in sorted(place.rglob("*.json")))
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))
    else:
        found = json.loads(place.read_text())
        yield from found if isinstance(found, list) else [found]


def concerns(record: dict[str, Any], locked: dict[str, str]) -> Iterator[str]:
    """Packages of the lock whose version an advisory names or whose range it falls into (OSV schema, "affected")."""
    for affected in record.get("affected", []):
        package = affected.get("package", {})
        name = str(canonicalize_name(package.get("name", "")))
        if package.get("ecosystem") == "PyPI" and name in locked and not record.get("withdrawn"):
            ranges = [r for r in affected.get("ranges", []) if r.get("type") == "ECOSYSTEM"]
            if locked[name] in affected.get("versions", []) or any(_within(locked[name], r["events"]) for r in ranges):
                yield name


def _within(number: str, events: list[dict[str, str]]) -> bool:
    """Introduced at or before, and neither fixed nor past its last affected version."""
    try:
        ours, inside = Version(number), False
        for event in sorted(events, key=_when):
            ((what, at),) = event.items()
            if what == "introduced" and ours >= _parsed(at):
                inside = True
            elif (what == "fixed" and ours >= _parsed(at)) or (what == "last_affected" and ours > _parsed(at)):
                inside = False
        return inside
    except InvalidVersion:
        return True  # what cannot be told is looked at by a person


def _parsed(at: str) -> Version:
    return Version("0.dev0" if at == "0" else at)  # "0" is before every version


def _when(event: dict[str, str]) -> Version:
    return _parsed(next(iter(event.values())))


def run(ask: Ask) -> Sequence[Line]:
    facts = json.loads(sbom.FACTS.read_text())
    packages = {package["name"]: package for package in facts["packages"]}
    constrained, locked = pins(ROOT / "constraints.txt"), pins(ROOT / "requirements.lock")
    same = Line("versions: constraints, lock, bill of materials and, where installed, this environment agree")
    for name, package in packages.items():
        here = installed(name)
        told = {constrained.get(name), locked.get(name), package["version"], *([here] if here else [])}
        same.count(None if len(told) == 1 else f"{name}: {sorted(map(str, told))}")
    hashes = Line("every package has hashes, and the lock names them")
    text = (ROOT / "requirements.lock").read_text()
    for name, package in packages.items():
        digests = [file["sha256"] for file in package["files"].values()]
        hashes.count(None if digests and all(digest in text for digest in digests) else name)
    license = Line("every package says its license, and it may be used beside MIT")
    for name, package in packages.items():
        license.count(None if FINE.search(package["license"]) else f"{name}: {package['license']!r}")
    material = Line("bill of materials (`make sbom`), against CycloneDX 1.6's schema")
    document = json.dumps(sbom.bom(facts))
    found = sbom.faults(document)
    material.figures = {"validated": "no: cyclonedx-python-lib is not installed" if found is None else "yes"}
    material.count(found or None)
    known = Line("known weaknesses (OSV)")
    if OSV:
        for record in advisories(Path(OSV)):
            hit = list(concerns(record, locked))
            known.count(f"{record.get('id')}: {', '.join(hit)}" if hit else None)
    else:
        known.figures = {"not checked:": "no advisories given (--osv FILE)"}
    return [same, hashes, license, material, known]


OSV = ""
ROW = Row("dependencies", "Dependencies", run, share=0.2)

if __name__ == "__main__":
    if "--osv" in sys.argv:
        at = sys.argv.index("--osv")
        OSV = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    main(ROW)
