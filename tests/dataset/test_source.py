"""What the input's footers must be, and how every fault in them is told at once."""

from __future__ import annotations

import base64
import errno
import gzip
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from tiny import plan_of, rows_of, write

from batchrun.dataset import location, source
from batchrun.dataset.plan import Plan, carried_columns, check_output_names
from batchrun.dataset.source import parse_type, read_source
from batchrun.errors import ExitCode, InputError, OutputError, StorageError
from batchrun.job.output import OutputSettings
from batchrun.job.settings import InputSettings
from batchrun.output.part import part_schema


def source_of(*paths: Path, needed: tuple[str, ...] = (), **settings: object):
    return read_source(InputSettings(path=[str(p) for p in paths], **settings), needed)


@pytest.fixture
def with_bad_files(tmp_path: Path) -> Path:
    good = write(tmp_path / "good.parquet", {"text": ["a", "b"]})
    whole = good.read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(whole[:-20])
    (tmp_path / "headless.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "page.parquet").write_text("<!DOCTYPE html><html><body>503 Service Unavailable</body></html>")
    (tmp_path / "short.parquet").write_text("hi")
    return tmp_path


def test_every_bad_file_is_named_at_once(with_bad_files: Path) -> None:
    with pytest.raises(InputError) as caught:
        source_of(with_bad_files)
    message = str(caught.value)
    for name in ("truncated", "headless", "empty", "page", "short"):
        assert f"{name}.parquet" in message
    assert "good.parquet" not in message
    assert "5 of 6 files" in message
    assert "skip_bad_files" in message
    assert "\n" not in message


def test_bad_files_that_are_skipped_are_recorded_in_the_plan(with_bad_files: Path) -> None:
    plan = plan_of(InputSettings(path=str(with_bad_files), skip_bad_files=True))
    assert plan.rows == 2
    assert sorted(Path(s.path).stem for s in plan.skipped) == [
        "empty",
        "headless",
        "page",
        "short",
        "truncated",
    ]
    assert all(s.reason for s in plan.skipped)


def test_bad_files_alone_are_no_dataset_even_when_skipped(with_bad_files: Path) -> None:
    with pytest.raises(InputError, match=r"1 of 1 files"):
        source_of(with_bad_files / "empty.parquet", skip_bad_files=True)


def test_a_type_that_differs_is_shown_with_files_and_both_types(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": pa.array([1], pa.int64())})
    write(tmp_path / "b.parquet", {"n": pa.array(["1"], pa.string())})
    with pytest.raises(InputError) as caught:
        source_of(tmp_path)
    for part in ("'n'", "int64", "a.parquet", "string", "b.parquet", "input.cast"):
        assert part in str(caught.value)


def test_a_cast_accepts_a_type_that_differs(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": pa.array([1, None], pa.int64())})
    write(tmp_path / "b.parquet", {"n": pa.array(["x"], pa.string())})
    settings = InputSettings(path=str(tmp_path), cast={"n": "string"})
    plan = plan_of(settings)
    assert plan.schema.field("n").type == pa.string()
    assert rows_of(plan, settings)["n"].to_pylist() == ["1", None, "x"]


def test_a_cast_that_cannot_be_is_found_while_planning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"n": [[1]], "m": [1]})
    with pytest.raises(InputError, match="'strnig' is not a type"):
        source_of(path, cast={"m": "strnig"})
    with pytest.raises(InputError, match=r"'n' is list.* in .*a\.parquet, which cannot be cast to int64"):
        source_of(path, cast={"n": "int64"})
    with pytest.raises(InputError, match="no input file has a column 'o'"):
        source_of(path, cast={"o": "int64"})


def test_a_value_that_a_cast_would_change_is_refused_not_changed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": [1.0, 1.5]})
    settings = InputSettings(path=str(tmp_path), cast={"n": "int64"})
    with pytest.raises(InputError, match=r"a\.parquet, row group 0: column 'n' cannot be cast to int64"):
        rows_of(plan_of(settings), settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("string", pa.string()),
        ("timestamp[us, tz=Europe/Berlin]", pa.timestamp("us", "Europe/Berlin")),
        ("decimal128(10, 2)", pa.decimal128(10, 2)),
        ("list<string>", pa.list_(pa.string())),
        ("list<item: list<int8>>", pa.list_(pa.list_(pa.int8()))),
    ],
)
def test_a_cast_names_types_as_pyarrow_prints_them(name: str, expected: pa.DataType) -> None:
    assert parse_type(name) == expected


def test_a_needed_column_missing_in_one_file_is_never_silently_null(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"], "id": [1]})
    write(tmp_path / "b.parquet", {"id": [2]})
    with pytest.raises(InputError, match=r"missing: 'text' in .*b\.parquet"):
        source_of(tmp_path, needed=("text",))
    with pytest.raises(InputError, match="no input file has a column 'txt', did you mean 'text'"):
        source_of(tmp_path, needed=("txt",))


def test_a_carried_column_missing_in_one_file_is_null_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"], "id": [1]})
    write(tmp_path / "b.parquet", {"text": ["y"]})
    settings = InputSettings(path=str(tmp_path))
    assert rows_of(plan_of(settings, needed=("text",)), settings)["id"].to_pylist() == [1, None]


def test_duplicate_column_names_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "b", "a"])
    write(tmp_path / "twice.parquet", table)
    with pytest.raises(InputError, match=r"appear twice: 'a' in .*twice\.parquet"):
        source_of(tmp_path)


def test_an_output_name_that_an_input_column_has_is_refused_with_another(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"], "answer": ["y"], "answer_2": ["z"]})
    settings = InputSettings(path=str(tmp_path))
    carried = carried_columns(settings, plan_of(settings).schema)
    with pytest.raises(OutputError, match=r"'answer' .* is taken; set output.columns: \{answer: answer_3\}"):
        check_output_names(carried, OutputSettings(path="o"))
    check_output_names(carried, OutputSettings(path="o", columns={"answer": "answer_3"}))
    with pytest.raises(OutputError, match="'same' of the error column is taken"):
        check_output_names(["text"], OutputSettings(path="o", columns={"status": "same", "error": "same"}))


def test_a_path_that_matches_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x"]})
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "b.parquet", tmp_path / "*.csv", tmp_path / "folder"):
        with pytest.raises(InputError, match="no file matches"):
            source_of(tmp_path / "a.parquet", path)


def test_folders_globs_and_lists_name_each_file_once_in_order(tmp_path: Path) -> None:
    for name in (
        "b.parquet",
        "a.parquet",
        "deep/er/c.parquet",
        "_x.parquet",
        ".y.parquet",
        "_z/d.parquet",
        "n.txt",
    ):
        write(tmp_path / name, {"text": ["x"]})
    expected = [str(tmp_path / n) for n in ("a.parquet", "b.parquet", "deep/er/c.parquet")]
    paths = [tmp_path, tmp_path / "*.parquet", tmp_path / "b.parquet", tmp_path / "deep", tmp_path / "d*"]
    assert [f.path for f in source_of(*paths).files] == expected
    assert [f.path for f in source_of(*reversed(paths)).files] == expected
    assert [f.path for f in source_of(tmp_path / "_x.parquet").files] == [str(tmp_path / "_x.parquet")]


def test_a_name_with_glob_characters_in_it_is_found_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1]" / "a b?.parquet", {"text": ["x"]})
    assert [f.path for f in source_of(path).files] == [str(path)]
    assert [f.path for f in source_of(path.parent).files] == [str(path)]


def test_any_fsspec_url_is_read_like_a_local_path(tmp_path: Path) -> None:
    local = write(tmp_path / "a.parquet", {"text": ["x", "y"]})
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/in/a.parquet", local.read_bytes())
    fs.pipe("/bucket/in/_tmp/b.parquet", b"")
    for path in ("memory://bucket/in", "memory://bucket/in/*.parquet", "memory://bucket/in/a.parquet"):
        settings = InputSettings(path=path, filters=[["text", "=", "y"]])
        plan = plan_of(settings)
        assert [f.path for f in plan.files] == ["memory:///bucket/in/a.parquet"]
        assert rows_of(plan, settings)["text"].to_pylist() == ["y"]


def test_an_unknown_protocol_is_told_with_its_fix() -> None:
    with pytest.raises(InputError, match=r"nosuch://a/b: no protocol nosuch://.*install"):
        read_source(InputSettings(path="nosuch://a/b"), ())


def test_types_stay_as_they_are_and_every_column_may_be_null(tmp_path: Path) -> None:
    schema = pa.schema(
        [pa.field("id", pa.int64(), nullable=False, metadata={"a": "b"}), pa.field("t", pa.large_string())]
    )
    pq.write_table(pa.table({"id": [1], "t": ["x"]}, schema=schema), tmp_path / "a.parquet")
    assert source_of(tmp_path).schema == pa.schema([("id", pa.int64()), ("t", pa.large_string())])
    assert source_of(tmp_path, columns=["t"], needed=("id",)).schema.names == ["t", "id"]


def test_a_column_without_any_value_fits_the_type_it_has_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": pa.nulls(2), "id": [1, 2]})
    write(tmp_path / "b.parquet", {"n": pa.array([5], pa.int32()), "id": [3]})
    settings = InputSettings(path=str(tmp_path))
    table = rows_of(plan_of(settings, needed=("n",)), settings)
    assert (table["n"].type, table["n"].to_pylist()) == (pa.int32(), [None, None, 5])


def test_a_store_that_is_busy_while_planning_is_asked_again(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    calls = {"list": 0, "open": 0}

    def sometimes(name, real):
        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] <= 2:
                raise OSError(errno.EBUSY, "Service Unavailable")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(location, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(location, "_list", sometimes("list", location._list))
    monkeypatch.setattr(source, "read_footer", sometimes("open", source.read_footer))
    found = source_of(tmp_path, needed=("text",))
    assert [file.group_rows for file in found.files] == [(2,)]
    assert calls == {"list": 3, "open": 3}


def test_a_store_that_stays_busy_while_planning_interrupts_the_run(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "Service Unavailable")

    monkeypatch.setattr(location, "PATIENCE", 0.0)
    monkeypatch.setattr(location, "_list", busy)
    with pytest.raises(StorageError, match="kept failing") as caught:
        source_of(tmp_path, needed=("text",))
    assert caught.value.exit_code == ExitCode.INTERRUPTED


@pytest.mark.parametrize("name", ["Answer", "STATUS", "output_Tokens"])
def test_a_carried_column_that_differs_from_an_answers_in_case_alone_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match=rf"is taken by '{name}', which SQL engines take for the same"):
        check_output_names(["text", name], OutputSettings(path="out"))
    check_output_names(["text", name], OutputSettings(path="out", columns={name.lower(): "other"}))


def test_metadata_of_schema_and_fields_and_unknown_extension_types_are_kept(tmp_path: Path) -> None:
    extension = {b"ARROW:extension:name": b"acme.point", b"ARROW:extension:metadata": b"v1"}
    fields = [
        pa.field("text", pa.string(), metadata={b"unit": b"words"}),
        pa.field("p", pa.int32(), metadata=extension),
    ]
    schema = pa.schema(fields, metadata={b"owner": b"data team"})
    write(tmp_path / "a.parquet", pa.table({"text": ["x"], "p": pa.array([1], pa.int32())}, schema=schema))
    settings = InputSettings(path=str(tmp_path))
    plan = Plan.from_parquet(plan_of(settings).to_parquet())
    carried = part_schema(rows_of(plan, settings).schema, OutputSettings(path="out"))
    for made in (plan.schema, carried):
        assert made.metadata[b"owner"] == b"data team"
        assert made.field("text").metadata[b"unit"] == b"words"
        assert extension.items() <= made.field("p").metadata.items()


class Kms(encryption.KmsClient):
    """Keeps keys as they are: only whether a file is encrypted matters here."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
        return base64.b64decode(wrapped)


@pytest.mark.parametrize(("plain_footer", "says"), [(True, "has encrypted columns"), (False, "encrypted")])
def test_a_file_with_encrypted_columns_is_refused_when_planning(
    tmp_path: Path, plain_footer: bool, says: str
) -> None:
    table = pa.table({"text": ["x"], "secret": [1]})
    how = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["secret"]}, plaintext_footer=plain_footer
    )
    properties = encryption.CryptoFactory(Kms).file_encryption_properties(
        encryption.KmsConnectionConfig(), how
    )
    write(tmp_path / "a.parquet", table, encryption_properties=properties)
    with pytest.raises(InputError, match=says):
        source_of(tmp_path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.csv.gz"])
def test_the_line_that_an_error_prints_makes_parquet_of_text(tmp_path: Path, name: str) -> None:
    text = b'{"text": "a"}\n{"text": "b"}\n' if "json" in name else b"text,n\na,1\nb,2\n"
    text = text.replace(b",", b"\t") if "tsv" in name else text
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match="is not Parquet") as caught:
            source_of(path)
    line = caught.value.fix.removeprefix("convert it with: ")
    assert "\n" not in line
    # The person's own python is this one.
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True)
    assert source_of(tmp_path).files[0].rows == 2


def test_text_on_a_store_is_converted_by_duckdb() -> None:
    error = location.conversion("s3://lake/rows.jsonl")
    assert error is not None
    line = "duckdb -c \"COPY (FROM 's3://lake/rows.jsonl') TO 's3://lake/rows.parquet'\""
    assert str(error).endswith(line)
