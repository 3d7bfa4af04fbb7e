"""llama.cpp against a textbook float64 forward pass of the same weights, and against what a model of
known successors must say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from llama_util import BOS, CHATML, EOS, IM_END, IM_START, SPECIAL, TinyLlama, byte_letters, vocabulary

from dither.engines.llamacpp import EngineError, LlamaCpp
from dither.errors import UsageError
from dither.system.cores import available_cores, usable_cores

SAYS = "é日 €!"  # two-, three- and one-byte characters: every token is one byte


@pytest.fixture(scope="module")
def model() -> TinyLlama:
    return TinyLlama()


@pytest.fixture(scope="module")
def engine(model: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    path = model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with LlamaCpp(path, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    """Answers SAYS to any ChatML prompt, which ends in a newline."""
    newline = len(SPECIAL) + ord("\n")
    model = TinyLlama(chat_template=CHATML).parrot(newline, SAYS, end=IM_END)
    with LlamaCpp(model.write(tmp_path_factory.mktemp("parrot") / "parrot.gguf"), threads=1) as engine:
        yield engine


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_probabilities_equal_a_float64_forward_pass(model: TinyLlama, engine: LlamaCpp, length: int) -> None:
    tokens = np.random.default_rng(length).integers(len(SPECIAL), len(vocabulary()), length).tolist()
    measured, expected = engine.next_token_probabilities(tokens), model.probabilities(tokens)
    assert measured.dtype == np.float32 and measured.shape == (engine.vocabulary_size,)
    np.testing.assert_allclose(measured.sum(dtype=np.float64), 1, atol=1e-6)
    # llama.cpp keeps keys and values in float16
    np.testing.assert_allclose(measured, expected, rtol=0.02, atol=1e-6)
    assert measured.argmax() == expected.argmax()
    assert np.abs(measured - expected).sum() < 4e-3


def test_probabilities_do_not_depend_on_what_ran_before(engine: LlamaCpp) -> None:
    tokens = list(range(50, 80))
    first = engine.next_token_probabilities(tokens)
    "".join(engine.generate(tokens[:20], max_tokens=5, seed=3))
    np.testing.assert_array_equal(engine.next_token_probabilities(tokens), first)


def test_text_prompts_are_tokenized_with_the_begin_token(engine: LlamaCpp) -> None:
    expected = engine.next_token_probabilities([BOS, *engine.tokenize("and the")])
    np.testing.assert_array_equal(engine.next_token_probabilities("and the"), expected)


def test_tokenize_applies_the_merges_and_reads_markers_only_when_asked(engine: LlamaCpp) -> None:
    words = vocabulary()
    assert [words[token] for token in engine.tokenize("and the é")] == ["and", "Ġthe", "Ġ", *"Ã©"]
    marked = engine.tokenize("<|im_start|>x", add_special=True)
    assert marked == [BOS, IM_START, words.index("x")]
    plain = engine.tokenize("<|im_start|>", parse_special=False)
    assert IM_START not in plain and engine.detokenize(plain) == "<|im_start|>"


def test_detokenize_gives_every_byte_back(engine: LlamaCpp) -> None:
    text = "Grüße, 世界 👋 and the\n\tend"
    assert engine.detokenize(engine.tokenize(text)) == text
    assert engine.detokenize([len(SPECIAL) + 0xE2]) == "\ufffd"


def test_pieces_never_end_inside_a_character(parrot: LlamaCpp) -> None:
    answer = parrot.chat([{"role": "user", "content": "hello"}], temperature=0)
    assert list(answer) == list(SAYS)
    assert answer.stopped_by == "end"
    assert answer.tokens == len(SAYS.encode()) + 1  # and the end token
    assert answer.tokens_per_second > 0


def test_chat_uses_the_template_of_the_file(parrot: LlamaCpp) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "and?"}]
    prompt = parrot.apply_template(messages)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = parrot.chat(messages, temperature=0)
    assert "".join(answer) == SAYS
    assert answer.prompt_tokens == len(parrot.tokenize(prompt, add_special=True))
    assert parrot.has_chat_template


def test_a_base_model_has_no_chat(engine: LlamaCpp) -> None:
    assert not engine.has_chat_template
    with pytest.raises(EngineError, match=r"carries no chat template.*generate"):
        engine.chat([{"role": "user", "content": "hello"}])


def test_generate_stops_at_a_string_and_at_the_limit(parrot: LlamaCpp) -> None:
    stopped = parrot.generate("\n", temperature=0, stop=["€"])
    assert "".join(stopped) == "é日 " and stopped.stopped_by == "stop"
    limited = parrot.generate("\n", temperature=0, max_tokens=5)
    assert "".join(limited) == "é日" and limited.stopped_by == "limit" and limited.tokens == 5


def test_a_character_cut_by_the_limit_is_not_half_written(parrot: LlamaCpp) -> None:
    text = "".join(parrot.generate("\n", temperature=0, max_tokens=3))  # é and one byte of three
    assert text.startswith("é") and set(text[1:]) <= {"\ufffd"}


def test_the_seed_decides_the_sample(engine: LlamaCpp) -> None:
    def sample(seed: int) -> str:
        return "".join(engine.generate("the", max_tokens=12, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_samples_follow_the_probabilities(engine: LlamaCpp) -> None:
    """400 one-token samples without truncation: chi-square against the reported distribution."""
    tokens = [BOS, *engine.tokenize("and the")]
    expected = engine.next_token_probabilities(tokens) * 400
    drawn = np.zeros_like(expected)
    for seed in range(400):
        body = engine._completion(tokens, max_tokens=1, cache=True)
        body |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed, "return_tokens": True}
        drawn[engine._call("/completion", body)["tokens"][0]] += 1
    common = expected >= 5
    observed = np.append(drawn[common], drawn[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_closing_an_answer_early_frees_the_engine(engine: LlamaCpp) -> None:
    running = engine.generate("the", max_tokens=100, temperature=1.0)
    next(running)
    running.close()
    assert list(running) == []
    assert engine.next_token_probabilities("the").sum() == pytest.approx(1, abs=1e-5)


def test_a_prompt_longer_than_the_context_names_both(engine: LlamaCpp) -> None:
    with pytest.raises(EngineError, match=r"129 tokens.*128 tokens.*larger context than 128"):
        engine.next_token_probabilities([BOS] * 129)


@pytest.mark.parametrize("prompt", [[], [266], [-1]])
def test_impossible_prompts_are_usage_errors(engine: LlamaCpp, prompt: list[int]) -> None:
    with pytest.raises(UsageError):
        engine.next_token_probabilities(prompt)


def test_weights_that_overflow_are_not_reported_as_probabilities(tmp_path: Path) -> None:
    model = TinyLlama()
    model.weights["output.weight"][7] = np.nan
    path = model.write(tmp_path / "nan.gguf")
    with LlamaCpp(path, threads=1) as engine, pytest.raises(EngineError, match=r"nan\.gguf.*not numbers"):
        engine.next_token_probabilities([BOS])


def test_a_truncated_file_is_refused_in_the_words_of_llama_cpp(
    engine: LlamaCpp, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = engine.path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=r"cut\.gguf: llama\.cpp cannot load it: tensor '.*' data is not within"):
        LlamaCpp(cut)
    with pytest.raises(EngineError):  # an error in an engine that is already running
        engine.next_token_probabilities([BOS] * 129)
    assert capfd.readouterr() == ("", "")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    with pytest.raises(EngineError, match=r"cannot load it: invalid magic"):
        LlamaCpp(text)


def test_nothing_is_printed_while_it_works(model: TinyLlama, tmp_path: Path) -> None:
    path = model.write(tmp_path / "quiet.gguf")
    code = (
        "import sys; from dither.engines.llamacpp import LlamaCpp\n"
        "with LlamaCpp(sys.argv[1], threads=1) as e: ''.join(e.generate('the', max_tokens=3))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    assert run.stdout == run.stderr == b""


@pytest.mark.skipif(sys.platform != "linux", reason="psutil lists mapped files on Linux alone")
def test_close_unmaps_the_file_and_ends_its_threads(model: TinyLlama, tmp_path: Path) -> None:
    path = model.write(tmp_path / "closing.gguf")
    process = psutil.Process()
    threads = process.num_threads()
    engine = LlamaCpp(path, threads=1)
    assert any(mapped.path == str(path) for mapped in process.memory_maps())
    engine.close()
    engine.close()
    assert not any(mapped.path == str(path) for mapped in process.memory_maps())
    assert process.num_threads() <= threads
    with pytest.raises(EngineError, match="closed"):
        engine.tokenize("the")


def test_other_programs_cannot_use_the_server(engine: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "key", "guess")
    with pytest.raises(EngineError, match="Invalid API Key"):
        engine.tokenize("the")


def test_a_missing_wheel_says_how_to_install_it(engine: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(EngineError, match="pip install xllamacpp"):
        LlamaCpp(engine.path)


def test_usable_cores_are_at_most_the_processors() -> None:
    assert 1 <= usable_cores() <= available_cores() <= (psutil.cpu_count() or 1)


def test_importing_the_engine_does_not_load_llama_cpp() -> None:
    code = "import dither.engines.llamacpp, sys; sys.exit('xllamacpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_letters_of_the_fixture_are_those_of_gpt2() -> None:
    assert len(set(byte_letters())) == 256 and byte_letters()[0x20] == "Ġ" and EOS == 1
