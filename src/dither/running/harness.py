"""Runs lm-evaluation-harness on our engines: without a server or a copy of the model in another format.

The harness (`pip install 'dither[tasks]'`) has hundreds of benchmarks, made of three kinds of requests: how likely is
this answer, how likely is this whole text, and generate.  The first two go through the network block by block
(`running.likelihood`), the third through llama.cpp.  llama.cpp tokenizes the text, as it does when the file is used.

Source: EleutherAI's lm-evaluation-harness, docs/interface.md and docs/model_guide.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dither.engines.llamacpp import LlamaCpp
from dither.engines.vocabulary import Vocabulary
from dither.errors import SourceError, UnsupportedError, UsageError
from dither.measuring.cutting import with_bos
from dither.running.likelihood import Likelihood
from dither.types import Model

WRITTEN = 256  # tokens, if a task sets no limit
_SAMPLES_LEFT_OUT = ("doc", "arguments", "resps", "filtered_resps", "target")


class Answers:
    """Answers the three kinds of requests by one model; to be closed."""

    def __init__(self, model: Model, likelihood: Likelihood, context: int) -> None:
        self.model, self.context = model, context
        self._likelihood = likelihood
        self._vocabulary = Vocabulary(model)
        self._engine: LlamaCpp | None = None
        begin = self._vocabulary.bos
        self.end = int(model.value("tokenizer.ggml.eos_token_id", begin or 0))
        self.begin = self.end if begin is None else begin

    def tokens(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids, with the begin token in front if the model wants one and the text does not have it."""
        ids = self._vocabulary.tokenize(text, parse_special=True)
        return ids if special is False else with_bos(ids, self._vocabulary.bos)

    def likely(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers; the beginning of a question that is too long for the context is dropped."""
        size = self.context
        return self._likelihood.score(
            [(question[-max(1, size + 1 - len(answer)) :], answer[-size:]) for question, answer in pairs]
        )

    def write(self, text: str, options: Mapping[str, Any]) -> str:
        """The model's continuation of `text`, up to one of `until`; greedy unless sampling is asked for.

        Raises UnsupportedError for a model that llama.cpp does not load.
        """
        limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or WRITTEN)
        limit = min(limit, self.context - 1)
        until = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        sampled = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
        reply = self._llamacpp().generate(
            self.tokens(text)[-(self.context - limit) :],
            max_tokens=limit,
            stop=[stop for stop in stops if stop],
            reuse=True,
            temperature=float(options["temperature"]) if sampled else 0.0,
            seed=0,
        )
        return "".join(reply)

    def template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._vocabulary.apply_template(messages)

    def _llamacpp(self) -> LlamaCpp:
        if self._engine is None:
            if self.model.kind != "gguf":
                way_out = "Make a GGUF of the original for it: `dither quantize MODEL --to BF16`."
                reason = "is a folder; tasks that let the model write need llama.cpp, which reads GGUFs"
                raise UnsupportedError(self.model.origin, reason, way_out)
            self._engine = LlamaCpp(self.model.files[0], context=self.context, gpu_layers=-1)
        return self._engine

    def close(self) -> None:
        self._vocabulary.close()
        if self._engine is not None:
            self._engine.close()


def adapter(answers: Answers) -> Any:
    """`answers` as the harness's own kind of model."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc, unused-ignore]
        tokenizer_name = "dither"
        eot_token_id, prefix_token_id = answers.end, answers.begin
        max_length, max_gen_toks = answers.context, WRITTEN

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return answers.tokens(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return answers.likely([(question, answer) for _, question, answer in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            # A text longer than the context is scored in windows, whose log-likelihoods add up.
            size = {"prefix_token": answers.begin, "max_seq_len": answers.context, "context_len": 1}
            texts = [answers.tokens(request.args[0], False) for request in requests]
            rolled = [utils.get_rolling_token_windows(token_list=text, **size) for text in texts]
            windows = [list(map(utils.make_disjoint_window, windows)) for windows in rolled]
            scores = iter(answers.likely(list(chain.from_iterable(windows))))
            return [sum((log for log, _ in islice(scores, len(own))), 0.0) for own in windows]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [answers.write(request.args[0], request.args[1]) for request in requests]

        def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], **_: Any) -> str:
            return answers.template(chat_history)

    return Adapter()


def evaluate(
    answers: Answers, tasks: Sequence[str], *, data: Path | None, limit: int | None, fewshot: int | None, chat: bool
) -> dict[str, Any]:
    """The harness's `results`, and its `samples` without the questions' texts.

    Raises UsageError if the harness is missing or has no such task, SourceError if a task's data cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        reason = f"needs lm-evaluation-harness ({error})"
        raise UsageError("dither tasks", reason, "pip install 'dither[tasks]'") from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = _manager(data, tuple(tasks))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        way_out = "`lm_eval ls tasks` lists them; --data FOLDER adds a folder of task files."
        raise UsageError(f"task {unknown[0]}", "is not known", way_out)
    try:
        with _inside(data):
            found = simple_evaluate(
                model=adapter(answers),
                tasks=list(tasks),
                limit=limit,
                num_fewshot=fewshot,
                bootstrap_iters=0,
                task_manager=manager,
                log_samples=True,
                apply_chat_template=chat,
            )
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        way_out = "Offline, a task's data must be in the cache or in --data FOLDER (docs/run.md tells how)."
        raise SourceError(f"task {', '.join(tasks)}", f"cannot be run ({said})", way_out) from error
    found = found or {}
    samples = {
        task: [{k: v for k, v in sample.items() if k not in _SAMPLES_LEFT_OUT} for sample in rows]
        for task, rows in found.get("samples", {}).items()
    }
    return {"results": found.get("results", {}), "samples": samples}


@lru_cache(maxsize=1)
def _manager(data: Path | None, tasks: tuple[str, ...]) -> Any:
    """The tasks that can be run.  The harness's own are thousands of files, which are not read if the folder has all
    the tasks asked for."""
    from lm_eval.tasks import TaskManager

    if data is not None:
        own = TaskManager(include_path=str(data), include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    return TaskManager(include_path=str(data) if data else None)


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Works in a task file's folder, because the paths of its data are relative to it, and keeps the harness from
    describing the whole machine for a report that is not used here."""
    from lm_eval import evaluator

    before, describe = Path.cwd(), getattr(evaluator, "add_env_info", None)
    os.chdir(folder or before)
    evaluator.add_env_info = lambda _: None
    try:
        yield
    finally:
        evaluator.add_env_info = describe
        os.chdir(before)
