"""What a trigram model of the same text reaches: the yardstick in the demo model's card.

Interpolated modified Kneser-Ney (Chen and Goodman, 1999, section 3) over the very tokens that the
demo model was trained on, measured on the very positions of its validation:

    python tools/trigram_baseline.py --work /tmp/run

Legend: keys are n-grams packed into one integer, V the vocabulary's size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

V = 4096


class Counts:
    """Distinct n-grams, sorted, with how often each occurs."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)
        self.discounts = discounts(self.counts)

    def of(self, keys: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts of 0, 1, 2 and 3 or more (Chen and Goodman's equation 26)."""
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])


def interpolate(table: Counts, contexts: np.ndarray, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Discounted share of `keys` among their contexts, plus what was taken off times `lower`."""
    owners, start = np.unique(table.keys // V, return_index=True)
    totals = np.add.reduceat(table.counts, start)
    taken = np.add.reduceat(table.discounts[table.counts.clip(max=3)], start)
    at = np.searchsorted(owners, contexts).clip(max=len(owners) - 1)
    known = owners[at] == contexts
    total, free = totals[at].astype(float), taken[at]
    count = table.of(keys)
    share = (count - table.discounts[count.clip(max=3)]) / total
    return np.where(known, share + free / total * lower, lower)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of train_demo_model.py")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    train = np.load(args.work / "train.npy").astype(np.int64)
    valid = np.load(args.work / "valid.npy").astype(np.int64)

    trigrams = Counts((train[:-2] * V + train[1:-1]) * V + train[2:])
    followed = Counts(trigrams.keys % (V * V))  # in how many contexts each bigram was seen
    unigrams = np.bincount(followed.keys % V, minlength=V).astype(float)
    uniform = (unigrams + 0.5) / (unigrams + 0.5).sum()

    starts = np.linspace(0, len(valid) - args.context - 1, args.sequences).astype(int)
    at = (starts[:, None] + 1 + np.arange(args.context)).reshape(-1)
    at = at[at >= 2]
    a, b, c = valid[at - 2], valid[at - 1], valid[at]
    bigram = interpolate(followed, b, b * V + c, uniform[c])
    trigram = interpolate(trigrams, a * V + b, (a * V + b) * V + c, bigram)
    print(json.dumps({"trigram_loss": float(-np.log(trigram).mean()), "positions": len(at)}))


if __name__ == "__main__":
    main()
