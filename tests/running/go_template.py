"""Go's own text/template, where `go` is installed: the reference for what Ollama makes of a template.

One program renders many templates, because starting the compiler takes most of the time.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Job struct {
	Template, System, Prompt string
	Messages                 []*Message
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, job := range jobs {
		var b strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
		if err := t.Execute(&b, job); err != nil {
			panic(err)
		}
		texts = append(texts, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def render(folder: Path, jobs: Sequence[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """Each (template, messages) as Ollama fills it in: the system texts joined, every message listed."""
    (folder / "main.go").write_text(PROGRAM)
    documents: list[dict[str, Any]] = [
        {
            "Template": template,
            "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
            "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        }
        for template, messages in jobs
    ]
    done = subprocess.run(
        ["go", "run", str(folder / "main.go")],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts: list[str] = json.loads(done.stdout)
    return texts
