"""How many JSON Schemas of a collection answers can be kept to, and whether any is taken for what it is not.

    python -m tests.measure.schemas FOLDER

FOLDER holds files {"schema": ..., "tests": [{"valid": true, "data": ...}, ...]} at any depth, as MaskBench has them
(https://github.com/guidance-ai/jsonschemabench, Geng et al., 2025, folder maskbench/data). Of each schema that is
taken, no document that the collection calls invalid may be written; how many of the valid ones can be is told.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from batchrun.errors import JobError
from batchrun.structured.answer_format import answer_format

# Of one schema.
LIMIT_SECONDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _too_slow)
    for path in sorted(parser.parse_args().folder.rglob("*.json")):
        found = json.loads(path.read_text())
        signal.alarm(LIMIT_SECONDS)
        try:
            kind = look(found["schema"], found.get("tests", []), documents, path.name)
        except JobError as error:
            kind = "refused"
            reasons[re.sub(r"'[^']*'|\d+", "…", error.what)] += 1
        except TimeoutError:
            kind = f"refused: not built in {LIMIT_SECONDS} s"
        finally:
            signal.alarm(0)
        kinds[kind] += 1
    print(f"{kinds.total():,} schemas: {dict(kinds.most_common())}")
    print(f"documents of those that are taken: {dict(documents.most_common())}")
    for reason, count in reasons.most_common(20):
        print(f"  {count:5,} {reason}")


def look(schema: Any, tests: list[dict[str, Any]], documents: Counter[str], name: str) -> str:
    """Whether the schema is whole or recursive; raises JobError where it is refused."""
    wanted = answer_format(schema=schema)
    assert wanted is not None
    automaton = wanted.automaton
    for test in tests:
        is_written = automaton.matches(json.dumps(test["data"], ensure_ascii=False).encode())
        documents[
            f"{'valid' if test['valid'] else 'invalid'}, {'written' if is_written else 'not written'}"
        ] += 1
        if is_written and not test["valid"]:
            print(f"WRONG: {name} takes {json.dumps(test['data'])[:200]}")
    return "on the device" if wanted.levels is None else "on the device, recursive"


def _too_slow(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main()
