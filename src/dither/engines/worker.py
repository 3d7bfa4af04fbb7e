"""llama.cpp in a process of its own: what `engines/processes.py` starts.

Loading a file holds Python's lock for as long as it takes, a request that trips an assertion ends the
process, and memory that was freed need not go back to the system.  In a child none of that reaches the
server or the other models.

Protocol: the settings come as one line of JSON on stdin; one line of JSON on stdout says where llama.cpp
listens and its key, or why it does not.  The child lives until stdin closes, so never longer than its
parent, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from dither.errors import DitherError


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    from dither.engines.llamacpp import LlamaCpp

    try:
        engine = LlamaCpp(settings.pop("path"), **settings)
    except DitherError as error:
        print(json.dumps({"error": error.to_json()}), flush=True)
        return
    said = {"address": engine.address, "key": engine.key, "context": engine.context}
    print(json.dumps({**said, "takes_tools": "tools" in engine.chat_template}), flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # the system takes everything back; llama.cpp would first finish what it is at


if __name__ == "__main__":
    main()
