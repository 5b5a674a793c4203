"""Messy order lines and the JSON they mean: the quickstart's dataset, and the score of answers to it.

`python orders.py` writes orders.parquet beside this file. All rows follow from a seed.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import phrases
import pyarrow as pa
import pyarrow.parquet as pq
import words

HERE = Path(__file__).parent
INSTRUCTION = "Turn this order into JSON: "
FIELDS = ("quantity", "item", "price", "currency", "date", "street", "city", "postcode")
CHANNELS = ("email", "form", "phone", "chat")
OPENED, OPEN_DAYS = datetime(2025, 1, 1, tzinfo=UTC), 730

# The dataset's own seed and that of the rows which tests score; the trainer leaves out the texts of both.
DATASET_SEED, DATASET_ROWS = 2026, 2000
TEST_SEED, TEST_ROWS = 97, 500


@dataclass(frozen=True, slots=True)
class Order:
    """What an order line says. `price` is of one piece; a line may leave the date or the address out."""

    quantity: int
    item: str
    price: str
    currency: str
    date: str | None
    street: str | None
    city: str | None
    postcode: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Row:
    channel: str
    received: datetime
    text: str
    expected: str


def rows(seed: int | str, count: int | None = None) -> Iterator[Row]:
    """The first `count` rows of a seed, or rows without end. Rows are independent of one another."""
    rng = random.Random(f"orders {seed}")
    for _ in itertools.count() if count is None else range(count):
        received = OPENED + timedelta(seconds=rng.randrange(OPEN_DAYS * 86_400))
        order, text = write_order(rng, received.date())
        yield Row(rng.choice(CHANNELS), received, text, order.to_json())


def prompt(text: str) -> str:
    """The user's message for one order text, as job.yaml writes it."""
    return INSTRUCTION + text


def right_fields(answer: str | None, truth: str) -> set[str]:
    """The fields of an answer that equal the truth's; none where it is no JSON object of these fields."""
    try:
        said = json.loads(answer or "")
    except json.JSONDecodeError:
        return set()
    if not isinstance(said, dict) or set(said) != set(FIELDS):
        return set()
    meant = json.loads(truth)
    return {
        field for field in FIELDS if type(said[field]) is type(meant[field]) and said[field] == meant[field]
    }


def score(answers: Sequence[str | None], truths: Sequence[str]) -> float:
    """The share of rows that are right in every field."""
    pairs = zip(answers, truths, strict=True)
    return sum(len(right_fields(answer, truth)) == len(FIELDS) for answer, truth in pairs) / len(truths)


def pieces(text: str) -> int:
    """Words, digits and signs in a text: what no tokenizer that splits digits can encode in fewer tokens."""
    return len(re.findall(r"[^\W\d_]+|\d|[^\w\s]+", text))


def write_order(rng: random.Random, today: date) -> tuple[Order, str]:
    """One random order and one of the many ways to write it."""
    item = phrases.item(rng)
    quantity = rng.choices((1, rng.randint(2, 12), rng.randint(13, 60)), (2, 6, 2))[0]
    cents = phrases.cents(rng)
    currency = rng.choice(list(words.CURRENCIES))
    day = today + timedelta(days=rng.randint(1, 120)) if rng.random() < 0.85 else None
    place = phrases.place(rng) if rng.random() < 0.85 else None
    order = Order(
        quantity=quantity,
        item=item.singular,
        price=f"{cents // 100}.{cents % 100:02d}",
        currency=currency,
        date=day.isoformat() if day else None,
        street=place.street if place else None,
        city=place.city if place else None,
        postcode=place.postcode if place else None,
    )
    sentences = _write_core(rng, item, quantity, cents, currency, day, place)
    return order, phrases.roughen(rng, _pad_out(rng, sentences))


def _write_core(
    rng: random.Random,
    item: phrases.Item,
    quantity: int,
    cents: int,
    currency: str,
    day: date | None,
    place: phrases.Place | None,
) -> list[str]:
    """The sentences that carry the order: prose, shorthand, or a form."""
    what = phrases.spell_what(rng, item, quantity)
    price = phrases.spell_price(rng, cents, currency)
    when = phrases.spell_day(rng, day) if day else ""
    where = phrases.spell_place(rng, place) if place else ""
    style = rng.choices(("shorthand", "form", "prose"), (3, 1, 5))[0]
    if style == "form":
        name = item.singular if rng.random() < 0.6 or quantity == 1 else item.plural
        return phrases.form(rng, phrases.spell_number(rng, quantity), name, price, when, where)
    write = phrases.prose if style == "prose" else phrases.shorthand
    return write(rng, what, price, when, where)


def _pad_out(rng: random.Random, core: list[str]) -> str:
    """Adds greetings and notes around the order's own sentences until a log-normal length is reached."""
    wanted = min(max(rng.lognormvariate(3.65, 0.65), 20), 250)
    sentences = list(core)
    missing = wanted - pieces(" ".join(core))
    if missing > 4 and rng.random() < 0.7:
        sentences.insert(0, rng.choice(words.GREETINGS))
        missing -= 3
    first = len(sentences) - len(core)
    for note in rng.sample(words.NOTES, len(words.NOTES)):
        if missing <= 4:
            break
        sentence = phrases.fill(rng, note)
        sentences.insert(rng.randint(first, len(sentences)), sentence)
        missing -= pieces(sentence)
    if missing > 0:
        sentences.append(rng.choice(words.CLOSINGS))
    text = rng.choice((" ", " ", " ", "\n")).join(sentences)
    return text if pieces(text) >= 20 else f"{text} {rng.choice(words.LONG_CLOSINGS)}"


def to_table(orders: Sequence[Row]) -> pa.Table:
    """The rows in the order in which they were received, numbered."""
    ordered = sorted(orders, key=lambda row: row.received)
    return pa.table(
        {
            "order_id": pa.array(range(10_001, 10_001 + len(ordered)), pa.int64()),
            "channel": pa.array([row.channel for row in ordered]).dictionary_encode(),
            "received": pa.array([row.received for row in ordered], pa.timestamp("ms", tz="UTC")),
            "text": pa.array([row.text for row in ordered], pa.string()),
            "expected": pa.array([row.expected for row in ordered], pa.string()),
        }
    )


if __name__ == "__main__":
    # Small row groups, so that even this little data has several partitions.
    table = to_table(list(rows(DATASET_SEED, DATASET_ROWS)))
    pq.write_table(table, HERE / "orders.parquet", row_group_size=256, compression="zstd")
