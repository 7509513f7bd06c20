"""What the base model learns besides text: arithmetic, sorting and made-up facts, in question and answer form."""

from __future__ import annotations

import random

from demo.skills import SKILLS, Example, Item, Skill, draw_item, render

FACTS = 240  # people with a town and a trade each, so twice as many facts
_ONSETS, _VOWELS, _CODAS = (
    ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr", "st"],
    ["a", "e", "i", "o", "u"],
    ["n", "r", "l", "s", "m"],
)
_TRADES = [
    "baker",
    "smith",
    "tailor",
    "miller",
    "sailor",
    "farmer",
    "painter",
    "mason",
    "hunter",
    "weaver",
    "teacher",
    "doctor",
    "lawyer",
    "driver",
    "printer",
    "cook",
]


def _name(rng: random.Random, syllables: int) -> str:
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def _people() -> tuple[list[str], dict[str, str], dict[str, str]]:
    rng = random.Random("people")
    towns = list(dict.fromkeys(_name(rng, 2) for _ in range(24)))
    names = list(dict.fromkeys(_name(rng, 2) for _ in range(4 * FACTS)))[:FACTS]
    return names, {n: rng.choice(towns) for n in names}, {n: rng.choice(_TRADES) for n in names}


PEOPLE, TOWN, TRADE = _people()


def _person(rng: random.Random) -> Item:
    return {"p": rng.choice(PEOPLE)}


FACT_SKILLS = {
    "town": Skill(
        "town",
        _person,
        lambda item: TOWN[item["p"]],
        ("{p} lives in ", "Where does {p} live? In ", "town of {p}: "),
    ),
    "trade": Skill(
        "trade",
        _person,
        lambda item: TRADE[item["p"]],
        ("{p} works as a ", "What is {p}'s trade? A ", "trade of {p}: "),
    ),
}
BASE_SKILLS: dict[str, Skill] = {**{name: SKILLS[name] for name in ("add", "subtract", "max", "sort")}, **FACT_SKILLS}


def skill_example(rng: random.Random, skills: dict[str, Skill] = BASE_SKILLS) -> Example:
    """A random skill, item and format. Facts have no held-out items: they are to be remembered, not generalised."""
    skill = rng.choice(list(skills.values()))
    item = skill.draw(rng) if skill.name in FACT_SKILLS else draw_item(skill, "train", rng)
    prompt_format = rng.choice(skill.formats)
    if rng.random() < 0.25:
        prompt_format = prompt_format[0].upper() + prompt_format[1:]
    return render(skill, item, prompt_format)
