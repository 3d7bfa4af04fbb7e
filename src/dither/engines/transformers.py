"""A folder of safetensors run by transformers, behind the server's `Engine`.

For what llama.cpp does not read: GPTQ, AWQ, compressed-tensors, bitsandbytes, and checkpoints as they are.
One answer is written at a time, by `generate` in a thread; its text comes out through a streamer, and a
stopping criterion ends it when the client has left.  Nothing is forced into a form: JSON schemas and tools
are llama.cpp's.  What else it cannot do (`_ONLY_LLAMA`) is refused, unless it asks for nothing.

No code that a folder brings along is run (`trust_remote_code` stays off), and no pickle is read.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dither.engines.protocol import CHAT, EngineGoneError, Reply
from dither.engines.settings import Settings
from dither.errors import UnsupportedError

DEFAULT_CONTEXT = 4096  # tokens
_INSTALL = "Install it with: pip install 'dither[calibrate]'"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_COLDEST = 1e-3  # below this temperature logits divided by it may overflow, and only the likeliest is left
_LEAST_PENALTY = 0.01
# fields that this engine has nothing like, each with the value that changes nothing
_ONLY_LLAMA: dict[str, Any] = {
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "typical_p": 1,
}


@dataclass
class _Answer:
    """One answer in the making: what the thread writes and the loop reads."""

    loop: asyncio.AbstractEventLoop
    stops: list[str]
    pieces: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)  # kind, text
    cancelled: threading.Event = field(default_factory=threading.Event)
    stopped: bool = False  # at one of `stops`
    kept: str = ""  # the end of the text, which may be the start of a stop
    tokens: int = 0
    ended: bool = False  # and the loop was told how

    def tell(self, kind: str, text: str = "") -> None:
        self.ended = self.ended or kind != "text"
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, (kind, text))

    def write(self, text: str, end: bool) -> None:
        """Passes text on up to a stop, holding back what may become one."""
        if self.stopped:
            return
        self.kept += text
        found = [at for at in (self.kept.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.kept, self.stopped, end = self.kept[: min(found)], True, True
        held = 0 if end else max((_overlap(self.kept, stop) for stop in self.stops), default=0)
        ready = self.kept[: len(self.kept) - held]
        self.kept = self.kept[len(ready) :]
        if ready:
            self.tell("text", ready)


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TransformersEngine:
    """An `Engine`.  Made by `start`."""

    slots, takes_tools, alive = 1, False, True
    takes_schemas: ClassVar = False
    takes_embeddings: ClassVar = False

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self._model, self._tokenizer, self.context = model, tokenizer, context
        self._one_at_a_time = asyncio.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    async def start(cls, path: str | Path, settings: Settings) -> TransformersEngine:
        """Raises UnsupportedError where the packages for it are missing, or transformers refuses it."""
        model, tokenizer = await asyncio.to_thread(_load, str(path), settings.threads)
        return cls(model, tokenizer, settings.context or DEFAULT_CONTEXT)

    async def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        if self._model is None:  # unloaded while this request waited for its turn
            raise EngineGoneError("the model was put away")
        for name, nothing in _ONLY_LLAMA.items():
            if body.get(name, nothing) != nothing:
                return _refusal("not_supported_error", f"{name} is llama.cpp's: this is a folder")
        try:  # in a thread: a long text takes its time, and others are answered meanwhile
            tokens = await asyncio.to_thread(self.tokens, path, body)
        except template_faults() as error:
            return _refusal("invalid_request_error", f"the chat template refuses this: {error}")
        known = int(self._model.get_input_embeddings().weight.shape[0])
        if (wrong := next((token for token in tokens if token >= known), None)) is not None:
            return _refusal("invalid_request_error", f"token {wrong} is outside the vocabulary of {known}")
        if len(tokens) >= self.context:
            sizes = {"n_ctx": self.context, "n_prompt_tokens": len(tokens)}
            return _refusal("exceed_context_size_error", "too long", **sizes)
        most = min(int(body.get("max_tokens", self.context)), self.context - len(tokens))
        return Reply(200, self._events(path, body, tokens, most))

    def tokens(self, path: str, body: Mapping[str, Any]) -> list[int]:
        if path != CHAT:
            prompt = body["prompt"]
            return list(prompt) if isinstance(prompt, list) else list(self._tokenizer(prompt)["input_ids"])
        messages = [{**message, "content": _text(message.get("content"))} for message in body["messages"]]
        if self._tokenizer.chat_template is None:
            text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            return list(self._tokenizer(f"{text}<|im_start|>assistant\n")["input_ids"])
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **body.get("chat_template_kwargs", {})
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _events(
        self, path: str, body: Mapping[str, Any], tokens: list[int], most: int
    ) -> AsyncGenerator[bytes, None]:
        """OpenAI's chunks, the usage where it was asked for, [DONE]."""
        chunk = _Chunks(path, str(body.get("model", "")))
        async with self._one_at_a_time:
            answer = _Answer(asyncio.get_running_loop(), list(body.get("stop", ())))
            work = partial(self._write, answer, body, tokens, most)
            self._thread = thread = threading.Thread(target=work, name="dither-generate", daemon=True)
            thread.start()
            try:
                yield chunk.choice("", role=True)
                kind, text = await answer.pieces.get()
                while kind == "text":
                    yield chunk.choice(text)
                    kind, text = await answer.pieces.get()
                if kind == "failed":
                    self.alive = False  # whatever state it is in, the next request gets a new one
                    raise EngineGoneError(text)
                full = answer.tokens >= most and not answer.stopped
                yield chunk.choice(None, "length" if full and kind == "limit" else "stop")
                if body.get("stream_options", {}).get("include_usage"):
                    yield chunk.usage(len(tokens), answer.tokens)
                yield b"data: [DONE]\n\n"
            finally:
                answer.cancelled.set()
                await asyncio.shield(asyncio.to_thread(thread.join))

    def _write(self, answer: _Answer, body: Mapping[str, Any], tokens: list[int], most: int) -> None:
        """Runs in a thread of its own."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        try:
            if body.get("seed") is not None:
                torch.manual_seed(int(body["seed"]))
            ids = torch.tensor([tokens], device=self._model.device)

            class Into(TextStreamer):
                """Hands text on once it is certain to be whole characters."""

                def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                    answer.write(text, stream_end)

            def ended(_ids: Any, _scores: Any, **_: Any) -> Any:
                over = answer.stopped or answer.cancelled.is_set()
                return torch.full((1,), over, dtype=torch.bool, device=ids.device)

            made = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                streamer=Into(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList([ended]),
                **_sampling(body),
            )
            answer.tokens = int(made.shape[1]) - len(tokens)
            ends = self._model.generation_config.eos_token_id
            ended_itself = int(made[0, -1]) in (ends if isinstance(ends, list) else [ends])
            answer.tell("end" if ended_itself or answer.stopped else "limit")
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:  # torch's, out of memory above all
            answer.tell("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        finally:  # a kernel's own assertion, say: whoever waits must hear of it
            if not answer.ended:
                answer.tell("failed", "transformers raised what nobody expected; the server's log has it")

    async def metrics(self) -> str:
        return ""

    async def close(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 60)
        self._model = self._tokenizer = None
        self.alive = False
        gc.collect()


def template_faults() -> tuple[type[Exception], ...]:
    """What a chat template, a program by strangers, may end with."""
    from jinja2.exceptions import TemplateError

    written = (SyntaxError, RecursionError, MemoryError)  # nested beyond what Python compiles, or a text without end
    return (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, *written)


def _load(path: str, threads: int | None) -> tuple[Any, Any]:
    model, _ = _model(path, threads)
    from transformers import AutoTokenizer

    with _refusals(path):
        return model, AutoTokenizer.from_pretrained(path, **_LOCAL)


def _model(path: str, threads: int | None) -> tuple[Any, Mapping[str, Any]]:
    """A folder's model, and what transformers says of the tensors it found."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as their_logging
    except ImportError as error:
        raise UnsupportedError("transformers", f"cannot be imported ({error})", _INSTALL) from None
    if threads:
        torch.set_num_threads(threads)
    their_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # bitsandbytes has a word to say at every layer of every token
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with _refusals(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, dtype="auto", output_loading_info=True, **_LOCAL
        )
    model, info = loaded
    if torch.cuda.is_available() and model.device.type == "cpu":
        model = model.to("cuda")
    return model.eval(), info


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Raises UnsupportedError where transformers refuses a folder."""
    try:
        yield
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UnsupportedError(
            path,
            f"transformers cannot load it: {_first_line(error)}",
            "GPTQ and AWQ need dither[gptq], compressed-tensors dither[compressed], NF4 dither[bnb].",
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_once(path: str, threads: int) -> int:
    """The token that the model of a folder finds likeliest behind the first of its vocabulary.

    Raises UnsupportedError where transformers does not load the folder, loads it but for some tensors, or finds scores
    that are no numbers.
    """
    model, info = _model(path, threads)
    for key, said in (
        ("missing_keys", "misses"),
        ("unexpected_keys", "has no place for"),
        ("mismatched_keys", "misfits"),
    ):
        if info[key]:
            first = sorted(map(str, info[key]))[0]
            raise UnsupportedError(path, f"transformers {said} {len(info[key])} tensors, {first} among them")
    import torch

    try:
        with torch.no_grad():
            logits_V = model(torch.tensor([[0]], device=model.device)).logits[0, -1].float()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedError(path, f"it loads, and does not compute: {_first_line(error)}") from None
    if not bool(torch.isfinite(logits_V).all()):
        raise UnsupportedError(path, "its scores of the next token are no numbers")
    return int(logits_V.argmax())


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's words as transformers'; its defaults, temperature 1 over everything, where none is said."""
    temperature = float(body.get("temperature", 1.0))
    made: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature >= _COLDEST:
        made = {"do_sample": True, "temperature": temperature, "top_p": float(body.get("top_p", 1.0)) or 1e-6}
        made["top_k"] = int(body.get("top_k", 0))
        if body.get("min_p"):
            made["min_p"] = float(body["min_p"])
    if body.get("repeat_penalty"):
        made["repetition_penalty"] = max(float(body["repeat_penalty"]), _LEAST_PENALTY)
    return made


def _text(content: Any) -> str:
    """Templates for transformers take texts; parts are laid under each other, as llama.cpp does it."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _refusal(kind: str, message: str, **more: int) -> Reply:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield json.dumps({"error": {"type": kind, "message": message, **more}}).encode()

    return Reply(400, pieces())


class _Chunks:
    """OpenAI's chunk objects for one answer, as events."""

    def __init__(self, path: str, model: str) -> None:
        self._chat = path == CHAT
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + json.dumps({**self._head, "choices": choices, **more}).encode() + b"\n\n"

    def choice(self, text: str | None, finish: str | None = None, role: bool = False) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if self._chat:
            delta: dict[str, Any] = {"role": "assistant"} if role else {}
            choice["delta"] = delta | ({} if text is None else {"content": text})
        else:
            choice["text"] = text or ""
        return self._event([choice])

    def usage(self, prompt: int, written: int) -> bytes:
        counts = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return self._event([], usage=counts)
