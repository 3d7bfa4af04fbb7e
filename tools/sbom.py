"""The bill of materials: what Dither is made of, as CycloneDX 1.6 JSON, from the lock and without a network.

    python tools/sbom.py [OUT]      default: dist/dither.cdx.json; the licenses go to docs/licenses.md

Each package has its version, license, purl and the hashes of the files that the lock names; `scope` tells what
running needs from what options and tests bring along.  Where `cyclonedx-python-lib[validation]` can be imported the
document is held against the format's own schema.

Source: CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/ (bomFormat, components, dependencies); the package-url
specification, type pypi.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "tools" / "dependencies.json"
LICENSES = ROOT / "docs" / "licenses.md"
# The texts that packages give instead of SPDX's identifiers.
SPDX = {
    "MIT License": "MIT", "MIT": "MIT", "Apache Software License": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0", "Apache-2.0": "Apache-2.0", "Apache": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "BSD License": "BSD-3-Clause", "BSD": "BSD-3-Clause", "BSD-3-Clause": "BSD-3-Clause",
    "3-Clause BSD": "BSD-3-Clause",
    "new BSD": "BSD-3-Clause", "BSD 3-Clause": "BSD-3-Clause", "BSD-2-Clause": "BSD-2-Clause", "PSF-2.0": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0", "PSFL": "PSF-2.0", "MPL-2.0": "MPL-2.0", "ISC": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "ISC License (ISCL)": "ISC", "Unlicense": "Unlicense",
}  # fmt: skip


def version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "src" / "dither" / "_version.py").read_text())
    assert found
    return found[1]


def licenses(text: str) -> list[dict[str, Any]]:
    if text in SPDX:
        return [{"license": {"id": SPDX[text]}}]
    if re.fullmatch(r"[\w.+()-]+( (AND|OR|WITH) [\w.+()-]+)*", text):
        return [{"expression": text}]
    return [{"license": {"name": text}}] if text else []


def purl(name: str, number: str) -> str:
    return f"pkg:pypi/{name}@{number}"


def component(package: dict[str, Any]) -> dict[str, Any]:
    made = {
        "type": "library",
        "bom-ref": purl(package["name"], package["version"]),
        "name": package["name"],
        "version": package["version"],
        "scope": "required" if package["for"] == "running" else "optional",
        "purl": purl(package["name"], package["version"]),
        "licenses": licenses(package["license"]),
        "externalReferences": [
            {
                "type": "distribution",
                "url": f"urn:file:{file['name']}",
                "comment": platform,
                "hashes": [{"alg": "SHA-256", "content": file["sha256"]}],
            }
            for platform, file in package["files"].items()
        ],
    }
    return {key: value for key, value in made.items() if value}


def bom(facts: dict[str, Any]) -> dict[str, Any]:
    """The document; the same lock gives the same bytes."""
    packages = facts["packages"]
    refs = {package["name"]: purl(package["name"], package["version"]) for package in packages}
    ours = purl("dither", version())
    digest = hashlib.sha256(json.dumps([ours, facts], sort_keys=True).encode()).digest()
    needed = {name for package in packages for name in package["requires"]}
    top = [
        refs[package["name"]] for package in packages if package["name"] not in needed or package["for"] == "running"
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": ours,
                "name": "dither",
                "version": version(),
                "purl": ours,
                "licenses": [{"license": {"id": "MIT"}}],
            },
            "tools": {"components": [{"type": "application", "name": "tools/sbom.py", "version": version()}]},
        },
        "components": [component(package) for package in packages],
        "dependencies": [
            {"ref": ours, "dependsOn": sorted(top)},
            *({"ref": refs[p["name"]], "dependsOn": [refs[name] for name in p["requires"]]} for p in packages),
        ],
    }


def faults(text: str) -> str | None:
    """What the format's own schema finds wrong; "" for nothing, None where nothing here can tell."""
    if not (find_spec("cyclonedx") and find_spec("jsonschema")):
        return None
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return str(found) if found else ""


def listed(facts: dict[str, Any]) -> str:
    """docs/licenses.md."""
    lines = [
        "# Licenses",
        "",
        "Dither is under the MIT license. What it needs for running is listed first; options and tests bring the rest.",
        "Written by `make sbom` from the lock (`tools/dependencies.json`); a license is what a package says of itself.",
    ]
    for use in ("running", "options and tests"):
        lines += ["", f"## For {use}", "", "| package | version | license |", "|---|---|---|"]
        rows = (package for package in facts["packages"] if package["for"] == use)
        lines += [f"| {p['name']} | {p['version']} | {p['license'].replace('|', '/')} |" for p in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    facts = json.loads(FACTS.read_text())
    LICENSES.write_text(listed(facts))
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "dither.cdx.json"
    text = json.dumps(bom(facts), indent=1) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    found = faults(text)
    print(f"{out}: {len(json.loads(text)['components'])} packages")
    if found is None:
        print("not validated: pip install 'cyclonedx-python-lib[validation]' for that")
    elif found:
        raise SystemExit(f"is no CycloneDX 1.6: {found}")
    else:
        print("valid CycloneDX 1.6")


if __name__ == "__main__":
    main()
