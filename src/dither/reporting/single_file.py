"""The page as one file: style, modules, charts, data, nothing fetched.

The live page and the exported one are the same files.  Here the modules become one script, each in a function
of its own, so that names never clash; their imports become look-ups in a table.  They are written for that:
named exports at the beginning of a line, imports of `{names}` from a relative path, `import("./x.js")` for
views.

    import {a, b as c} from "./x.js";   →  const {a, b: c} = dither("x.js");
    import("./views/x.js")              →  Promise.resolve(dither("views/x.js"))
    export function f() {}              →  function f() {}   and   f: f   in what the module hands out

Everything is inlined as text that cannot end its element: in JSON and in scripts `</script`, `<script` and
`<!--` are written with \\u003c or \\x3c (HTML standard, "Restrictions for contents of script elements").  A
policy in the page lets inline scripts run and nothing else: no connection, no picture from elsewhere.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from dither.errors import OutputError
from dither.reporting.charts import names, template
from dither.system.files import cache_folder, replacing

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'none'; base-uri 'none'; form-action 'none'; object-src 'none'"
)
_IMPORT = re.compile(r'^import \{([^}]*)\} from "(\.{1,2}/[\w./-]+\.js)";$', re.MULTILINE)
_LAZY = re.compile(r'\bimport\("(\.{1,2}/[\w./-]+\.js)"\)')
_EXPORT = re.compile(r"^export (?=(?:async function|function|const|class) (\w+))", re.MULTILINE)
_LEFT_OVER = re.compile(r"^\s*(?:import\b(?!\.)|export\b)", re.MULTILINE)
_END = "\n/* whole */\n"  # of what is kept of Vega


def assemble(document: Mapping[str, Any]) -> str:
    """The page with `document` inside.  Raises OutputError where the charts' library cannot be had."""
    page = files("dither.reporting") / "page"
    html = (page / "index.html").read_text("utf-8")
    style = (page / "app.css").read_text("utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    data = "\n".join([_json("dither-document", {**document, "live": False}), _json("dither-charts", charts())])
    replaced = {
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n{head}',
        '<link rel="stylesheet" href="/static/app.css">': f"<style>\n{style}</style>",
        '<script src="/vega.js" defer></script>': "",
        '<script type="module" src="/static/js/main.js"></script>': "",
        "</body>": f"{data}\n<script>{_script(vega())}</script>\n"
        f'<script type="module">\n{_script(bundle(modules()))}</script>\n</body>',
    }
    for old, new in replaced.items():
        before, found, after = html.partition(old)
        assert found, f"index.html has no {old}"
        html = f"{before}{new}{after}"
    return html


def modules() -> dict[str, str]:
    """The page's modules by their path below js/."""
    folder = files("dither.reporting") / "page" / "js"
    entries = [("", entry) for entry in folder.iterdir()]
    entries += [("views/", entry) for entry in (folder / "views").iterdir()]
    return {f"{below}{entry.name}": entry.read_text("utf-8") for below, entry in entries if entry.name.endswith(".js")}


def charts() -> dict[str, Any]:
    """The Vega-Lite templates by name."""
    return {name: template(name) for name in names()}


def bundle(sources: Mapping[str, str], entry: str = "main.js") -> str:
    """One script of all modules; importing one that is missing throws an error that names it."""
    parts = (f"{json.dumps(name)}() {{\n{_wrapped(name, source)}\n}},\n" for name, source in sorted(sources.items()))
    return (
        f'"use strict";\nconst ditherModules = {{\n{"".join(parts)}}};\n'
        "const ditherLoaded = {};\n"
        "function dither(name) {\n"
        '  if (!Object.hasOwn(ditherModules, name)) throw new Error(name + " is not in this report");\n'
        "  return (ditherLoaded[name] ??= ditherModules[name]());\n"
        "}\n"
        f"dither({json.dumps(entry)});"
    )


def _wrapped(name: str, source: str) -> str:
    """A module as the body of a function that returns its exports."""

    def resolved(path: str) -> str:
        return json.dumps(posixpath.normpath(posixpath.join(posixpath.dirname(name), path)))

    def to_const(match: re.Match[str]) -> str:
        names = re.sub(r"(\w+)\s+as\s+(\w+)", r"\1: \2", " ".join(match[1].split()))
        return f"const {{{names}}} = dither({resolved(match[2])});"

    def to_promise(match: re.Match[str]) -> str:
        return f"new Promise((done) => done(dither({resolved(match[1])})))"

    exported = [match[1] for match in _EXPORT.finditer(source)]
    body = _LAZY.sub(to_promise, _EXPORT.sub("", _IMPORT.sub(to_const, source)))
    left = _LEFT_OVER.search(body)
    if left:
        line = body[left.start() :].strip().splitlines()[0]
        raise OutputError(f"the page's {name}", f"has a line that cannot be bundled: {line[:100]}")
    return f"{body}\nreturn {{{', '.join(exported)}}};"


def _json(identity: str, value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f'<script type="application/json" id="{identity}">{escaped(text)}</script>'


def escaped(text: str, less: str = r"\\u003c") -> str:
    """JSON that cannot end its element, nor begin what would hide its end; as data it is the same.

    >>> escaped('["</script>", "<!--", "a < b"]')
    '["\\\\u003c/script>", "\\\\u003c!--", "a < b"]'
    """
    return re.sub(r"<(?=/?script|!--)", less, text, flags=re.IGNORECASE)


def _script(text: str) -> str:
    """The same for JavaScript, whose strings and patterns are the only places where these stand."""
    return escaped(text, r"\\x3c")


def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script that defines `vegaEmbed`.  Bundled by vl-convert from the sources
    inside it, which takes seconds, and kept in the user's cache. Raises OutputError where vl-convert is missing."""
    kept = library_path()
    with suppress(OSError, ValueError):
        text = kept.read_text("utf-8")
        if text.endswith(_END):  # else cut short
            return text
    import vl_convert

    made = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")) + _END
    with suppress(OSError, OutputError):  # made again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept, sync=False) as file:
            file.write(made.encode())
    return made


def library_path() -> Path:
    """Where it is kept, by vl-convert's version.  Raises OutputError where vl-convert is missing."""
    try:
        version = metadata.version("vl-convert-python")
    except metadata.PackageNotFoundError:
        raise OutputError("the charts", "need vl-convert", "pip install vl-convert-python") from None
    return cache_folder() / f"vega-{re.sub(r'[^0-9a-z.]', '', version)}.js"
