"""The lock and what is made of it: pyproject's wishes are in it, its files agree, the bill of materials is whole."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FACTS: dict[str, Any] = json.loads((ROOT / "tools" / "dependencies.json").read_text())
PACKAGES = {package["name"]: package for package in FACTS["packages"]}


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    place = ROOT / path
    monkeypatch.setattr(sys, "path", [str(place.parent), *sys.path])
    spec = importlib.util.spec_from_file_location(f"script_{place.stem}", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_everything_that_is_asked_for_is_locked() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    asked = [
        Requirement(line)
        for line in re.findall(r'^    "([^"\[]+)",?', text, re.MULTILINE)
        if "=" in line or "<" in line
    ]
    wanted = [need for need in asked if need.marker is None or need.marker.evaluate({"python_version": "3.11"})]
    assert len(wanted) > 25
    for need in wanted:
        package = PACKAGES[str(canonicalize_name(need.name))]
        assert need.specifier.contains(package["version"]), need


def test_its_files_agree() -> None:
    for name in ("constraints.txt", "requirements.lock"):
        pins = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / name).read_text(), re.MULTILINE)
        found = {str(canonicalize_name(package)): version for package, version in pins}
        assert {package: found.get(package) for package in PACKAGES} == {p: PACKAGES[p]["version"] for p in PACKAGES}, (
            name
        )
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    hashed = {
        line.partition("==")[0]: set(re.findall(r"sha256:([0-9a-f]{64})", line)) for line in lines if "==" in line
    }
    assert hashed == {name: {file["sha256"] for file in p["files"].values()} for name, p in PACKAGES.items()}


def test_the_bill_names_all_and_points_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    sbom = script("tools/sbom.py", monkeypatch)
    document = sbom.bom(FACTS)
    refs = [component["bom-ref"] for component in document["components"]] + [
        document["metadata"]["component"]["bom-ref"]
    ]
    assert len(set(refs)) == len(refs) == len(PACKAGES) + 1
    linked = [dependency["ref"] for dependency in document["dependencies"]]
    assert sorted(linked) == sorted(refs)
    assert {ref for dependency in document["dependencies"] for ref in dependency["dependsOn"]} <= set(refs)
    reached, waiting = set(), [document["metadata"]["component"]["bom-ref"]]
    needs = {dependency["ref"]: dependency["dependsOn"] for dependency in document["dependencies"]}
    while waiting:
        ref = waiting.pop()
        waiting += [] if ref in reached else needs[ref]
        reached.add(ref)
    assert reached == set(refs)
    assert sbom.bom(FACTS) == document
    assert sbom.faults(json.dumps(document)) in (None, "")  # by CycloneDX's own schema, where that is installed
    assert (ROOT / "docs" / "licenses.md").read_text() == sbom.listed(FACTS)


def record(**affected: Any) -> dict[str, Any]:
    """An advisory as OSV's schema 1.6 writes it."""
    return {"id": "PYSEC-0", "affected": [{"package": {"ecosystem": "PyPI", "name": "Jinja2"}, **affected}]}


RANGE = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1.6"}]}


@pytest.mark.parametrize(
    ("found", "advisory"),
    [
        (["jinja2"], record(versions=["3.1.5", "3.1.6"])),
        ([], record(versions=["3.1.5"], ranges=[RANGE])),
        (["jinja2"], record(ranges=[{"type": "ECOSYSTEM", "events": [{"fixed": "3.1.7"}, {"introduced": "3"}]}])),
        (["jinja2"], record(ranges=[{"type": "ECOSYSTEM", "events": [{"introduced": "3.1.6"}]}])),
        (
            ["jinja2"],
            record(ranges=[{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": "3.1.6"}]}]),
        ),
        ([], record(ranges=[{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": "3.1.5"}]}])),
        ([], record(versions=["3.1.6"]) | {"withdrawn": "2026-01-01T00:00:00Z"}),
        ([], {"id": "x", "affected": [{"package": {"ecosystem": "npm", "name": "jinja2"}, "versions": ["3.1.6"]}]}),
    ],
)
def test_an_advisory_concerns_the_versions_it_names(
    found: list[str], advisory: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = script("tools/campaign/dependencies.py", monkeypatch)
    assert list(campaign.concerns(advisory, {"jinja2": "3.1.6", "numpy": "2.4.6"})) == found
