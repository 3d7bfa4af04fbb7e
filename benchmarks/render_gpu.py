"""Writes docs/gpu.md from the kept results, so that no number there is typed by hand.

python benchmarks/render_gpu.py
"""

from __future__ import annotations

from typing import Any

from render import ROOT, load, table

PAGE = ROOT / "docs" / "gpu.md"

TEXT = """# GPU formats: what files lose beside their own tools'

Made by `python benchmarks/render_gpu.py` from `benchmarks/results/`, on {processor}.

`{command}`

The bundled model, which was trained in bfloat16 by this project, on books. Every contestant calibrates on the same token ids and writes
a file of the same bits and group ([formats](formats.md)); each peer runs in an environment of its own. All files of one width are
read by Dither and measured in one pass on text that nothing was calibrated on: books of other authors, and an encyclopedia. KL is the mean
Kullback-Leibler divergence from the original, in nats per token, with its 95 % interval over sequences. *Ratio* divides by the best of
the peers on that text, its interval drawn over the same sequences; **bold** reaches the target of 0.85.

Seconds are calibration and solving on one thread, without imports, compiling and saving; *CPU* counts what was computed in them, which
a machine that does other work besides changes less.

{tables}
Settings: *best* is zero points and a search of scales for the least squared error, the strongest of the peers' own settings that were
tried (GPTQModel {gptqmodel}: `sym=False`, `mse=2.4`; llm-compressor {llmcompressor}: `symmetric=False`, `observer="mse"`); without a
word, each tool's defaults. AutoAWQ {autoawq} and our *awq* (`--transform awq --solver scales`) round to nearest behind scales that protect
channels; at 3 bits, which AWQ's layout has not, our scales travel in GPTQ's. `--to awq --evidence` without a word takes the scales and error
feedback, as in *awq+gptq*; without evidence `--to awq` and `--to gptq` are plain rounding, and say so ([formats](formats.md)). *gradients* is evidence of `dither calibrate --gradients`:
with it calibration takes the larger part of the time.

## 3 bits once more

`{learned_command}`

An earlier run, against the strongest settings of the peers, with trained rounding besides. *gptq asymmetric gradients* is the recipe of the
table above, of which the gradients were drawn for other words: that, and the order of sums, move the divergence on the encyclopedia by up to
ten per cent. All ran beside other work: read the processor seconds.

{learned}
## Beside AutoRound

{autoround_commands}

AutoRound {autoround} trains rounding and ranges block by block, as our *learned* does after error feedback: its own settings, 200 steps for each
block, with zero points. At 3 bits it packs nothing, and writes what the packed weights would be. All ran beside other work: read the
processor seconds. Error feedback with gradients takes about a tenth of the time of either.

{autoround_tables}
## AWQ with its clips

`{awq_command}`

AutoAWQ also searches how far to clip each group; `--solver scales` does so too ([solvers](solvers.md#scales-how-far-to-clip)). *awq
nearest* is the transform without that, *scales* the solver without the transform. Fewer tokens than above; AutoAWQ ran beside other work,
so that its processor seconds say more.

{awq}
## NF4

Without data there is nothing to choose, so codes are compared one by one: of {codes:,} codes of {matrices} matrices, {differ} differ from
bitsandbytes {bitsandbytes}'s. Of the blocks' scales, which double quantization makes 8-bit codes of their own, {scales} differ: near a
middle between two codes bitsandbytes' lookup table on a CPU takes the farther one.
"""


AUTOROUND = ("gpu_formats_autoround_4", "gpu_formats_autoround_3")


def page() -> str:
    found = load("gpu_formats")
    rows = found["rows"]
    [nf4] = [row for row in rows if row["type"] == "nf4"]
    raced = [row for row in rows if "recipe" in row]
    versions = {row["peer"]: row["version"] for row in raced if "peer" in row}
    return TEXT.format(
        processor=found["processor"],
        command=found["command"],
        learned_command=load("gpu_formats_learned")["command"],
        learned=_race(load("gpu_formats_learned")["rows"], level=0),
        autoround_commands="\n\n".join(f"`{load(name)['command']}`" for name in AUTOROUND),
        autoround=load(AUTOROUND[0])["rows"][0]["version"],
        autoround_tables="\n".join(_race(load(name)["rows"], level=3) for name in AUTOROUND),
        awq_command=load("gpu_formats_awq")["command"],
        awq=_race(load("gpu_formats_awq")["rows"], level=0),
        tables="\n".join(_race([row for row in raced if row["type"] == kind]) for kind in _kinds(raced)),
        gptqmodel=versions.get("gptqmodel", ""),
        llmcompressor=versions.get("llmcompressor", ""),
        autoawq=versions.get("autoawq", ""),
        codes=nf4["codes"],
        matrices=nf4["matrices"],
        differ=nf4["bytes_that_differ"] or "none",
        bitsandbytes=nf4["peer"],
        scales=nf4["scales_that_differ"],
    )


def _kinds(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["type"] for row in rows))


def _race(rows: list[dict[str, Any]], level: int = 2) -> str:
    """A table, under a heading of a level that is not 0."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    heads = ["file", "MiB"]
    for text in texts:
        heads += [f"KL, {text}", "95 %", "ratio", "95 %"]
    heads += ["s", "CPU s"]
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = {row["text"]: row for row in rows if row["recipe"] == recipe}
        first = mine[texts[0]]
        line = [recipe, f"{first['bytes'] / 2**20:.2f}"]
        for text in texts:
            row = mine[text]
            ratio = f"{row['ratio']:.3f}"
            reached = row["target"] is not None and row["ratio"] <= row["target"]
            line += [
                f"{row['kl']:.5f}",
                f"{row['kl_low']:.5f}–{row['kl_high']:.5f}",
                f"**{ratio}**" if reached else ratio,
                f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}",
            ]
        lines.append([*line, f"{first['seconds']:.0f}", f"{first['cpu_seconds']:.0f}"])
    bits, group = rows[0]["bits"], rows[0]["group"]
    title = f"{'#' * level} {bits} bits in groups of {group}\n\n" if level else ""
    return f"{title}{table(heads, lines)}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
