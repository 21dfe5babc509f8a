"""Puts random rare words in place of each `<unk>` of WikiText-2's tokens, for calibration.

    python bench/filled.py wiki.valid.tokens > valid.filled

`<unk>` is 5 % of that text, and stands nowhere in texts that models are used on.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

CAPITALISED = 0.6  # most of what the data set leaves out are names
RARE = 2  # occurrences at most


def main() -> None:
    parser = argparse.ArgumentParser(description="Rare words in place of <unk>.")
    parser.add_argument("text", type=Path)
    words = parser.parse_args().text.read_text("utf-8").split(" ")
    count = Counter(words)
    rare = [each for each in words if count[each] <= RARE and each.isalpha() and len(each) > 3]
    names = [each for each in rare if each[0].isupper()]
    others = [each for each in rare if each[0].islower()]
    chance = random.Random(0)

    def filled(word: str) -> str:
        if word != "<unk>":
            return word
        return chance.choice(names) if chance.random() < CAPITALISED else chance.choice(others)

    print(" ".join(map(filled, words)), end="")


if __name__ == "__main__":
    main()
