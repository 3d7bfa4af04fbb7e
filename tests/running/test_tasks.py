"""The harness through our adapter, against transformers and float64 on the bundled model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dither
from conftest import BUNDLED
from dither.cli import app
from dither.errors import SourceError, UnsupportedError, UsageError
from dither.models.source import open_model
from dither.running.likelihood import Likelihood

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = [
    ("The sun rises in the", [" east", " door"], 0), ("He opened the", [" door and went in", " seven"], 0),
    ("Once upon a", [" time", " the"], 0), ("She was very", [" kindly of", " happy"], 1),
    ("The king of", [" England", " very"], 0), ("It was a dark and stormy", [" night", " of"], 0),
]  # fmt: skip


class Reference:
    """transformers' own tokenizer and network, log-softmax in float64."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
        self.network = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def logs(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """log p (T, V) of what follows each position."""
        with torch.no_grad():
            logits = self.network(torch.tensor([ids])).logits[0].double().numpy()
        logits -= logits.max(axis=1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

    def likely(self, question: list[int], answer: list[int]) -> tuple[float, bool]:
        log_TV = self.logs(question + answer)[len(question) - 1 : -1]
        total = sum(float(row[token]) for row, token in zip(log_TV, answer, strict=True))
        return total, all(int(row.argmax()) == token for row, token in zip(log_TV, answer, strict=True))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.slow
def test_answers_are_as_likely_as_transformers_finds_them(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dither.running import likelihood

    pairs = [
        (reference.tokens(question), reference.tokens(question + answer)[len(reference.tokens(question)) :])
        for question, answers, _ in QUESTIONS
        for answer in answers
    ]
    expected = [reference.likely(*pair) for pair in pairs]
    model = open_model(BUNDLED)
    for keep, batch, wave in ((2**33, likelihood.BATCH, likelihood.WAVE), (0, 16, 4 * 256 * 40)):
        monkeypatch.setattr(likelihood, "BATCH", batch)
        monkeypatch.setattr(likelihood, "WAVE", wave)  # few at a time: several walks, several batches
        found = Likelihood(model, keep=keep).score([*pairs, pairs[0]])  # one of them twice
        assert [log for log, _ in found] == pytest.approx([*(e[0] for e in expected), expected[0][0]], abs=2e-4)
        assert [hit for _, hit in found[:-1]] == [e[1] for e in expected]


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="empty question or answer"):
        Likelihood(open_model(BUNDLED)).score([([1], [])])


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness's own imports
        yield pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'dither[tasks]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of our own, and the bundled model as GGUFs."""
    folder = tmp_path_factory.mktemp("tasks")
    # the harness puts a space between question and answer
    rows = [{"question": q, "choices": [x.strip() for x in c], "answer": a} for q, c, a in QUESTIONS]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: own.jsonl\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: own_choice\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "write.yaml").write_text(
        f"task: own_write\n{shared}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 6\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    for kind in ("F32", "Q2_K"):
        dither.quantize(BUNDLED, kind, folder / f"{kind}.gguf")
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


pytest_ignore = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest_ignore
def test_a_task_of_ones_own_scores_as_the_definition_has_it(harness: Any, folder: Path, reference: Reference) -> None:
    here = Path.cwd()
    found = dither.tasks(folder / "F32.gguf", ["own_choice"], data=folder, against=BUNDLED)
    assert Path.cwd() == here
    right = []
    for question, answers, target in QUESTIONS:
        ids = reference.tokens(question)
        logs = [reference.likely(ids, reference.tokens(question + a)[len(ids) :])[0] for a in answers]
        right.append(float(np.argmax(logs) == target))
    (score,) = found.scores
    assert (score.task, score.metric, score.questions) == ("own_choice", "acc", len(QUESTIONS))
    assert score.value == score.against == pytest.approx(np.mean(right))
    assert score.stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    assert score.difference is not None and score.difference.changed == 0  # the same weights
    document = found.to_json()
    assert document["scores"][0]["difference"] == 0.0 and json.dumps(document)


@pytest.mark.slow
@pytest_ignore
def test_the_adapter_rolls_and_writes_as_transformers_does(harness: Any, folder: Path, reference: Reference) -> None:
    from lm_eval import utils

    from dither.running.harness import Answers, adapter

    model = open_model(folder / "F32.gguf")
    text = "The old man looked at the sea and said nothing for a long time, because " * 3
    prompt = "The old man looked at the sea and"
    with closing(Answers(model, Likelihood(model, keep=2**33), context=32)) as answers:
        ours = adapter(answers)
        assert ours.tok_encode(prompt) == reference.tokens(prompt)
        (rolled,) = ours.loglikelihood_rolling([SimpleNamespace(args=(text,))])
        options = {"until": ["."], "max_gen_toks": 8}
        (written,) = ours.generate_until([SimpleNamespace(args=(prompt, options))])
        begin = answers.begin
    windows = utils.get_rolling_token_windows(
        token_list=answers_ids(reference, text), prefix_token=begin, max_seq_len=32, context_len=1
    )
    pieces = [utils.make_disjoint_window(window) for window in windows]
    assert len(pieces) > 1
    assert rolled == pytest.approx(sum(reference.likely(*piece)[0] for piece in pieces), abs=1e-3)
    ids = torch.tensor([reference.tokens(prompt)])
    greedy = reference.network.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = reference.tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
    assert written == expected.partition(".")[0]


def answers_ids(reference: Reference, text: str) -> list[int]:
    return list(reference.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.slow
@pytest_ignore
def test_the_command_tells_the_difference_and_refuses_what_it_cannot(
    harness: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--tasks", "own_choice,own_write", "--data", str(folder), "--limit", "2", "--json"]
    result = CliRunner().invoke(
        app, ["tasks", str(folder / "Q2_K.gguf"), "--against", str(folder / "F32.gguf"), *options]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {(s["task"], s["metric"], s["questions"]) for s in document["scores"]} == {
        ("own_choice", "acc", 2),
        ("own_write", "exact_match", 2),
    }
    assert all(s["difference"] == s["value"] - s["against"] for s in document["scores"])
    with pytest.raises(UnsupportedError, match="dither quantize MODEL --to BF16"):
        dither.tasks(BUNDLED, ["own_write"], data=folder, limit=1)
    from lm_eval.tasks import TaskManager

    # The harness's own thousands of files need not be read for this.
    own = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("dither.running.harness._manager", lambda *_: own)
    with pytest.raises(UsageError, match="is not known"):
        dither.tasks(folder / "F32.gguf", ["no_such_task"], data=folder)
    (folder / "own.jsonl").rename(folder / "gone.jsonl")
    with pytest.raises(SourceError, match="cannot be run"):
        dither.tasks(folder / "F32.gguf", ["own_choice"], data=folder)


def test_requests_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no task"):
        dither.tasks(BUNDLED, [])
    with pytest.raises(SourceError, match="is no folder"):
        dither.tasks(BUNDLED, ["x"], data=tmp_path / "none")
