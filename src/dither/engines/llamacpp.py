"""llama.cpp in this process: load a GGUF, ask it for probabilities, let it write text.

The `xllamacpp` wheel holds a compiled llama.cpp with its HTTP server.  We start that server on a
free port of the loopback interface and speak llama.cpp's own protocol to it (`tools/server/README.md`
in llama.cpp), for three reasons: every endpoint is there (`/tokenize`, `/apply-template`,
`/completion`), hanging up stops a running answer, and a waiting Python thread stays interruptible by
Ctrl-C, which a call into C is not.  A random key keeps other programs on the machine out.

Full-vocabulary probabilities are `n_probs` = vocabulary size with no sampler in the way: llama.cpp
then reports log-softmax of the raw logits.  It costs about 95 bytes of JSON per token of vocabulary.

Legend: V the vocabulary.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlsplit

import numpy as np

from dither.engines.llama_start import EngineError as EngineError, start
from dither.engines.settings import Settings, SettingsKeywords
from dither.errors import UsageError
from dither.formats.gguf import read_header
from dither.system.cores import usable_cores
from dither.system.keywords import refuse_unknown
from dither.types import Floats

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Drawing(TypedDict, total=False):
    """How a token is drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


_DRAWING = Drawing(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)  # llama.cpp's own


class Generation(Iterator[str]):
    """Pieces of text as they are written; afterwards, how it went.

    `tokens` counts what was generated, `prompt_tokens` what was read before; `tokens_per_second`
    covers generation alone.  `stopped_by` is "" while running, then "end" (the model ended its
    answer), "stop" (one of the caller's strings) or "limit" (`max_tokens` or the context is used
    up).  `close()` stops early; so does dropping the object.
    """

    def __init__(self, events: Generator[Mapping[str, Any], None, None]) -> None:
        self.prompt_tokens = 0
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.stopped_by = ""
        self.timings: Mapping[str, float] = {}  # llama.cpp's own, once it is done: prompt_ms, predicted_ms, …
        self._events = events
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()
        self._events.close()

    def _read(self) -> Generator[str, None, None]:
        for event in self._events:
            self.tokens = event.get("tokens_predicted", self.tokens)
            self.prompt_tokens = event.get("tokens_evaluated", self.prompt_tokens)
            if event.get("content"):
                yield event["content"]
            if event.get("stop"):
                self.timings = event["timings"]
                self.tokens_per_second = float(self.timings.get("predicted_per_second") or 0.0)
                self.stopped_by = {"eos": "end", "word": "stop"}.get(event["stop_type"], "limit")


class LlamaCpp:
    """A GGUF loaded by llama.cpp.  A context manager; `close` gives the memory back.

    The keywords are those of `Settings`.  `address` (host:port) is where llama.cpp's own server listens on the loopback
    interface, `key` what it wants as a bearer token.  Raises EngineError with llama.cpp's own reason when it cannot
    load the file.
    """

    def __init__(self, path: str | Path, **settings: Unpack[SettingsKeywords]) -> None:
        asked = Settings(**settings)
        least = ((asked.context, 0), (asked.threads, 1), (asked.slots, 1))
        if any(number is not None and number < lowest for number, lowest in least):
            raise UsageError(
                f"context {asked.context}, threads {asked.threads}, slots {asked.slots}",
                "none may be negative; a thread and a slot are needed",
                "Leave them out to get the defaults.",
            )
        self.path = Path(path)
        self.seed = asked.seed
        if self.path.is_dir():
            raise EngineError(str(path), "is a folder", "Make a GGUF of it with `dither quantize`.")
        if not self.path.is_file():
            raise EngineError(str(path), "there is no such file", "Give the path of a .gguf file.")
        self.key = secrets.token_urlsafe(24)
        self._server: Any = start(self.path, replace(asked, threads=asked.threads or usable_cores()), self.key)
        self.address: str = urlsplit(self._server.listening_address).netloc
        # Answered by the serving loop itself: a server that is destroyed before its loop runs waits forever.
        self._call("/slots")
        properties = self._call("/props")
        described = self._call("/v1/models")["data"][0]["meta"]
        self.vocabulary_size: int = int(described["n_vocab"])
        self.context: int = int(properties["default_generation_settings"]["n_ctx"])

    @property
    def has_chat_template(self) -> bool:
        """Whether the file itself carries one: llama.cpp silently assumes ChatML where it does not."""
        return bool(self.chat_template)

    @cached_property
    def chat_template(self) -> str:
        """The file's own template, as it was written; "" where it has none."""
        field = read_header(self.path).metadata.get("tokenizer.chat_template")
        return field.value if field is not None and isinstance(field.value, str) else ""

    @cached_property
    def bos(self) -> int | None:
        """The token put before every text, or None where this tokenizer puts none."""
        plain, special = (self.tokenize("a", add_special=add) for add in (False, True))
        return special[0] if len(special) > len(plain) and special[0] != plain[0] else None

    @cached_property
    def _letter(self) -> int:
        return self.tokenize("a")[-1]

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids; `add_special` puts the model's own begin/end tokens around, `parse_special`
        reads markers such as `<|im_start|>` in the text as the tokens they name."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._call("/tokenize", body)["tokens"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._call("/detokenize", {"tokens": list(map(int, tokens))})["content"])

    def next_token_probabilities(self, prompt: Sequence[int] | str) -> Floats:
        """The model's distribution over the token after `prompt`: float32 (V,), sums to 1.

        Softmax of the raw logits at temperature 1, no sampler in between, computed afresh without a
        cached prefix so that equal prompts give equal numbers.  Text is tokenized with the model's
        begin token.  Raises EngineError where llama.cpp computed something that is not a number.
        """
        body = self._completion(prompt, max_tokens=1, cache=False)
        # One token must be drawn, and llama.cpp reports nothing for a token that ends the text or
        # only begins a character; a bias picks a letter and leaves the reported numbers alone.
        body |= {"n_probs": self.vocabulary_size, "logit_bias": [[self._letter, 1000.0]], "samplers": []}
        entries = self._call("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        log_V = np.full(self.vocabulary_size, -np.inf, dtype=np.float64)
        for entry in entries:
            if entry["logprob"] is None:
                raise EngineError(
                    str(self.path),
                    "llama.cpp computed probabilities that are not numbers",
                    "The weights hold NaN or are too large for its arithmetic; quantize the model again.",
                )
            log_V[entry["id"]] = entry["logprob"]
        exponential_V = np.exp(log_V)
        probability_V: Floats = (exponential_V / exponential_V.sum()).astype(np.float32)
        return probability_V  # normalized again: llama.cpp's own sum is a float32's

    def generate(
        self,
        prompt: Sequence[int] | str,
        *,
        max_tokens: int | None = 256,
        seed: int | None = None,
        stop: Sequence[str] = (),
        reuse: bool = False,
        ignore_end: bool = False,
        **drawing: Unpack[Drawing],
    ) -> Generation:
        """Continue `prompt`, piece by piece; a piece never ends inside a character.

        How a token is drawn defaults to llama.cpp's own; temperature 0 always takes the likeliest.
        `max_tokens` None runs until the model ends or its context is full.  The same seed on the
        same machine gives the same text, unless `reuse` continues from what the last prompt left in
        the cache: faster, and different in the last digits.  `ignore_end` forbids the tokens that end a
        text, so that the answer is `max_tokens` long.
        """
        refuse_unknown("generate", drawing, _DRAWING)
        body = self._completion(prompt, max_tokens=max_tokens, cache=reuse) | {**_DRAWING, **drawing}
        body |= {"seed": self.seed if seed is None else seed, "stop": list(stop), "stream": True}
        body |= {"ignore_eos": True} if ignore_end else {}
        return Generation(self._stream("/completion", body))

    def chat(self, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Generation:
        """The answer to `messages` ({"role", "content"} each), in the file's own chat template.

        Takes the keywords of `generate`; earlier turns are reused from the cache.  Raises
        EngineError when the file carries no template, and with llama.cpp's own reason when the
        template refuses the messages.
        """
        return self.generate(self.apply_template(messages), **{"reuse": True} | sampling)

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that the file's chat template makes of `messages`, up to the answer's start."""
        if not self.has_chat_template:
            raise EngineError(
                str(self.path),
                "the file carries no chat template",
                "It is a base model: let it continue a text with `generate`.",
            )
        return str(self._call("/apply-template", {"messages": list(map(dict, messages))})["prompt"])

    def close(self) -> None:
        """Stop the server and free the weights.  May be called twice."""
        self._server = None  # the wheel's destructor joins its threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _completion(self, prompt: Sequence[int] | str, max_tokens: int | None, cache: bool) -> dict[str, Any]:
        tokens = self.tokenize(prompt, add_special=True) if isinstance(prompt, str) else list(map(int, prompt))
        if not tokens:
            raise UsageError("the prompt", "is empty", "Give the model at least one token to continue.")
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary_size]
        if wrong:
            raise UsageError(
                f"token {wrong[0]}",
                f"is outside the vocabulary of {self.vocabulary_size}",
                "Tokenize with this very file.",
            )
        return {"prompt": tokens, "n_predict": -1 if max_tokens is None else max_tokens, "cache_prompt": cache}

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._request(path, body) as response:
            return json.loads(response.read())

    def _stream(self, path: str, body: Mapping[str, Any]) -> Generator[Mapping[str, Any], None, None]:
        with self._request(path, body) as response:
            for line in response:
                kind, _, value = line.partition(b": ")
                if kind not in (b"data", b"error") or value.strip() == b"[DONE]":
                    continue
                event = json.loads(value)
                if kind == b"error" or "error" in event:
                    raise self._refused(event.get("error", event))
                yield event

    @contextlib.contextmanager
    def _request(self, path: str, body: Mapping[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        if self._server is None:
            raise EngineError(str(self.path), "the engine is closed", "Open the file again.")
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        method, payload = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        try:
            with contextlib.closing(http.client.HTTPConnection(self.address)) as connection:
                connection.request(method, path, payload, headers)
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise self._refused(json.loads(response.read()).get("error", {}))
                    yield response
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                str(self.path),
                f"llama.cpp's server broke off ({error or type(error).__name__})",
                "Open the file again; a smaller context needs less memory.",
            ) from error

    def _refused(self, error: Mapping[str, Any]) -> EngineError:
        way_out = ""
        if error.get("type") == "exceed_context_size_error":
            way_out = f"Give a larger context than {self.context}, or a shorter prompt."
        return EngineError(str(self.path), f"llama.cpp says: {error.get('message', error)}", way_out)
