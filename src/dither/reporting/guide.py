"""View 8, "Which method?": three questions, one answer for each combination, in commands to copy.

The page and the documentation read the same data.  There are no dead ends: every combination of machine,
purpose and data ends in commands, and every method that was not chosen says why not
(`tests/showing/test_guide.py` walks all of them,
and parses every `dither` command with the real command line).

The facts are those of docs/formats.md, docs/load.md and docs/gpu.md.  In commands, MODEL stands for the model
that the person has, DATA for a text of theirs; whoever shows a command puts the real, quoted name there.
"""

from __future__ import annotations

from typing import Any

MACHINES, PURPOSES, DATA = ("laptop", "mac", "gpu", "gpus"), ("run", "tune", "serve"), ("yes", "no")
GGUF, AWQ, GPTQ, COMPRESSED, BNB = "GGUF", "AWQ", "GPTQ", "compressed-tensors", "bitsandbytes"

QUESTIONS: list[dict[str, Any]] = [
    {
        "id": "machine", "text": "Where will it work?",
        "options": [
            {"id": "laptop", "text": "A laptop or PC", "hint": "no graphics card, or a small one"},
            {"id": "mac", "text": "A Mac", "hint": "M1 or later: the GPU shares the memory"},
            {"id": "gpu", "text": "One NVIDIA GPU", "hint": "16 GB or more"},
            {"id": "gpus", "text": "Several GPUs", "hint": "a server"},
        ],
    },
    {
        "id": "purpose", "text": "What for?",
        "options": [
            {"id": "run", "text": "Run it", "hint": "one person, one answer at a time"},
            {"id": "tune", "text": "Fine-tune it", "hint": "teach it your examples with an adapter"},
            {"id": "serve", "text": "Serve it", "hint": "many people or programs at once"},
        ],
    },
    {
        "id": "data", "text": "Do you have text like the text it will see?",
        "options": [
            {"id": "yes", "text": "Yes", "hint": "a few hundred pages are plenty; to fine-tune: examples"},
            {"id": "no", "text": "No", "hint": "there is a way without"},
        ],
    },
]  # fmt: skip


def step(command: str, why: str, kind: str = "sh", needs: str = "") -> dict[str, str]:
    """One thing to copy; `needs` names the program where it is not ours."""
    return {"command": command, "why": why, "kind": kind, "needs": needs}


_FIT = step("dither fit MODEL", "See what fits this machine before anything is made: it reads headers alone.")
_CALIBRATE = step(
    "dither calibrate MODEL --data DATA -o evidence",
    "Let the model read your text once (DATA is its file) and note which weights matter. Minutes; it can be "
    "interrupted.",
)
_SELF = step(
    "dither calibrate MODEL -o evidence", "No text of yours is needed: the model writes what it then learns from."
)


def _made(to: str, out: str, evidence: bool) -> dict[str, str]:
    extra = " --evidence evidence" if evidence else ""
    why = "Make the file; errors make up for one another." if evidence else "Make the file. No data, no GPU, minutes."
    return step(f"dither quantize MODEL --to {to}{extra} -o {out}", why)


def _vllm(folder: str, cards: int) -> dict[str, str]:
    many = f" --tensor-parallel-size {cards}" if cards > 1 else ""
    return step(f"vllm serve {folder}{many}", "Serve it under the OpenAI protocol.", needs="vLLM")


_ADAPTERS = """import dither
from peft import LoraConfig, get_peft_model

model = dither.load("MODEL", "{to}", device="{device}")
tuned = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM"))
tuned.print_trainable_parameters()
# train `tuned` with your trainer, then: tuned.save_pretrained("adapter")"""


def _trained(to: str, device: str, where: str) -> dict[str, str]:
    return step(_ADAPTERS.format(to=to, device=device), where, kind="python")


_BETTER = (
    "Better, for some minutes more: calibrated, a file of the same size lost less than half as much (docs/quality.md)."
)


def _gguf_run(machine: str, data: bool) -> dict[str, Any]:
    out = "model-Q4_K_M.gguf"
    because = {
        "laptop": "llama.cpp reads GGUF, runs on any processor, and moves what fits to a small GPU.",
        "mac": "llama.cpp uses Apple's GPU on the memory that both share; the formats of GPU servers do not run there.",
        "gpu": "For one answer at a time, memory bandwidth is the limit and all 4-bit formats are about as "
        "fast; GGUF also runs when the model is larger than the GPU, with the rest in RAM.",
    }[machine]
    steps = [_FIT, *([_CALIBRATE] if data else []), _made("Q4_K_M", out, data)]
    steps.append(step(f"dither chat {out}", "Talk to it."))
    better = [] if data else [_SELF, _made("Q4_K_M", "better-Q4_K_M.gguf", True)]
    return _answer(GGUF, "GGUF, Q4_K_M", because, steps, better)


def _gguf_serve(machine: str, data: bool) -> dict[str, Any]:
    out = "model-Q4_K_M.gguf"
    because = {
        "laptop": "A processor serves a few people at once; llama.cpp gives each a slot of the cache.",
        "mac": "llama.cpp is the server for Apple's GPU: a few people at once, each with a slot of the cache.",
    }[machine]
    steps = [
        step("dither fit MODEL --slots 4 --kv q8_0", "Each conversation needs its own cache: see what four take."),
        *([_CALIBRATE] if data else []),
        _made("Q4_K_M", out, data),
        step(f"dither serve {out} --slots 4 --kv q8_0", "Four conversations at once, under the OpenAI protocol."),
    ]
    better = [] if data else [_SELF, _made("Q4_K_M", "better-Q4_K_M.gguf", True)]
    return _answer(GGUF, "GGUF, Q4_K_M", because, steps, better)


def _gpu_serve(machine: str, data: bool) -> dict[str, Any]:
    cards = 2 if machine == "gpus" else 1
    if data and cards == 1:
        because = (
            "Integers of 4 bits leave the most memory for the caches of many conversations, and vLLM has "
            "fast kernels for them on every NVIDIA card of the last eight years."
        )
        steps = [_CALIBRATE, _made("w4a16", "model-w4a16", True), _vllm("model-w4a16", cards)]
        return _answer(COMPRESSED, "compressed-tensors, w4a16", because, steps, [])
    if data:
        because = (
            "Many users at once are limited by arithmetic, not by memory: with activations rounded too, "
            "integers are multiplied, which is faster on Turing, Ampere and later."
        )
        steps = [_CALIBRATE, _made("w8a8", "model-w8a8", True), _vllm("model-w8a8", cards)]
        return _answer(COMPRESSED, "compressed-tensors, w8a8", because, steps, [])
    because = (
        "FP8 needs no data, halves the file, and saves arithmetic as well on cards that multiply it (Ada, "
        "Hopper and later: compute capability 8.9)."
    )
    steps = [_made("fp8", "model-fp8", False), _vllm("model-fp8", cards)]
    older = [
        step(
            "dither quantize MODEL --to w4a16 --solver half-quadratic -o model-w4a16",
            "On an older card, or for less memory: 4 bits, still without data.",
        ),
        _vllm("model-w4a16", cards),
    ]
    return _answer(COMPRESSED, "compressed-tensors, fp8", because, steps, older)


def _gpus_run(data: bool) -> dict[str, Any]:
    because = (
        "Several GPUs work on one answer together only in an engine that splits every layer among them. "
        "vLLM and SGLang do, and GPTQ is the format that both, and transformers, have read the longest."
    )
    first = _CALIBRATE if data else _SELF
    steps = [first, _made("gptq", "model-gptq", True), _vllm("model-gptq", 2)]
    return _answer(GPTQ, "GPTQ, 4 bits", because, steps, [])


def _tune(machine: str, data: bool) -> dict[str, Any]:
    if not data:
        return _nothing_to_learn(machine)
    out = step(
        "dither quantize MERGED --to Q4_K_M -o tuned-Q4_K_M.gguf",
        "Afterwards: merge the adapter into the original (peft's merge_and_unload), then quantize that.",
    )
    if machine in ("laptop", "mac"):
        because = (
            "Adapters train on frozen 4-bit weights with Dither's own layer, which is plain torch and runs "
            "anywhere. Without an NVIDIA GPU it is slow: good for models of up to a billion weights or so, "
            "and for trying out."
        )
        steps = [
            step("pip install 'dither[calibrate]' peft", "torch, transformers and the adapters.", needs="pip"),
            _trained("int4", "cpu", "Load it in 4 bits and put a LoRA adapter on top."),
            out,
        ]
        return _answer(BNB, "on the fly, int4 with Dither's layer", because, steps, [])
    because = (
        "QLoRA: the model stays frozen in NF4, a small adapter in 16 bits learns on top. peft and its trainers know it."
    )
    steps = [
        step("pip install 'dither[bnb]' peft", "torch, transformers, bitsandbytes and the adapters.", needs="pip"),
        _trained("nf4", "cuda", "Load it in NF4 and put a LoRA adapter on top."),
        out,
    ]
    better = [step("dither quantize MODEL --to nf4 -o model-nf4", "To load faster next time: keep the NF4 file.")]
    if machine == "gpus":
        better.append(
            step(
                "accelerate launch --num_processes 2 train.py",
                "One copy of the 4-bit model per GPU, each with its share of the examples.",
                needs="accelerate",
            )
        )
    return _answer(BNB, "bitsandbytes, NF4 (QLoRA)", because, steps, better)


def _nothing_to_learn(machine: str) -> dict[str, Any]:
    because = (
        "Fine-tuning learns from examples: without any there is nothing to learn. A system text often does "
        "what one hoped fine-tuning would do; try that today, keep the good answers, and train when you "
        "have some hundreds."
    )
    steps = [
        _made("Q4_K_M", "model-Q4_K_M.gguf", False),
        step("dither chat model-Q4_K_M.gguf --system 'You answer briefly.'", "Tell it who it is, and see."),
    ]
    better = [
        step("dither quantize MODEL --to nf4 -o model-nf4", "What training will start from, once there are examples.")
    ]
    return _answer(
        GGUF, "GGUF now, NF4 when there are examples", because, steps, [] if machine in ("laptop", "mac") else better
    )


def _answer(
    method: str, title: str, because: str, steps: list[dict[str, str]], better: list[dict[str, str]]
) -> dict[str, Any]:
    return {"method": method, "title": title, "because": because, "steps": steps, "better": better}


def answer(machine: str, purpose: str, data: str) -> dict[str, Any]:
    """What to do: `method`, `title`, `because`, `steps` to copy, `better` ones, `ruled_out` with reasons."""
    has = data == "yes"
    if purpose == "tune":
        found = _tune(machine, has)
    elif purpose == "serve":
        found = _gguf_serve(machine, has) if machine in ("laptop", "mac") else _gpu_serve(machine, has)
    else:
        found = _gpus_run(has) if machine == "gpus" else _gguf_run(machine, has)
    found["better_why"] = _better_why(found, machine, purpose)
    methods = (GGUF, AWQ, GPTQ, COMPRESSED, BNB)
    found["ruled_out"] = [
        {"method": method, "reason": _against(method, machine, purpose, has)}
        for method in methods
        if method != found["method"]
    ]
    return found


def _better_why(found: dict[str, Any], machine: str, purpose: str) -> str:
    if not found["better"]:
        return ""
    if purpose == "tune":
        return "And then:"
    return _BETTER if found["method"] == GGUF else "If the card is older or the memory is short:"


def _against(method: str, machine: str, purpose: str, data: bool) -> str:
    if purpose == "tune" and data:
        return _AGAINST_TUNING[method]
    if purpose == "tune":
        return f"{_AGAINST_TUNING[method]} And without examples nothing can be trained yet."
    if machine == "laptop" and method != GGUF:
        return _NO_CUDA[method].format(place="without an NVIDIA GPU")
    if machine == "mac" and method != GGUF:
        return _NO_CUDA[method].format(place="on a Mac")
    if purpose == "serve":
        return _AGAINST_SERVING[method]
    return _AGAINST_RUNNING[method]


_AGAINST_TUNING = {
    GGUF: "A format to run: no trainer puts adapters on a GGUF. Train on the original in 4 bits, then make the GGUF.",
    AWQ: "Adapters train on it, slowly, but cannot be merged back: peft refuses.",
    GPTQ: "Adapters train on it, but cannot be merged back: peft refuses.",
    COMPRESSED: "Adapters do not train over its packed integers (peft 0.21).",
    BNB: "NF4 (QLoRA) is what training will use.",
}
_NO_CUDA = {
    AWQ: "Made for GPU engines; {place} it runs slowly or not at all. Its idea, scales that protect what "
    "matters, is there for GGUF too: --transform awq.",
    GPTQ: "Made for GPU engines; {place} it runs slowly or not at all. Its idea, error feedback, is what "
    "--evidence does for GGUF.",
    COMPRESSED: "vLLM's format: {place} there is no fast engine for it.",
    BNB: "A way of loading into transformers that de-quantizes for every product; {place} slower than "
    "llama.cpp by far.",
}
_AGAINST_SERVING = {
    GGUF: "llama.cpp serves a few at once; with hundreds of requests engines that batch on the GPU are far ahead.",
    AWQ: "Serves well in vLLM too. One grid for all layers, though: no mixed precision, and at equal size "
    "error feedback lost less here (docs/gpu.md).",
    GPTQ: "The same integers in another box; vLLM reads both. Take it where SGLang or transformers must "
    "read the file too.",
    COMPRESSED: "",
    BNB: "De-quantizes before it multiplies: the slowest of them at generating, and rounded without data.",
}
_AGAINST_RUNNING = {
    GGUF: "llama.cpp spreads layers over the GPUs, which then mostly wait for each other: fine for size, no "
    "gain in speed.",
    AWQ: "As fast as GPTQ in the same engines; at equal size it lost more here (docs/gpu.md).",
    GPTQ: "As fast while the model fits the GPU, and does not run at all when it does not. Take it for vLLM "
    "or transformers.",
    COMPRESSED: "vLLM's own box for the same integers; a server to start for one person's answers.",
    BNB: "De-quantizes before it multiplies: the slowest of them at generating, and rounded without data.",
}

# What people compare.  Each cell: a few words, and whether it speaks for the method (+) or against it (-).
FACTORS = (
    ("runs on", "where"), ("engines", "engines"), ("generating one answer", "one"), ("many at once", "many"),
    ("fine-tuning on top", "tune"), ("merging adapters", "merge"), ("saving", "save"), ("calibration data",
    "data"),
    ("bits", "bits"),
)  # fmt: skip
METHODS: list[dict[str, Any]] = [
    {
        "method": GGUF,
        "where": ["any processor, Macs, GPUs, both together", "+"],
        "engines": ["llama.cpp, Ollama, LM Studio", ""],
        "one": ["fast everywhere", "+"],
        "many": ["a few at once", "-"],
        "tune": ["no", "-"],
        "merge": ["into the original, then quantize", ""],
        "save": ["one file", "+"],
        "data": ["not needed; better with it", "+"],
        "bits": ["1.6 to 8, mixed per tensor", "+"],
    },
    {
        "method": AWQ,
        "where": ["NVIDIA GPUs", ""],
        "engines": ["vLLM, SGLang, transformers", ""],
        "one": ["fast", "+"],
        "many": ["saves memory, not arithmetic", ""],
        "tune": ["adapters train", "+"],
        "merge": ["refused by peft", "-"],
        "save": ["a folder", "+"],
        "data": ["needed, little", ""],
        "bits": ["4, one grid for all", "-"],
    },
    {
        "method": GPTQ,
        "where": ["NVIDIA GPUs", ""],
        "engines": ["vLLM, SGLang, transformers", ""],
        "one": ["fast", "+"],
        "many": ["saves memory, not arithmetic", ""],
        "tune": ["adapters train", "+"],
        "merge": ["refused by peft", "-"],
        "save": ["a folder", "+"],
        "data": ["needed, more", ""],
        "bits": ["2, 3, 4, 8, mixed by rules", "+"],
    },
    {
        "method": COMPRESSED,
        "where": ["NVIDIA GPUs", ""],
        "engines": ["vLLM, transformers", ""],
        "one": ["fast", "+"],
        "many": ["w8a8, fp8, nvfp4 save arithmetic too", "+"],
        "tune": ["no, over packed integers", "-"],
        "merge": ["into the original, then quantize", ""],
        "save": ["a folder", "+"],
        "data": ["needed for integers, not for FP8", ""],
        "bits": ["3 to 8, integers and floats, mixed", "+"],
    },
    {
        "method": BNB,
        "where": ["GPUs; processors slowly", ""],
        "engines": ["transformers, vLLM", ""],
        "one": ["slowest of these", "-"],
        "many": ["slow", "-"],
        "tune": ["QLoRA: made for it", "+"],
        "merge": ["possible, loses part of what was learnt", "-"],
        "save": ["loads on the fly; Dither also saves it", ""],
        "data": ["none", "+"],
        "bits": ["4 or 8", ""],
    },
]

TOPICS: list[dict[str, str]] = [
    {
        "id": "data-free", "title": "With data or without?",
        "text": "GGUF's types and bitsandbytes round every weight to the nearest number they have: no data, "
        "minutes. AWQ and GPTQ first watch text go through the model. AWQ then enlarges what matters before "
        "rounding, GPTQ lets later weights make up for the errors of earlier ones. Think of packing for a "
        "trip: without knowing where you go, you pack a little of everything; with the weather report, you "
        "leave the right things at home. Dither has both for every format: the method is a choice of how to "
        "round, the format only the box the numbers travel in.",
    },
    {
        "id": "on-the-fly", "title": "On the fly, or saved?",
        "text": "On the fly means: the original lies on disk, and is rounded each time it is loaded "
        "(bitsandbytes, dither.load). Nothing to keep, ideal to try and to fine-tune, but one needs the "
        "original and waits each time, and only methods without data are quick enough. Saved means: rounded "
        "once, carefully, and loaded at a quarter of the size ever after.",
    },
    {
        "id": "qat", "title": "QAT or PTQ?",
        "text": "PTQ, post-training quantization, rounds a finished model: minutes to hours on one machine, "
        "and what this page shows. QAT, quantization-aware training, goes on training while the model "
        "already feels the rounding, so that it learns to live with it: better at 4 bits and below, but it "
        "costs the data, the hardware and the days of training. It is like a pianist: PTQ hands over the "
        "smaller keyboard on the evening of the concert, QAT lets him practice on it. Some models are "
        "published so by their makers; quantize those to the type they were trained for.",
    },
    {
        "id": "speed", "title": "Why is a smaller file faster?",
        "text": "For every token, every weight is read from memory once; the sums are done long before the "
        "next weights arrive. A quarter of the bytes is up to four times the tokens per second. With many "
        "users the same weights serve many sums, arithmetic becomes the limit, and only formats that round "
        "activations too (w8a8, fp8, nvfp4) help.",
    },
    {
        "id": "merge", "title": "Adapters: merge first, then quantize",
        "text": "An adapter (LoRA) is a small difference learnt on top. Added to weights that are already "
        "rounded, the sum is rounded again, and a small difference is just what rounding removes. So add it "
        "to the original and quantize the result; or leave it beside the model as a file of its own.",
    },
]  # fmt: skip

ARITHMETIC: dict[str, Any] = {
    "example": 7_000_000_000,  # weights
    "bits": [32, 16, 8, 4],
    "rule": "parameters × bits ÷ 8 = bytes",
    "why": [
        "Scales: each block of weights keeps the step it was measured in. With 16 bits for every 32 weights "
        "that is half a bit more per weight.",
        "Mixed types: where an error would hurt most, some tensors get more bits. Q4_K_M is Q4_K with some Q6_K.",
        "The embedding and the output matrix: kept finer, or not rounded at all; in small models they are a "
        "large part.",
        "Norms and biases: few numbers, kept whole. And the vocabulary travels in the file too.",
    ],
}

GUIDE: dict[str, Any] = {
    "questions": QUESTIONS,
    "answers": {
        f"{machine}/{purpose}/{data}": answer(machine, purpose, data)
        for machine in MACHINES
        for purpose in PURPOSES
        for data in DATA
    },
    "factors": [{"title": title, "id": name} for title, name in FACTORS],
    "methods": METHODS,
    "topics": TOPICS,
    "arithmetic": ARITHMETIC,
    "source": "docs/formats.md, docs/load.md, docs/gpu.md; which GPU has which arithmetic is its maker's word",
    "tag": "literature",
}
