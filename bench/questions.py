"""Writes the questions of `fp4graph tasks --task fp4graph`: fp4graph/study/questions/*.jsonl.

    python bench/questions.py

They are the project's own. What can be computed is computed, so that no answer is wrong; the rest
are facts that anybody can check. The same questions come out each time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FOLDER = Path(__file__).parents[1] / "fp4graph/study/questions"
CHOICES = 4

CAPITALS = """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens
Austria:Vienna Poland:Warsaw Hungary:Budapest Sweden:Stockholm Norway:Oslo Finland:Helsinki
Denmark:Copenhagen Ireland:Dublin Belgium:Brussels Russia:Moscow Ukraine:Kyiv Turkey:Ankara
Egypt:Cairo Kenya:Nairobi Ethiopia:Addis_Ababa Japan:Tokyo China:Beijing Thailand:Bangkok
Vietnam:Hanoi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Canada:Ottawa Mexico:Mexico_City
Cuba:Havana Peru:Lima Chile:Santiago Argentina:Buenos_Aires Brazil:Brasilia Australia:Canberra
New_Zealand:Wellington India:New_Delhi Nepal:Kathmandu Iceland:Reykjavik Romania:Bucharest
Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Morocco:Rabat Tunisia:Tunis Ghana:Accra
Venezuela:Caracas Colombia:Bogota Ecuador:Quito Syria:Damascus Lebanon:Beirut Jordan:Amman
South_Korea:Seoul Philippines:Manila Mongolia:Ulaanbaatar Estonia:Tallinn Latvia:Riga
Lithuania:Vilnius Slovakia:Bratislava Slovenia:Ljubljana"""
OPPOSITES = """hot:cold big:small tall:short early:late open:closed empty:full wet:dry light:dark
hard:soft rich:poor young:old fast:slow strong:weak high:low wide:narrow thick:thin deep:shallow
happy:sad brave:cowardly clean:dirty sharp:blunt loud:quiet cheap:expensive ancient:modern
rough:smooth bitter:sweet generous:stingy guilty:innocent victory:defeat arrive:depart buy:sell
ascend:descend accept:refuse remember:forget borrow:lend expand:shrink begin:end increase:decrease
attack:defend create:destroy love:hate push:pull import:export maximum:minimum friend:enemy"""
PASTS = """go:went see:saw take:took come:came give:gave find:found think:thought buy:bought
bring:brought teach:taught catch:caught write:wrote drive:drove ride:rode rise:rose speak:spoke
break:broke steal:stole choose:chose freeze:froze wear:wore tear:tore begin:began sing:sang
swim:swam drink:drank ring:rang run:ran sit:sat win:won dig:dug stick:stuck fly:flew grow:grew
know:knew throw:threw draw:drew eat:ate fall:fell forget:forgot hide:hid bite:bit shake:shook
lose:lost sleep:slept keep:kept feel:felt leave:left build:built send:sent"""
ELEMENTS = """hydrogen:H helium:He lithium:Li carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne
sodium:Na magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar
potassium:K calcium:Ca iron:Fe copper:Cu zinc:Zn silver:Ag tin:Sn gold:Au mercury:Hg lead:Pb
nickel:Ni iodine:I uranium:U tungsten:W"""
KINDS = {
    "fruit": "apple banana cherry grape lemon peach pear plum mango orange",
    "bird": "eagle sparrow owl parrot penguin crow swan pigeon falcon robin",
    "metal": "iron copper gold silver tin lead zinc nickel aluminium mercury",
    "musical instrument": "violin piano flute trumpet drum guitar cello harp clarinet oboe",
    "vegetable": "carrot onion cabbage spinach potato turnip broccoli leek celery radish",
    "piece of clothing": "shirt coat glove scarf sock hat skirt jacket dress belt",
    "insect": "ant bee wasp beetle moth mosquito butterfly cricket dragonfly fly",
    "tool": "hammer saw drill wrench chisel axe screwdriver pliers file spade",
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
EXPRESSIONS = (
    "len({w!r})", "{w!r}[{i}]", "{w!r}[::-1]", "{w!r}.upper()", "{w!r}[:{j}]", "{w!r}[-{j}:]",
    "{w!r} * 2", "{a} // {b}", "{a} % {b}", "{b} ** 2", "max({l})", "min({l})", "sum({l})",
    "sorted({l})", "{l}[::-1]", "{l}[-1]", "len({l} + {l})", "{a} > {b} and {b} > {a}",
    "{w!r}.replace({c!r}, 'x')", "{w!r}.count({c!r})", "list(range({b}))", "abs(-{a})",
    "bool({l})", "{w!r}.startswith({c!r})", "[x * 2 for x in {l}]", "'-'.join({w!r})",
    "{w!r}.find({c!r})", "divmod({a}, {b})", "str({a}) + str({b})", "int('{a}') + {b}",
    "{w!r}.title()", "set([{b}, {b}])", "round({a} / {b}, 1)", "tuple({l})", "not {l}",
)  # fmt: skip
WORDS = [
    *("cat", "planet", "tree", "window", "umbrella"),
    *("rain", "bottle", "computer", "sun", "library"),
]


def pairs(text: str) -> list[tuple[str, str]]:
    both = (each.replace("_", " ").partition(":") for each in text.split())
    return [(left, right) for left, _, right in both]


def asked(
    random: random.Random, kind: str, question: str, right: str, wrong: Sequence[str]
) -> dict[str, Any]:
    """Return a question with its choices in a drawn order."""
    others = list(dict.fromkeys(each for each in wrong if each != right))[: CHOICES - 1]
    assert len(others) == CHOICES - 1, question
    choices = [right, *others]
    random.shuffle(choices)
    return {
        "kind": kind,
        "question": question,
        "choices": choices,
        "answer": choices.index(right),
    }


def matched(
    random: random.Random, kind: str, text: str, question: str, count: int
) -> Iterator[dict[str, Any]]:
    known = pairs(text)
    every = [right for _, right in known]
    for left, right in random.sample(known, count):
        others = random.sample([each for each in every if each != right], CHOICES - 1)
        yield asked(random, kind, question.format(left), right, others)


def expression(random: random.Random, template: str) -> str:
    word = random.choice(WORDS)
    numbers = random.sample(range(1, 10), 3)
    values = {
        "w": word, "c": random.choice(word), "i": random.randrange(len(word)),
        "j": random.randrange(2, 4), "a": random.randrange(11, 60), "b": random.randrange(2, 8),
        "l": numbers,
    }  # fmt: skip
    return template.format(**values)


def python(random: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Expressions, whose value Python itself says; wrong answers are those of like ones."""
    seen: set[str] = set()
    for number in range(count):
        template = EXPRESSIONS[number % len(EXPRESSIONS)]
        text = expression(random, template)
        while text in seen:
            text = expression(random, template)
        seen.add(text)
        right = repr(eval(text))
        others = [repr(eval(expression(random, template))) for _ in range(40)]
        spare = ["None", "0", "[]", "''", "True", "False", "-1"]
        question = f"In Python, what is the value of {text}?"
        yield asked(random, "python", question, right, [*others, *spare])


def arithmetic(random: random.Random, count: int) -> Iterator[dict[str, Any]]:
    signs: dict[str, Callable[[int, int], int]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
    }
    for number in range(count):
        sign = "+-*"[number % 3]
        a, b = random.randrange(11, 99), random.randrange(3, 13 if sign == "*" else 60)
        right = signs[sign](a, b)
        wrong = [str(right + each) for each in random.sample([-20, -10, -2, -1, 1, 2, 10, 20], 6)]
        yield asked(random, "arithmetic", f"What is {a} {sign} {b}?", str(right), wrong)


def order(random: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        if number % 2:
            names, what = random.choice([(DAYS, "day"), (MONTHS, "month")])
            place, step = random.randrange(len(names)), random.randrange(1, 4)
            right = names[(place + step) % len(names)]
            ahead = f"{step} {what}{'s' if step > 1 else ''}"
            question = f"Which {what} comes {ahead} after {names[place]}?"
            yield asked(random, "order", question, right, random.sample(names, 6))
        else:
            first, step = random.randrange(1, 20), random.randrange(2, 10)
            numbers = [first + step * each for each in range(5)]
            shown = ", ".join(map(str, numbers[:4]))
            wrong = [str(numbers[4] + each) for each in (1, -1, step)]
            question = f"Which number comes next: {shown}?"
            yield asked(random, "order", question, str(numbers[4]), wrong)


def kinds(random: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        right = random.choice(KINDS[kind].split())
        wrong = [random.choice(KINDS[each].split()) for each in KINDS if each != kind]
        article = "an" if kind[0] in "aeiou" else "a"
        yield asked(random, "kinds", f"Which of these is {article} {kind}?", right, wrong[-5:])


def choice() -> list[dict[str, Any]]:
    drawn = random.Random(0)
    found = [
        *python(drawn, 105),
        *arithmetic(drawn, 60),
        *matched(drawn, "capitals", CAPITALS, "What is the capital of {}?", 50),
        *matched(drawn, "opposites", OPPOSITES, "What is the opposite of {}?", 40),
        *matched(drawn, "past tense", PASTS, 'What is the past tense of "{}"?', 40),
        *matched(drawn, "elements", ELEMENTS, "What is the chemical symbol of {}?", 25),
        *order(drawn, 40),
        *kinds(drawn, 40),
    ]
    return unlike(found)


def answers() -> list[dict[str, Any]]:
    """Questions that one word or number answers; none of `choice`'s draws."""
    drawn = random.Random(1)
    found = [
        *arithmetic(drawn, 45),
        *order(drawn, 25),
        *(each for each in python(drawn, 105) if len(each["choices"][each["answer"]]) < 9),
        *matched(drawn, "past tense", PASTS, 'What is the past tense of "{}"?', 25),
        *matched(drawn, "capitals", CAPITALS, "What is the capital of {}?", 25),
    ]
    said = [{**each, "answer": each["choices"][each["answer"]], "choices": []} for each in found]
    return unlike(said)


def unlike(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return questions without those that come a second time, in a drawn order."""
    kept = list({(each["question"], *sorted(each["choices"])): each for each in found}.values())
    random.Random(2).shuffle(kept)  # the first hundred are of all kinds
    return kept


def main() -> None:
    for name, found in (("choice", choice()), ("answers", answers())):
        kept = ({key: each[key] for key in each if each[key] != []} for each in found)
        text = "".join(json.dumps(each) + "\n" for each in kept)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(found)} questions")


if __name__ == "__main__":
    main()
