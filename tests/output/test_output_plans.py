"""The plans of an output: numbered, each put once, and never another one in a number's place."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts import faulty_folder, store_of

from batchrun.dataset.plan import Plan, joined
from batchrun.dataset.planner import extend, make_plan
from batchrun.errors import ChangedError
from batchrun.job.settings import InputSettings
from batchrun.output import plans
from batchrun.output.layout import plan_key
from batchrun.storage import Folder, folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)


@pytest.fixture
def place() -> Folder:
    return faulty_folder()[0]


def write(path: Path, rows: int) -> None:
    pq.write_table(pa.table({"n": range(rows)}), path, row_group_size=3)


def grown(tmp_path: Path, days: int) -> list[Plan]:
    """A plan for each day on which one file came."""
    settings = InputSettings(path=str(tmp_path), since="last")
    made: list[Plan] = []
    for day in range(days):
        write(tmp_path / f"{day}.parquet", 5 + day)
        new = extend(made, settings, ["n"], 4, 10**6) if made else make_plan(settings, ["n"], 4, 10**6)
        assert new is not None
        made.append(new)
    assert extend(made, settings, ["n"], 4, 10**6) is None
    return made


def test_plans_come_back_in_their_order_and_join_into_one(place: Folder, tmp_path: Path) -> None:
    made = grown(tmp_path, 12)
    for count in range(1, 13):
        plans.add(place, made[:count], count - 1)
    stored = plans.read(place)
    assert [plan.hash for plan in stored] == [plan.hash for plan in made]
    whole = joined(stored)
    assert [partition.index for partition in whole.partitions] == list(range(len(whole.partitions)))
    assert whole.rows == sum(5 + day for day in range(12))
    read = [(whole.files[s.file].path, *s[1:]) for p in whole.partitions for s in p.slices]
    assert read == [(m.files[s.file].path, *s[1:]) for m in made for p in m.partitions for s in p.slices]
    paths = [whole.files_of(p)[s.file].path for p in whole.partitions for s in p.slices]
    assert paths == [row[0] for row in read]


def test_a_lost_acknowledgement_of_a_plan_is_success(place: Folder, tmp_path: Path) -> None:
    (plan,) = grown(tmp_path, 1)
    store_of(place).script("create", plan_key(0), "lost")
    plans.add(place, [plan], 0)
    assert plans.read(place)[0].hash == plan.hash


def test_another_plan_in_the_same_place_or_after_it_is_refused(place: Folder, tmp_path: Path) -> None:
    first, second, third = grown(tmp_path, 3)
    plans.add(place, [first, second], 0)
    with pytest.raises(ChangedError, match=r"another run planned other inputs \(added: .*2.parquet"):
        plans.add(place, [first, third], 1)
    with pytest.raises(ChangedError, match="it has 2 plans where this run knows 1"):
        plans.add(place, [first], 1)


def test_of_two_runs_that_plan_at_once_one_is_refused(place: Folder, tmp_path: Path) -> None:
    first, second, third = grown(tmp_path, 3)
    plans.add(place, [first], 0)
    outcomes: list[type] = []

    def add(plan: Plan) -> None:
        try:
            plans.add(place, [first, plan], 1)
            outcomes.append(Plan)
        except ChangedError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=add, args=(plan,)) for plan in (second, third)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.__name__ for outcome in outcomes) == ["ChangedError", "Plan"]
    assert len(plans.read(place)) == 2
