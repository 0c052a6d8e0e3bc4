"""Single images with a verdict, and weights of rows: read by value from every kind of file, and never guessed."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import encoded, picture
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import JUDGED, PAIR, PRIOR, Reason
from pipelines.dataset.shard import write_shard
from pipelines.ingest.execution import plan_units
from pipelines.sources.labels import read_weight, verdict
from pipelines.sources.reader import reader_of
from pipelines.sources.unit import SourceFile, SourceRow, UnitSettings, make_unit

IMAGES = [encoded(picture(np.random.default_rng(i), 32, 32)) for i in range(3)]
PATHS = [f"images/{number}.jpg" for number in range(3)]


def rows_of(path: Path, format: str = "judged", **options: Any) -> list[SourceRow]:  # noqa: A002
    config = IngestConfig(sources=(SourceConfig(format=format, path=str(path), **options),))
    return [row for unit in plan_units(config) for row in reader_of(format).rows(unit)]


def text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def facts(rows: list[SourceRow]) -> list[tuple[object, ...]]:
    """Prompt, number of the image, kind, label and weight."""
    assert all(row.image_1 is None for row in rows)
    images = [IMAGES.index(row.image_0) if row.image_0 in IMAGES else row.image_0 for row in rows]
    return [
        (text(row.prompt), image, row.kind, row.label_0, row.weight) for row, image in zip(rows, images, strict=True)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, image in zip(PATHS, IMAGES, strict=True):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(image)
    return tmp_path


def as_parquet(file: Path, images: pa.Array, goods: pa.Array) -> Path:
    columns = {"prompt": ["a", "b", "c"], "prior": [None, None, True], "weight": [2, None, 0.5]}
    pq.write_table(pa.table({"image": images, "good": goods, **columns}), file)
    return file


def as_json(file: Path, good: object, bad: object, yes: object) -> Path:
    records = [
        {"image": PATHS[0], "prompt": "a", "good": good, "weight": 2},
        {"image": PATHS[1], "prompt": "b", "good": bad, "prior": None},
        {"image": PATHS[2], "prompt": "c", "prior": yes, "weight": "0.5"},
    ]
    file.write_text(json.dumps(records) if file.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return file


def as_text(file: Path, images: list[str]) -> Path:
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        writer = csv.writer(out, delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writerow(["image", "prompt", "good", "prior", "weight"])
        writer.writerows([
            [images[0], "a", "yes", "", "2"], [images[1], "b", "no", "", ""], [images[2], "c", "", "true", "0.5"]
        ])  # fmt: skip
    return file


FILES = {
    "parquet with bytes": lambda at: as_parquet(at / "x.parquet", pa.array(IMAGES), pa.array([True, False, None])),
    "parquet of the hub": lambda at: as_parquet(
        at / "x.parquet", pa.array([{"bytes": data, "path": "x.jpg"} for data in IMAGES]), pa.array([1, 0, 0])
    ),
    "parquet with paths": lambda at: as_parquet(at / "x.parquet", pa.array(PATHS), pa.array(["yes", "no", "no"])),
    "json lines": lambda at: as_json(at / "x.jsonl", True, False, True),
    "json": lambda at: as_json(at / "x.json", 1, 0, "True"),
    "csv": lambda at: as_text(at / "x.csv", PATHS),
    "tsv": lambda at: as_text(at / "x.tsv", PATHS),
    "csv with base64": lambda at: as_text(at / "x.csv", [base64.b64encode(data).decode() for data in IMAGES]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_images(folder: Path, name: str) -> None:
    assert facts(rows_of(FILES[name](folder))) == [
        ("a", 0, JUDGED, 1.0, 2.0), ("b", 1, JUDGED, 0.0, None), ("c", 2, PRIOR, 1.0, 0.5)
    ]  # fmt: skip


def test_a_tar_has_them_too_if_it_is_named(tmp_path: Path) -> None:
    members = [("a.jpg", IMAGES[0]), ("a.txt", b"a cat"), ("a.json", b'{"good": false, "weight": 3}')]
    write_shard(tmp_path / "x.tar", members)
    assert facts(rows_of(tmp_path / "x.tar")) == [("a cat", 0, JUDGED, 0.0, 3.0)]


YES = (True, 1, 1.0, "1", "1.0", "true", "True", " TRUE ", "yes", "good", b"true", b"1")
NO = (False, 0, 0.0, "0", "0.0", "false", "False", "no", " No", "bad", b"false", b"0")
MISSING = (None, "", "  ", b"")
UNREADABLE = (2, -1, 0.5, float("nan"), "t", "y", "on", "good?", "nan", [], [True], {"good": True}, b"\xff")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [(YES, True), (NO, False), (MISSING, Reason.MISSING_LABEL), (UNREADABLE, Reason.UNREADABLE_LABEL)],
    ids=str,
)
def test_a_verdict_is_true_or_false_or_a_reason(values: tuple[object, ...], wanted: bool | Reason) -> None:
    assert [verdict(value) for value in values] == [wanted] * len(values)


def test_good_and_prior_decide_kind_and_label(folder: Path) -> None:
    cells: list[tuple[dict[str, object], str, float | Reason]] = [
        ({"good": True}, JUDGED, 1.0),
        ({"good": True, "prior": False}, JUDGED, 1.0),
        ({"good": False, "prior": "no"}, JUDGED, 0.0),
        ({"prior": True}, PRIOR, 1.0),
        ({"prior": True, "good": False}, PRIOR, 1.0),
        ({"prior": True, "good": "?"}, PRIOR, 1.0),
        ({"prior": False}, JUDGED, Reason.MISSING_LABEL),
        ({}, JUDGED, Reason.MISSING_LABEL),
        ({"good": "?"}, JUDGED, Reason.UNREADABLE_LABEL),
        ({"good": True, "prior": "?"}, JUDGED, Reason.UNREADABLE_LABEL),
    ]
    lines = [json.dumps({"image": PATHS[0], "prompt": "a", **given}) for given, *_ in cells]
    (folder / "x.jsonl").write_text("\n".join([*lines, "broken"]))
    *rows, broken = rows_of(folder / "x.jsonl")
    assert [(row.kind, row.label_0) for row in rows] == [(kind, label) for _, kind, label in cells]
    assert (broken.kind, broken.prompt) == (JUDGED, Reason.UNREADABLE_ROW)


@given(st.one_of(st.floats(), st.integers(), st.decimals(), st.text(), st.booleans(), st.none(), st.binary()))
def test_a_weight_is_a_finite_number_above_0_or_a_reason(value: object) -> None:
    found = read_weight(value)
    if isinstance(found, float):
        assert 0 < found < float("inf")
        assert found == float(value.decode() if isinstance(value, bytes) else value)  # type: ignore[arg-type]
    else:
        assert found in (None, Reason.UNREADABLE_WEIGHT)
    assert (found is None) == (value is None or (isinstance(value, str | bytes) and not text_or_empty(value).strip()))


def text_or_empty(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def test_every_kind_of_source_has_weights(folder: Path, tmp_path: Path) -> None:
    def json_file(name: str, *records: object) -> Path:
        (folder / name).write_text("\n".join(map(json.dumps, records)))
        return folder / name

    def weights(rows: list[SourceRow]) -> list[tuple[str, object]]:
        return [(row.kind, row.weight) for row in rows]

    table = {"caption": ["a"] * 3, "jpg_0": [IMAGES[0]] * 3, "jpg_1": [IMAGES[1]] * 3, "label_0": [1, 1, 1]}
    pq.write_table(pa.table({**table, "label_1": [0, 0, 0], "weight": ["1.5", None, "-1"]}), folder / "p.parquet")
    assert weights(rows_of(folder / "p.parquet", "pickapic")) == [
        (PAIR, 1.5), (PAIR, None), (PAIR, Reason.UNREADABLE_WEIGHT)
    ]  # fmt: skip
    members = [("a.0.jpg", IMAGES[0]), ("a.1.jpg", IMAGES[1]), ("a.label_0.txt", b"1"), ("a.weight.txt", b"0.25")]
    write_shard(folder / "w.tar", [*members, ("a.txt", b"a cat")])
    assert weights(rows_of(folder / "w.tar", "webdataset")) == [(PAIR, 0.25)]
    pair = {"prompt": "a", "image_0": PATHS[0], "image_1": PATHS[1], "label_0": 1}
    mapped = rows_of(json_file("m.jsonl", pair | {"w": 3, "weight": 7}), "jsonl", columns={"weight": "w"})
    assert weights(mapped) == [(PAIR, 3.0)]
    ranked = {"prompt": "a", "file_path": PATHS, "rank": [1, 2, 3], "weight": 2}
    assert weights(rows_of(json_file("h.jsonl", ranked), "hpd")) == [(PAIR, 2.0)] * 3
    ranked = {"prompt": "a", "prompt_id": "1", "image": PATHS, "rank": [1, 2, 3], "weight": 2}
    assert weights(rows_of(json_file("i.jsonl", ranked), "imagereward")) == [(PAIR, 2.0)] * 3
    voted = {"prompt": "a", "image1": PATHS[0], "image2": PATHS[1], "votes_image1": 3, "votes_image2": 1, "weight": 4}
    assert weights(rows_of(json_file("r.jsonl", voted), "rapidata")) == [(PAIR, 4.0)]


def test_a_text_table_spoils_only_the_row_that_is_odd(folder: Path) -> None:
    lines = [
        b"\xef\xbb\xbfimage,prompt,good",
        b'images/0.jpg,"two ""lines""\nof a prompt, with a comma",1',
        b"",
        b"images/1.jpg,too few",
        b"images/1.jpg,too many,1,2",
        b"images/1.jpg,caf\xe9,1",
        b"images/2.jpg,,1",
    ]
    (folder / "x.csv").write_bytes(b"\r\n".join(lines))
    rows = rows_of(folder / "x.csv")
    assert [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert (rows[0].prompt, rows[0].image_0) == ('two "lines"\nof a prompt, with a comma', IMAGES[0])
    assert [row.prompt for row in rows[1:3]] == [Reason.UNREADABLE_ROW] * 2
    assert (rows[3].prompt, rows[3].image_0) == ("caf\udce9", IMAGES[1]), "a lone surrogate: no text"
    assert rows[4].prompt is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,prompt,good,image\n", r"x\.csv has the column image twice"),
        ('image,prompt,good\nx,"open,1\n', r"x\.csv: not a valid table: unexpected end of data"),
        ("image,prompt\n", r"x\.csv has neither `good` nor `prior`; its columns are image, prompt"),
        ("prompt,good\n", r"x\.csv has no column image; its columns are good, prompt"),
        ("", r"x\.csv has no column image; its columns are "),
    ],
)
def test_a_text_table_that_cannot_be_read_is_named(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(SourceError, match=message):
        rows_of(tmp_path / "x.csv")


def test_a_text_table_may_hold_large_images_and_is_cut_into_units_of_a_thousand(tmp_path: Path) -> None:
    image = base64.b64encode(np.random.default_rng(0).bytes(200_000)).decode()
    table = "image,prompt,good\n" + f"data:image/png;base64,{image},a,1\n" + "x.png,b,0\n" * 1_999
    (tmp_path / "x.csv").write_text(
        table.replace("data:image/png;base64,", '"data:image/png;base64,').replace("=,a,", '=",a,')
    )
    units = plan_units(IngestConfig(sources=(SourceConfig(format="judged", path=str(tmp_path / "x.csv")),)))
    assert [(unit.part, unit.first_row) for unit in units] == [((0, 1000), 0), ((1000, 2000), 1000)]
    first = next(iter(reader_of("judged").rows(units[0])))
    assert (first.image_0, first.prompt) == (base64.b64decode(image), "a")
    assert next(iter(reader_of("judged").rows(units[1]))).row == 1000


def test_text_tables_in_a_folder_are_read_by_judged_alone(folder: Path) -> None:
    as_text(folder / "verdicts.csv", PATHS)
    assert len(rows_of(folder)) == 3
    pair = {"prompt": "a", "chosen": PATHS[0], "rejected": PATHS[1]}
    (folder / "pairs.json").write_text(json.dumps([pair]))
    assert len(rows_of(folder, "pairs")) == 1, "the table beside it only describes the images"
    (folder / "pairs.csv").write_text(f"prompt,chosen,rejected\nb,{PATHS[0]},{PATHS[1]}\n")
    (named,) = rows_of(folder / "pairs.csv", "pairs")
    assert (named.prompt, named.image_0, named.image_1, named.label_0) == ("b", IMAGES[0], IMAGES[1], 1.0)


UNITS = {
    "pickapic": ({}, "f7ef948d2deaaae8392cacf3a400ad39"),
    "pairs": ({"columns": {"chosen": "good"}, "split": "train"}, "ba3f84ac3c9eaf60f02768fb7bd09def"),
    "jsonl": ({"images": "s3://bucket/images"}, "ec006f858c8c6054069cbf08ecb627ec"),
    "webdataset": ({}, "fe50e1a96176f9db6a6335f5d80e1647"),
    "hpd": ({"split": "hash"}, "7b39a96e85a814d10106478511437764"),
    "imagereward": ({}, "9f19d9095011431ef4f751d47a09ea52"),
    "rapidata": ({"allow_urls": True}, "11c78585da297da450d52255163313d7"),
}
"""Options of a source and the id of a unit, recorded before there were single images and weights."""


@pytest.mark.parametrize("name", UNITS)
def test_units_of_sources_of_before_have_the_ids_of_before(name: str) -> None:
    options, identity = UNITS[name]
    source = SourceConfig(format=name, path="x", **options)
    file, settings = SourceFile("s3://bucket/data.parquet", 1000, "etag"), UnitSettings(268_435_456, "full")
    assert make_unit(source, file, settings, part=(0, 3), first_row=0, num_rows=9).id == identity


def test_a_column_of_weights_does_not_move_the_cuts_between_units(tmp_path: Path) -> None:
    """Before there were weights it was not read, and row groups are gathered by the size of what is read."""
    data = [np.random.default_rng(i).bytes(30_000) for i in range(12)]
    table = pa.table({"prompt": ["a"] * 12, "chosen": data, "rejected": data})
    cuts = []
    for name, columns in (("without", {}), ("with", {"weight": np.random.default_rng(0).random(12) + 1})):
        for column, values in columns.items():
            table = table.append_column(column, pa.array(values))
        file = tmp_path / f"{name}.parquet"
        pq.write_table(table, file, row_group_size=1, compression="none")
        group = pq.read_metadata(file).row_group(0)
        size = sum(group.column(i).total_compressed_size for i in range(3))
        config = IngestConfig(sources=(SourceConfig(format="pairs", path=str(file)),), max_shard_bytes=3 * size)
        cuts.append([unit.part for unit in plan_units(config)])
    assert cuts[0] == cuts[1] == [(0, 3), (3, 6), (6, 9), (9, 12)]
