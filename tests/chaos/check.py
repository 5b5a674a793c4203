"""What must hold, looked at past batchrun's own code: boto3 and pyarrow on the store itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ANSWERS = ["answer", "finish_reason", "prompt_tokens", "output_tokens", "status", "error"]


class Violation(AssertionError):
    """batchrun broke a promise."""


class Watcher:
    """Holds every object that ever appears in data/ against the input rows that its partition has."""

    def __init__(self, client: Any, bucket: str, prefix: str, expected: pa.Table, rows: int) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix
        self.expected, self.rows = expected, rows
        self.seen: dict[str, str] = {}

    def look(self) -> None:
        """Reads what is new since the last look.

        Raises:
            Violation: a part that is not exactly its partition's rows, or one that vanished.
        """
        there = self._list("data/")
        for key in self.seen:
            if key not in there:
                raise Violation(f"{key} was there and is gone")
        for key, tag in there.items():
            if self.seen.get(key) != tag:
                self._check(key, self._read(key))
                self.seen[key] = tag

    def finish(self) -> None:
        """The union of the parts is the input, each row once and in order, and the manifest says so.

        Raises:
            Violation: it is not.
        """
        self.look()
        tables = [pq.read_table(pa.BufferReader(self._read(key))) for key in sorted(self.seen)]
        union = pa.concat_tables(tables)
        if not union.select(self.expected.column_names).equals(self.expected):
            raise Violation(f"the output's {union.num_rows} rows are not the input's {len(self.expected)}")
        manifest = json.loads(self._read("_job/manifest.json"))
        counts = (manifest["rows"], manifest["ok"], manifest["failed"], len(manifest["parts"]))
        if counts != (union.num_rows, union.num_rows, 0, len(tables)):
            raise Violation(f"the manifest counts {counts}")

    def _check(self, key: str, data: bytes) -> None:
        match = re.fullmatch(r"data/part-(\d{5})-[0-9a-f]{8}\.parquet", key)
        if match is None:
            raise Violation(f"{key} is no name of a part")
        wanted = self.expected.slice(int(match[1]) * self.rows, self.rows)
        table = pq.read_table(pa.BufferReader(data))
        if table.column_names != [*wanted.column_names, *ANSWERS]:
            raise Violation(f"{key} has columns {table.column_names}")
        if not table.select(wanted.column_names).equals(wanted):
            raise Violation(f"{key} holds other rows than its partition's")
        if table["answer"].to_pylist() != wanted["text"].to_pylist():
            raise Violation(f"{key} holds other rows' answers")
        if set(table["status"].to_pylist()) != {"ok"}:
            raise Violation(f"{key} holds failed rows")

    def _list(self, folder: str) -> dict[str, str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}/{folder}"
        )
        start = len(self.prefix) + 1
        return {o["Key"][start:]: o["ETag"] for page in pages for o in page.get("Contents", [])}

    def _read(self, key: str) -> bytes:
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")
        except self.client.exceptions.NoSuchKey:
            raise Violation(f"{key} is missing") from None
        return bytes(answer["Body"].read())
