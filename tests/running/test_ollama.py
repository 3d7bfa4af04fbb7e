"""Modelfiles: what Go's own template engine makes of them is what llama.cpp makes of the Jinja text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import families
import go_template
import modelfile
import pytest
from llama_util import TinyLlama

from dither.engines.vocabulary import Vocabulary
from dither.errors import UnsupportedError
from dither.models.source import open_model
from dither.running import export as job
from dither.running.ollama import Message, describe, go_template as written, pieces_of
from dither.types import Model

pytestmark = pytest.mark.slow  # llama.cpp renders, and Go compiles

TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is “{{x}}”?"}],
    [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi,\n\nyou."},
        {"role": "user", "content": "And now?"},
    ],
    [
        {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
    ],
]  # fmt: skip
TOLD = [[{"role": "system", "content": 'Be brief; \\no "jokes".'}, *talk] for talk in TALKS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("families")
    templates = families.KNOWN | {"counting": families.COUNTING, "base": None}
    return {
        name: open_model(TinyLlama(chat_template=template).write(folder / f"{name}.gguf"))
        for name, template in templates.items()
    }


@pytest.fixture(scope="module")
def rendered(models: dict[str, Model]) -> Iterator[dict[str, Callable[[Sequence[Message]], str]]]:
    opened = {name: Vocabulary(model) for name, model in models.items() if name != "base"}
    yield {name: each.apply_template for name, each in opened.items()}
    for each in opened.values():
        each.close()


def test_go_renders_every_known_family_as_llama_cpp_does(
    rendered: dict[str, Callable[[Sequence[Message]], str]], tmp_path: Path
) -> None:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed: Ollama's template language cannot be run")
    jobs, expected = [], []
    for name in families.KNOWN:
        pieces, notes = pieces_of(rendered[name])
        assert pieces is not None, name
        for talk in TALKS + ([] if notes else TOLD):
            jobs.append((written(pieces), talk))
            expected.append((name, rendered[name](talk)))
    made = go_template.render(tmp_path, jobs)
    assert [(name, text) for (name, _), text in zip(expected, made, strict=True)] == expected


def test_a_system_text_that_a_template_refuses_goes_into_the_first_question(
    rendered: dict[str, Callable[[Sequence[Message]], str]],
) -> None:
    def refusing(messages: Sequence[Message]) -> str:
        if messages[0]["role"] == "system":
            raise UnsupportedError("the template", "refuses it")
        return rendered["gemma"](messages)

    pieces, notes = pieces_of(refusing)
    assert pieces is not None and "refuses system texts" in notes[0]
    assert pieces.render(TOLD[0]) == rendered["gemma3"](TOLD[0])


def test_a_template_that_no_pieces_make_is_left_to_ollama(models: dict[str, Model], tmp_path: Path) -> None:
    done = job.export(models["counting"].origin, "ollama", tmp_path)
    assert "of no known kind" in done.notes[0]
    told = dict(modelfile.read((tmp_path / "Modelfile").read_text()))
    assert "TEMPLATE" not in told and told["FROM"] == "./counting.gguf"


@pytest.mark.parametrize("name", [*families.KNOWN, "base"])
def test_the_modelfile_keeps_to_the_grammar(models: dict[str, Model], name: str, tmp_path: Path) -> None:
    done = job.export(models[name].origin, "ollama", tmp_path)
    found = modelfile.read((tmp_path / "Modelfile").read_text())
    told = dict(found)
    assert (
        told["FROM"] == f"./{name}.gguf"
        and (tmp_path / told["FROM"]).stat().st_ino == Path(models[name].origin).stat().st_ino
    )
    assert told["PARAMETER num_ctx"] == "128"  # what the model was trained on
    assert done.files == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    stops = {value for key, value in found if key == "PARAMETER stop"}
    if name == "base":
        assert told["TEMPLATE"] == "{{ .Prompt }}" and not stops
    else:
        assert stops == families.STOPS[name] | {"<|im_end|>"}  # and the token that ends a text


def test_what_stands_there_is_kept_or_refused(models: dict[str, Model], tmp_path: Path) -> None:
    from dither.errors import OutputError

    again = [job.export(models["base"].origin, "ollama", tmp_path, context=99).how for _ in range(2)]
    assert again == ["linked", "kept"]
    edited = (tmp_path / "Modelfile").read_text() + "PARAMETER temperature 0.3\n"  # by its owner
    (tmp_path / "Modelfile").write_text(edited)
    with pytest.raises(OutputError, match="says something else"):
        job.export(models["base"].origin, "ollama", tmp_path, context=99)
    assert (tmp_path / "Modelfile").read_text() == edited
    (tmp_path / "base.gguf").unlink()
    (tmp_path / "base.gguf").write_text("other")
    with pytest.raises(OutputError, match="another file"):
        job.export(models["base"].origin, "ollama", tmp_path)


def test_the_temperature_is_the_one_the_file_names() -> None:
    from dither.formats.ggml import f32, u32

    metadata = {"general.sampling.temp": f32(0.6), "llama.context_length": u32(131072)}
    told = describe("m.gguf", "llama", metadata, None)
    found = dict(modelfile.read(told.modelfile()))
    assert float(found["PARAMETER temperature"]) == pytest.approx(0.6)
    assert found["PARAMETER num_ctx"] == "8192"


def test_control_tokens_of_the_template_end_an_answer_and_tags_of_thought_do_not() -> None:
    from dither.formats.ggml import ValueType, array, u32
    from dither.running.ollama import Pieces, stops_of

    metadata = {
        "tokenizer.ggml.tokens": array(ValueType.STRING, ["<bos>", "<eos>", "<end_of_turn>", "<think>", "x"]),
        "tokenizer.ggml.token_type": array(ValueType.INT32, [3, 3, 3, 4, 1]),
        "tokenizer.ggml.eos_token_id": u32(1),
    }
    pieces = Pieces("<bos>", None, "<end_of_turn>\n", "<end_of_turn>\n", "<end_of_turn>\n<think>")
    assert stops_of(pieces, metadata) == ("<end_of_turn>", "<eos>")
