"""What rounding costs two networks that have little in common: KL divergence of our encoders' files and of ggml's.

    python benchmarks/two_judges.py --whisper FOLDER --spoken BOOK.txt --calibration TRAIN.txt --text VALID.txt
        [--types Q4_K,IQ4_XS,Q3_K,Q2_K] [--windows 6] [--tokens 6144] [--save two_judges]

A lower squared error does not always mean a lower divergence, and one network does not speak for all:

    bundled    the demo model, a decoder of four blocks whose weights have no outliers, on held-out text
    whisper    OpenAI's whisper-base, trained in float16, as transformers loads it from FOLDER: its decoder's next
               tokens while it listens to BOOK, spoken by espeak-ng

All linear layers of blocks are rounded to one type, of whisper those of the decoder: its encoder's outputs are the
same for every contestant, which saves most of the time.  `search` is our codec's answer of least weighted
error (`fit`, `snap`, `pack`), `ours` is `encode`, which also restores blocks' lengths.  An interval is a jackknife's
over twenty parts of the text and says nothing of another text or another rounding.  Importance is E[x²] of other text.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import record
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from dither.codecs import codec
from dither.types import Floats

HEARD = 29.5  # seconds of speech in a window of thirty
START = [50258, 50259, 50359, 50363]  # start of transcript, English, transcribe, no timestamps


class Judge:
    """A network, its linear layers, the columns' importance, and the divergence from what it said at first."""

    def __init__(self, name: str, network: torch.nn.Module, within: str, passes: tuple[list[Any], list[Any]]) -> None:
        """`within`: a part of the names of layers to round; `passes`: inputs that calibrate, and inputs that judge."""
        self.name, self.network, self.inputs = name, network, passes[1]
        self.layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and within in n}
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.importance = self._mean_squares(passes[0])
        self.said = list(self._logprobs())

    def _mean_squares(self, inputs: list[Any]) -> dict[str, Floats]:
        sums: dict[str, Any] = {}

        def see(name: str) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, given: tuple[torch.Tensor, ...], _out: torch.Tensor) -> None:
                x = given[0].reshape(-1, given[0].shape[-1])
                total, count = sums.get(name, (0, 0))
                sums[name] = total + (x * x).sum(0), count + len(x)

            return hook

        hooks = [layer.register_forward_hook(see(name)) for name, layer in self.layers.items()]
        with torch.no_grad():
            for given in inputs:
                self.network(**given)
        for hook in hooks:
            hook.remove()
        return {name: (total / count).numpy() for name, (total, count) in sums.items()}

    @torch.no_grad()
    def _logprobs(self) -> Iterator[torch.Tensor]:
        for given in self.inputs:
            yield torch.log_softmax(self.network(**given).logits, -1).flatten(0, 1)

    def divergence(self, rounded: Callable[[Floats, Floats], Floats]) -> Floats:
        """KL of every token, with the layers as `rounded` makes them of weights and importance."""
        for name, layer in self.layers.items():
            new = rounded(self.weights[name].numpy(), self.importance[name])
            layer.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(new)))
        kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(self.said, self._logprobs(), strict=True)]
        return torch.cat(kl).numpy()


def bundled(calibration: Path, text: Path, tokens: int) -> Judge:
    folder = str(files("dither") / "demo_model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")

    def passes(path: Path) -> list[Any]:
        with path.open(errors="replace") as file:
            ids = tokenizer(file.read(8 * tokens), add_special_tokens=False).input_ids[:tokens]
        return [{"input_ids": part} for part in torch.tensor(ids).view(-1, 512).split(4)]

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Judge("bundled", network, "layers", (passes(calibration), passes(text)))


def whisper(folder: Path, book: Path, windows: int) -> Judge:
    network = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    extract, text = WhisperFeatureExtractor(feature_size=80), book.read_text(errors="replace")
    passes = []
    for spoken, said in spoken_windows(text[len(text) // 3 :], 2 * windows):
        features = extract(spoken, sampling_rate=16000, return_tensors="pt").input_features
        with torch.no_grad():
            heard = network.model.encoder(features)
        ids = torch.tensor([START + tokenizer(said, add_special_tokens=False).input_ids])
        passes.append({"encoder_outputs": heard, "decoder_input_ids": ids})
    return Judge("whisper", network, "decoder.layers", (passes[:windows], passes[windows:]))


def spoken_windows(text: str, count: int) -> Iterator[tuple[Floats, str]]:
    """Sentences until a window is full, as samples at 16 kHz and as text."""
    samples, said = [np.zeros(0, np.float32)], ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if not 60 < len(sentence) < 250:
            continue
        wave = subprocess.run(["espeak-ng", "--stdout", sentence], capture_output=True, check=True).stdout
        at_22k = np.frombuffer(wave[44:], np.int16).astype(np.float32) / 32768
        moments = np.linspace(0, len(at_22k) - 1, len(at_22k) * 16000 // 22050)
        heard = np.interp(moments, np.arange(len(at_22k)), at_22k).astype(np.float32)
        if sum(map(len, samples)) + len(heard) > HEARD * 16000:
            yield np.concatenate(samples), said
            samples, said, count = [], "", count - 1
            if not count:
                return
        samples.append(heard)
        said += " " + sentence.replace("\n", " ")


def ggml(name: str, w_RC: Floats, importance_C: Floats | None) -> Floats:
    kind = libgguf.GGMLQuantizationType[name]
    raw = libgguf.quantize_rows_raw(kind, w_RC, *w_RC.shape, importance_C)
    return np.asarray(codec(name).decode(np.frombuffer(raw, np.uint8).reshape(len(w_RC), -1)))


def search(name: str, w_RC: Floats, importance_C: Floats | None) -> Floats:
    found = codec(name)
    w_NB = w_RC.reshape(-1, found.block)
    each = None if importance_C is None else np.tile(importance_C.reshape(-1, found.block), (len(w_RC), 1))
    grid, whole = found.fit(w_NB, each), slice(0, found.block)
    return np.asarray(found.value(found.snap(w_NB, grid, whole), grid, whole).reshape(w_RC.shape))


def ours(name: str, w_RC: Floats, importance_C: Floats | None) -> Floats:
    return codec(name).decode(codec(name).encode(w_RC, importance_C))


CONTESTANTS = {"ggml": ggml, "search": search, "ours": ours}


def race(judge: Judge, name: str, known: bool) -> dict[str, Any]:
    """One type's row: mean divergences, and both ratios to ggml's with a jackknife's error."""
    row: dict[str, Any] = {"judge": judge.name, "type": name, "importance": known}
    tokens = {}
    for who, encode in CONTESTANTS.items():

        def rounded(w_RC: Floats, importance_C: Floats, encode: Callable[..., Floats] = encode) -> Floats:
            return encode(name, w_RC, importance_C if known else None)

        tokens[who] = judge.divergence(rounded)
        row[f"{who}_kl"] = float(tokens[who].mean())
    for who in ("search", "ours"):
        row[f"{who}_ratio"], row[f"{who}_error"] = ratio(tokens[who], tokens["ggml"])
    return row


def ratio(a: Floats, b: Floats) -> tuple[float, float]:
    parts = np.array_split(np.arange(len(a)), 20)
    without = np.array([(a.sum() - a[at].sum()) / (b.sum() - b[at].sum()) for at in parts])
    return float(a.sum() / b.sum()), float(np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--whisper", type=Path, required=True, help="folder of whisper-base")
    parser.add_argument("--spoken", type=Path, required=True, help="an English book that is spoken to it")
    parser.add_argument("--calibration", type=Path, required=True, help="text the bundled model is calibrated on")
    parser.add_argument("--text", type=Path, required=True, help="text it is judged on")
    parser.add_argument("--types", default="Q2_K,Q3_K,IQ4_XS,IQ4_NL,Q4_K,Q5_K,Q6_K")
    parser.add_argument("--windows", type=int, default=6, help="windows of 30 s that calibrate, and as many that judge")
    parser.add_argument("--tokens", type=int, default=6144, help="of each text")
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    judges = [whisper(args.whisper, args.spoken, args.windows), bundled(args.calibration, args.text, args.tokens)]
    rows = []
    for name in args.types.split(","):
        for judge in judges:
            for known in (False, True):
                rows.append(race(judge, name, known))
                row = rows[-1]
                print(
                    f"{name:7} {judge.name:8} {'importance' if known else 'plain':10} ggml {row['ggml_kl']:.5f}"
                    f"  search {row['search_ratio']:.3f} ± {row['search_error']:.3f}"
                    f"  ours {row['ours_ratio']:.3f} ± {row['ours_error']:.3f}",
                    flush=True,
                )
                if args.save:
                    record.save(args.save, rows)


if __name__ == "__main__":
    main()
