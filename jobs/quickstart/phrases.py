"""The many spellings of an order's parts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import words


@dataclass(frozen=True, slots=True)
class Item:
    singular: str
    plural: str


@dataclass(frozen=True, slots=True)
class Place:
    """An address in its one full spelling."""

    number: str
    name: str
    kind: str
    city: str
    postcode: str

    @property
    def street(self) -> str:
        return f"{self.number} {self.name} {self.kind}"


def item(rng: random.Random) -> Item:
    singular, plural = rng.choice(list(words.NOUNS.items()))
    if rng.random() < 0.3:
        return Item(singular, plural)
    qualifier = rng.choice(words.QUALIFIERS)
    return Item(f"{qualifier} {singular}", f"{qualifier} {plural}")


def cents(rng: random.Random) -> int:
    """The price of one piece, with the endings that shops like."""
    whole = min(max(int(rng.lognormvariate(2.7, 1.0)), 1), 399)
    return whole * 100 + rng.choice((0, 0, 0, 50, 50, 99, 95, rng.randrange(100), rng.randrange(100)))


def place(rng: random.Random) -> Place:
    number = f"{rng.randint(1, 240)}{rng.choice('ABCD') if rng.random() < 0.1 else ''}"
    name, kind = rng.choice(words.STREET_NAMES), rng.choice(list(words.STREET_TYPES))
    return Place(number, name, kind, _town(rng), _postcode(rng))


def spell_what(rng: random.Random, item: Item, quantity: int) -> str:
    name = item.singular if quantity == 1 else item.plural
    ways = [
        f"{quantity} {name}",
        f"{quantity} {name}",
        f"{quantity}x {name}",
        f"{quantity} x {item.singular}",
        f"{quantity}x {item.singular}",
        f"{item.singular} x{quantity}",
        f"{name} ({quantity})",
        f"{quantity} pcs {item.singular}",
        f"{item.singular}, qty {quantity}",
        f"{_in_words(quantity)} {name}",
        f"{_in_words(quantity)} {name}",
        f"{_in_words(quantity)} ({quantity}) {name}",
    ]
    if quantity == 1:
        article = "an" if item.singular[0] in "aeiou" else "a"
        ways += [f"{article} {name}"] * 6
    if quantity == 2:
        ways += [f"a couple of {name}", f"a pair of {name}"] * 2
    if quantity % 12 == 0:
        dozens = "a" if quantity == 12 else _in_words(quantity // 12)
        ways += [f"{dozens} dozen {name}"] * 6
    if quantity == 6:
        ways += [f"half a dozen {name}"] * 3
    return rng.choice(ways)


def spell_number(rng: random.Random, number: int) -> str:
    return str(number) if rng.random() < 0.7 else _in_words(number)


def spell_price(rng: random.Random, cents: int, currency: str) -> str:
    whole, rest = divmod(cents, 100)
    point = rng.choice(".,") if currency in ("EUR", "CHF") else "."
    amount = str(whole) if rest == 0 and rng.random() < 0.5 else f"{whole}{point}{rest:02d}"
    name, part, sign = words.CURRENCIES[currency]
    ways = [f"{currency} {amount}", f"{amount} {currency}", f"{amount} {name}"]
    if currency == "CHF":
        ways += [f"{sign}{amount}"] + ([f"CHF {whole}.-"] if rest == 0 else [])
    else:
        ways += [f"{sign}{amount}", f"{sign}{amount}", f"{sign} {amount}"]
    if currency == "EUR":
        ways += [f"{amount}{sign}", f"{amount} {sign}"]
    if 2 <= whole < 100 and rest == 0:
        ways += [f"{_in_words(whole)} {name}"]
    if whole >= 2 and rest >= 10:
        ways += [f"{whole} {name} {rest}", f"{whole} {name} and {rest} {part}"]
    each = (" each", " each", " apiece", " per piece", " a piece", "/pc", "", "")
    return rng.choice(ways) + rng.choice(each)


def spell_day(rng: random.Random, day: date) -> str:
    month = words.MONTHS[day.month - 1]
    short = month[:3]
    ordinal = f"{day.day}{_ending(day.day)}"
    ways = [
        f"{day.day} {month} {day.year}",
        f"{ordinal} of {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{month} {ordinal}, {day.year}",
        f"{short} {day.day} {day.year}",
        f"{day.day} {short} {day.year}",
        f"{day.day} {short}. '{day:%y}",
        f"{day.day}-{short}-{day:%y}",
        day.isoformat(),
        f"{day.day}.{day.month}.{day.year}",
        f"{day:%d.%m.%Y}",
        f"{day:%d.%m.%y}",
        f"the {ordinal} of {month} {day.year}",
    ]
    # With slashes either order is in use, so only where the day cannot be a month.
    if day.day > 12:
        ways += [f"{day:%d/%m/%y}", f"{day:%d/%m/%Y}", f"{day:%m/%d/%y}", f"{day:%m/%d/%Y}"]
    return rng.choice(ways)


def spell_place(rng: random.Random, place: Place) -> str:
    kind = rng.choice(words.STREET_TYPES[place.kind])
    if rng.random() < 0.3:
        kind = place.kind
    number = place.number if rng.random() < 0.7 else place.number.lower()
    usual = f"{number} {place.name} {kind}"
    street = rng.choice((usual, usual, usual, f"{place.name} {kind} {number}", f"No. {usual}"))
    code = place.postcode if rng.random() < 0.7 else place.postcode.replace(" ", "")
    ways = (
        f"{street}, {place.city} {code}",
        f"{street}, {place.city} {code}",
        f"{street}, {place.city}, {code}",
        f"{street}, {code} {place.city}",
        f"{street} in {place.city}, {code}",
        f"{code} {place.city}, {street}",
        f"{street}\n{place.city}\n{code}",
        f"{street}, {place.city} ({code})",
    )
    return rng.choice(ways)


def shorthand(rng: random.Random, what: str, price: str, day: str, place: str) -> list[str]:
    """The order as one terse line; `day` and `place` may be empty."""
    glue = rng.choice((", ", ", ", "; ", " - ", " / ", "\n"))
    first = f"{what} @ {price}" if rng.random() < 0.4 else f"{what}{glue}{price}"
    rest = [part for part in (day, place) if part]
    rng.shuffle(rest)
    if rest and rng.random() < 0.2:
        return [glue.join([rest[0], first, *rest[1:]])]
    return [glue.join([first, *rest])]


def form(rng: random.Random, quantity: str, item: str, price: str, day: str, place: str) -> list[str]:
    """The order as labelled lines; `day` and `place` may be empty."""
    lines = [
        f"{rng.choice(('Qty', 'Quantity', 'Amount', 'Pieces'))}: {quantity}",
        f"{rng.choice(('Item', 'Article', 'Product'))}: {item}",
        f"{rng.choice(('Price', 'Unit price', 'Price per piece'))}: {price}",
        f"{rng.choice(('Date', 'Delivery', 'Needed by', 'When'))}: {day or rng.choice(('-', 'open', 'any'))}",
        f"{rng.choice(('Address', 'Ship to', 'Where'))}: {place or rng.choice(('-', 'pick up', 'none'))}",
    ]
    if rng.random() < 0.4:
        rng.shuffle(lines)
    return [rng.choice(("\n", "\n", "; ", " | ")).join(lines)]


def prose(rng: random.Random, what: str, price: str, day: str, place: str) -> list[str]:
    """The order as one sentence or several; `day` and `place` may be empty."""
    ask = _say(rng, words.ASKS, what)
    cost, when, where = (
        _say(rng, ways, part)
        for ways, part in ((words.COSTS, price), (words.TIMES, day), (words.PLACES, place))
    )
    tail = [part for part, given in ((when, day), (where, place)) if given]
    rng.shuffle(tail)
    if rng.random() < 0.55:
        return [f"{ask} {cost} {rng.choice((', ', ' ')).join(tail)}".strip() + "."]
    others = [_say(rng, words.COST_SENTENCES, price)]
    if day:
        others.append(_say(rng, words.TIME_SENTENCES, day))
    elif rng.random() < 0.4:
        others.append(rng.choice(words.NO_TIME_SENTENCES))
    if place:
        others.append(_say(rng, words.PLACE_SENTENCES, place))
    elif rng.random() < 0.6:
        others.append(rng.choice(words.NO_PLACE_SENTENCES))
    if rng.random() < 0.4:
        rng.shuffle(others)
    return [f"{ask}.", *others]


def fill(rng: random.Random, note: str) -> str:
    """A note with its blanks filled in: numbers, towns and things that are not the order's."""
    return note.format(
        number=rng.randint(1000, 999_999),
        phone=f"0{rng.randint(100, 999)} {rng.randint(100_000, 999_999)}",
        hour=rng.randint(1, 9),
        small=rng.choice((words.ONES[rng.randint(2, 9)], rng.randint(2, 9))),
        other=item(rng).singular,
        town=_town(rng),
    )


def roughen(rng: random.Random, text: str) -> str:
    """Careless typing: the case of the whole text, and spaces too many or too few around signs."""
    # Capitals take about twice the tokens, so only short texts are shouted.
    capitals = text.upper() if len(text) < 350 else text.lower()
    text = rng.choices((text, text.lower(), capitals), (70, 22, 8))[0]
    if rng.random() < 0.35:
        text = re.sub(r", (?=[^\W\d])", lambda m: rng.choices((m[0], ",", " , "), (80, 14, 6))[0], text)
        text = re.sub(r" ", lambda _: rng.choices((" ", "  ", "\n"), (96, 3, 1))[0], text)
    return text.strip()


def _say(rng: random.Random, ways: Sequence[str], part: str) -> str:
    return rng.choice(ways).format(part)


def _in_words(number: int) -> str:
    """A number under 100 in words."""
    if number < 20:
        return words.ONES[number]
    tens, ones = divmod(number, 10)
    return words.TENS[tens] + (f"-{words.ONES[ones]}" if ones else "")


def _ending(day: int) -> str:
    return "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _town(rng: random.Random) -> str:
    return rng.choice(words.TOWN_HEADS) + rng.choice(words.TOWN_TAILS)


def _postcode(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return f"{rng.randint(10_000, 99_999)}"
    letters = "ABCDEFGHJKLMNPRSTUWXY"
    outward = f"{rng.choice(letters)}{rng.choice(letters)}{rng.randint(1, 29)}"
    return f"{outward} {rng.randint(1, 9)}{rng.choice(letters)}{rng.choice(letters)}"
