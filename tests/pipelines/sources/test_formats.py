"""Formats: data with the published schema of each source gives the pairs that its card promises."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import encoded, photo_pairs, picture, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.errors import SourceError
from pipelines.dataset.pair import Reason
from pipelines.dataset.shard import write_shard
from pipelines.dataset.storage import Storage
from pipelines.ingest.execution import plan_units
from pipelines.sources.cells import Cells
from pipelines.sources.files import list_files, split_called, split_of_file
from pipelines.sources.kind import SPLIT, WEIGHT
from pipelines.sources.labels import from_labels, from_ranks, from_votes
from pipelines.sources.reader import reader_of
from pipelines.sources.registry import KINDS
from pipelines.sources.unit import SourceRow

IMAGES = [encoded(picture(np.random.default_rng(i), 32, 32)) for i in range(4)]
Label = float | Reason


def rows_of(path: Path, format: str, **options: Any) -> list[SourceRow]:  # noqa: A002
    config = IngestConfig(sources=(SourceConfig(format=format, path=str(path), **options),))  # type: ignore[arg-type]
    return [row for unit in plan_units(config) for row in reader_of(format).rows(unit)]


def facts(rows: list[SourceRow]) -> list[tuple[int, int, Any, Any, Any, Label]]:
    """Row, pair, prompt, and each image as its number in IMAGES."""

    def named(image: object) -> object:
        return IMAGES.index(image) if image in IMAGES else image

    return [(r.row, r.pair, r.prompt, named(r.image_0), named(r.image_1), r.label_0) for r in rows]


def write_json(file: Path, records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records) if file.name.endswith((".json", ".json.gz")) else "\n".join(map(json.dumps, records))  # type: ignore[call-overload]
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images as files."""
    for number, image in enumerate(IMAGES):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image)
    return tmp_path


PATHS = [f"images/{number}.jpg" for number in range(4)]


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string()], ids=str)
def test_pickapic_with_all_its_columns_and_integer_or_text_labels(tmp_path: Path, kind: pa.DataType) -> None:
    labels = ["1", "0"] if kind == pa.string() else [1, 0]
    table = pa.table(
        {
            "are_different": [True, True], "best_image_uid": ["a", "b"], "caption": ["x", "y"],
            "created_at": pa.array([0, 0], pa.timestamp("ns")), "has_label": [True, True],
            "image_0_uid": ["a", "c"], "image_0_url": ["", ""], "image_1_uid": ["d", "b"], "image_1_url": ["", ""],
            "jpg_0": [IMAGES[0], IMAGES[1]], "jpg_1": [IMAGES[2], IMAGES[3]],
            "label_0": pa.array(labels).cast(kind), "label_1": pa.array(labels[::-1]).cast(kind),
            "model_0": ["", ""], "model_1": ["", ""], "ranking_id": [1, 2], "user_id": [7, 8],
            "num_example_per_prompt": [1, 1], "__index_level_0__": [0, 1],
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "test_unique-00000-of-00001.parquet")
    rows = rows_of(tmp_path, "pickapic")
    assert facts(rows) == [(0, 0, b"x", 0, 2, 1.0), (1, 0, b"y", 1, 3, 0.0)]
    assert [(row.user_id, row.split) for row in rows] == [("7", "test"), ("8", "test")]


def test_a_tar_mirror_gives_what_its_parts_say(tmp_path: Path) -> None:
    def sample(key: str, caption: str, label_0: str, label_1: str) -> list[tuple[str, bytes]]:
        parts = {caption: b"a cat", "jpg_0.jpg": IMAGES[0], "jpg_1.jpg": IMAGES[1]}
        return [(f"{key}.{name}", data) for name, data in parts.items()] + [
            (f"{key}.label_0.txt", label_0.encode()), (f"{key}.label_1.txt", label_1.encode())
        ]  # fmt: skip

    members = sample("a/1", "caption.txt", "1.0", "0.0") + sample("a/2", "original_prompt.txt", "0.5", "0.5")
    write_tar(tmp_path / "00000.tar", members + sample("b/1", "caption.txt", "x", "y"))
    assert facts(rows_of(tmp_path, "webdataset")) == [
        (0, 0, b"a cat", 0, 1, 1.0),
        (1, 0, b"a cat", 0, 1, 0.5),
        (2, 0, b"a cat", 0, 1, Reason.UNREADABLE_LABEL),
    ]


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    record = json.dumps({"prompt": "a cat", "label_0": 0.25, "pair_key": "k"}).encode()
    write_tar(tmp_path / "x.tar", [("k.0.jpg", IMAGES[2]), ("k.1.png", IMAGES[3]), ("k.json", record)])
    assert facts(rows_of(tmp_path / "x.tar", "webdataset")) == [(0, 0, "a cat", 2, 3, 0.25)]


@pytest.mark.parametrize("name", ["train.json", "train.json.gz", "train.jsonl", "train.jsonl.gz"])
def test_hpd_v2_training_votes_and_test_ranks(folder: Path, name: str) -> None:
    write_json(
        folder / name,
        [
            {"prompt": "a", "file_path": PATHS[:2], "human_preference": [0, 1], "user_hash": "u"},
            {"prompt": "b", "image_path": PATHS[:3], "rank": [2, 1, 2], "raw_annotations": []},
        ],
    )
    rows = rows_of(folder / name, "hpd")
    assert facts(rows) == [
        (0, 0, "a", 0, 1, 0.0), (1, 0, "b", 0, 1, 0.0), (1, 1, "b", 0, 2, 0.5), (1, 2, "b", 1, 2, 1.0),
    ]  # fmt: skip
    assert (rows[0].user_id, rows[0].split) == ("u", "train")


def test_hpd_v3_prefers_the_first_path_and_takes_votes_where_there_are_any(folder: Path) -> None:
    record = {"prompt": "a", "path1": PATHS[0], "path2": PATHS[1], "confidence": 0.9, "model1": "x", "model2": "y"}
    dists: list[Any] = [None, [9, 1], [0, 0], "x"]
    write_json(folder / "all.json", [record | {"choice_dist": dist} for dist in dists])
    labels = [1.0, 0.9, Reason.MISSING_LABEL, Reason.UNREADABLE_LABEL]
    assert [row.label_0 for row in rows_of(folder / "all.json", "hpd")] == labels


def test_imagereward_ranks_give_every_pair_once_in_all_three_shapes(folder: Path) -> None:
    wanted = [(0, 0, 0, 1, 0.0), (0, 1, 0, 2, 0.5), (0, 2, 1, 2, 1.0)]
    single = [
        {"image_path": PATHS[i], "prompt_id": "p", "prompt": "a", "classification": "x", "rank": rank,
         "image_amount_in_total": 3, "overall_rating": 5}
        for i, rank in enumerate([2, 1, 2])
    ]  # fmt: skip
    other = [single[0] | {"prompt_id": "q", "prompt": "b"}, single[1] | {"prompt_id": "q", "prompt": "b"}]
    write_json(folder / "single.json", single + other)
    group = {"prompt_id": "p", "prompt": "a", "image": PATHS[:3], "rank": [2, 1, 2]}
    write_json(folder / "group.json", [group])
    found = facts(rows_of(folder / "single.json", "imagereward"))
    assert [(r, n, i, j, label) for r, n, _, i, j, label in found] == [*wanted, (3, 0, 0, 1, 0.0)]
    assert [
        (r, n, i, j, label) for r, n, _, i, j, label in facts(rows_of(folder / "group.json", "imagereward"))
    ] == wanted
    better = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pairs = pa.table(
        {
            "prompt_id": ["p"], "prompt": ["a"], "classification": ["x"],
            "img_better": pa.array([{"bytes": IMAGES[3], "path": "3.jpg"}], better),
            "img_worse": pa.array([{"bytes": None, "path": PATHS[0]}], better),
        }
    )  # fmt: skip
    pq.write_table(pairs, folder / "pair.parquet")
    assert facts(rows_of(folder / "pair.parquet", "imagereward")) == [(0, 0, b"a", 3, 0, 1.0)]


def test_a_group_of_ranked_images_is_never_cut(folder: Path) -> None:
    records = [
        {"image_path": PATHS[i % 4], "prompt_id": str(i // 7), "prompt": str(i // 7), "rank": i % 7 + 1}
        for i in range(7 * 300)
    ]
    write_json(folder / "many.jsonl", records)
    config = IngestConfig(sources=(SourceConfig(format="imagereward", path=str(folder / "many.jsonl")),))
    units = plan_units(config)
    assert len(units) == 3
    assert all((stop - start) % 7 == 0 for start, stop in (unit.part for unit in units))
    assert sum(unit.num_rows for unit in units) == len(records)


def test_rapidata_votes_become_a_share(folder: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table(
            {
                "prompt": ["a"] * 4,
                "image1": pa.array([{"bytes": IMAGES[0], "path": None}] * 4, image),
                "image2": pa.array([{"bytes": IMAGES[1], "path": None}] * 4, image),
                "votes_image1": pa.array([3, 0, 0, None], pa.int64()),
                "votes_image2": pa.array([1, 5, 0, 2], pa.int64()),
                "model1": ["x"] * 4, "model2": ["y"] * 4, "detailed_results": ["[]"] * 4,
            }
        ),
        folder / "rapidata.parquet",
    )  # fmt: skip
    labels = [row.label_0 for row in rows_of(folder / "rapidata.parquet", "rapidata")]
    assert labels == [0.75, 0.0, Reason.MISSING_LABEL, Reason.MISSING_LABEL]


def test_pairs_take_chosen_and_rejected_or_a_column_map(folder: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    chosen, rejected = ({"bytes": IMAGES[i], "path": f"{i}.png"} for i in (1, 2))
    named = {"prompt": ["a"], "chosen": pa.array([chosen], image), "rejected": pa.array([rejected], image)}
    pq.write_table(pa.table(named), folder / "open.parquet")
    assert facts(rows_of(folder / "open.parquet", "pairs")) == [(0, 0, b"a", 1, 2, 1.0)]
    write_json(folder / "own.jsonl", [{"text": "b", "left": PATHS[3], "right": PATHS[0], "p": "0.25"}])
    columns = {"prompt": "text", "image_0": "left", "image_1": "right", "label_0": "p"}
    assert facts(rows_of(folder / "own.jsonl", "pairs", columns=columns)) == [(0, 0, "b", 3, 0, 0.25)]
    with pytest.raises(SourceError, match=r"open\.parquet has no column nothing; its columns are chosen"):
        rows_of(folder / "open.parquet", "pairs", columns={"chosen": "nothing"})


def test_jsonl_has_names_of_its_own_and_a_broken_line_spoils_itself_only(folder: Path) -> None:
    good = json.dumps({"prompt": "a", "image_0": PATHS[0], "image_1": PATHS[1], "label_0": 1, "split": "val"})
    (folder / "x.jsonl").write_text(f"{good}\n{{broken\n\n[1]\n{good}\n")
    rows = rows_of(folder / "x.jsonl", "jsonl")
    assert facts(rows)[0] == (0, 0, "a", 0, 1, 1.0)
    assert [row.prompt for row in rows] == ["a", Reason.UNREADABLE_ROW, Reason.UNREADABLE_ROW, "a"]
    assert [row.split for row in rows] == ["validation", None, None, "validation"]


def test_a_tar_that_is_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    members = [(f"{i}.{part}", IMAGES[i]) for i in range(3) for part in ("0.jpg", "1.jpg")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    assert len(rows_of(tmp_path / "whole.tar", "webdataset")) == 3
    end = whole.rindex(b"ustar") - 257 + 512 + -(-len(IMAGES[2]) // 512) * 512
    for cut in (0, 100, 512, 700, end // 2, end - 600, end):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"cannot read .*cut\.tar: "):
            rows_of(tmp_path / "cut.tar", "webdataset")


def test_a_column_that_a_format_does_not_have_is_refused_when_the_configuration_is_read() -> None:
    for name, kind in KINDS.items():
        columns = {field.name: "theirs" for field in (*kind.fields, SPLIT, WEIGHT)}
        assert SourceConfig(format=name, path="x", columns=columns).columns == columns
    with pytest.raises(ValidationError, match="'pickapic', 'webdataset', 'hpd', 'imagereward', 'rapidata', 'pairs', "):
        SourceConfig(format="parquet", path="x")
    with pytest.raises(ValidationError, match=r"format pairs has no column image0; did you mean `image_0`\?"):
        SourceConfig(format="pairs", path="x", columns={"image0": "left"})
    with pytest.raises(ValidationError, match=r"format rapidata has no column zzz; its columns are prompt, "):
        SourceConfig(format="rapidata", path="x", columns={"zzz": "left"})


@pytest.mark.parametrize("prompt", [["a", "b"], {"text": "a"}], ids=str)
def test_a_prompt_that_is_no_text_is_not_made_into_one(tmp_path: Path, prompt: object) -> None:
    record = {"prompt": prompt, "chosen": "0.jpg", "rejected": "1.jpg"}
    (row,) = rows_of(write_json(tmp_path / "a.json", [record]), "pairs")
    assert row.prompt is Reason.UNREADABLE_PROMPT


def test_a_place_is_opened_by_the_file_system_that_its_address_names() -> None:
    from huggingface_hub import HfFileSystem

    assert isinstance(Storage("hf://datasets/somebody/something").fs, HfFileSystem)
    fs = fsspec.filesystem("memory")
    fs.pipe({"/formats/a.jsonl": b"{}", "/formats/deep/b.jsonl": b"{}", "/formats/c.txt": b""})
    for path in ("memory://formats", "memory://formats/**/*.jsonl"):
        assert [file.uri for file in list_files(path, (".jsonl",))] == [
            "memory:///formats/a.jsonl", "memory:///formats/deep/b.jsonl"
        ]  # fmt: skip


def test_a_damaged_header_is_never_taken_for_the_end_of_a_tar(tmp_path: Path) -> None:
    members, _, _ = write_shard(tmp_path / "x.tar", [(f"{i}.{part}", IMAGES[i]) for i in range(3) for part in "ab"])
    data = (tmp_path / "x.tar").read_bytes()
    for member in members:
        start = member.offset - 512
        (tmp_path / "x.tar").write_bytes(data[:start] + b"\xff" * 512 + data[member.offset :])
        with pytest.raises(SourceError, match=r"cannot read .*x\.tar: "):
            rows_of(tmp_path / "x.tar", "webdataset")


def test_a_part_that_comes_twice_is_not_chosen_from(tmp_path: Path) -> None:
    parts = [("0.jpg", IMAGES[0]), ("1.jpg", IMAGES[1]), ("txt", b"a"), ("label_0.txt", b"1")]
    twice = [(f"a.{name}", data) for name, data in [*parts, ("0.png", IMAGES[2])]]
    once = [(f"b.{name}", data) for name, data in [*parts, ("json", b'{"label_0": 0, "user_id": 7}')]]
    rows = rows_of(write_tar(tmp_path / "x.tar", twice + once), "webdataset")
    assert [row.prompt for row in rows] == [Reason.UNREADABLE_ROW, b"a"]
    assert (rows[1].label_0, rows[1].user_id) == (1.0, "7"), "a part of its own counts before a key of the JSON part"


def test_members_of_a_key_that_do_not_follow_each_other_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.0.jpg", b"0"), ("b.0.jpg", b"0"), ("a.1.jpg", b"1")])
    with pytest.raises(SourceError, match=r"x\.tar: the members of a are not adjacent"):
        rows_of(tmp_path / "x.tar", "webdataset")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", b""), ("a.parquet", b"PAR1"), ("a.json", b""), ("a.json", b"[{"), ("a.json", b'{"a": 1}'),
        ("a.json.gz", b"no gzip"), ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:9]), ("a.tar", b"no tar" * 200),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    format_of = {".parquet": "pickapic", ".tar": "webdataset"}.get(f".{name.split('.')[1]}", "hpd")
    with pytest.raises(SourceError, match=rf"{name}") as caught:
        rows_of(tmp_path / name, format_of)
    assert caught.value.hint


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(json.dumps([{"prompt": f"{i * i}"} for i in range(500)]).encode()))
    for place in range(12, len(data), 7):  # whatever zlib makes of it
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        (tmp_path / "a.json.gz").write_bytes(damaged)
        with pytest.raises(SourceError, match=r"cannot read .*a\.json\.gz: "):
            rows_of(tmp_path / "a.json.gz", "pairs")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_none_of_which_has_what_is_needed_are_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    file = write_json(tmp_path / name, [{"text": "a", "good": "0.jpg", "bad": "1.jpg"}] * 2)
    with pytest.raises(SourceError, match=rf"{name} has no column prompt; its columns are bad, good, text"):
        rows_of(file, "pairs")
    assert len(rows_of(file, "pairs", columns={"prompt": "text", "chosen": "good", "rejected": "bad"})) == 2


def test_records_of_no_group_are_cut_into_units_of_a_thousand(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", [{"prompt": "a", "img_better": "0.jpg", "img_worse": "1.jpg"}] * 2500)
    config = IngestConfig(sources=(SourceConfig(format="imagereward", path=str(file)),))
    assert [unit.num_rows for unit in plan_units(config)] == [1000, 1000, 500]


def test_odd_values_of_json_spoil_their_own_field_only(tmp_path: Path) -> None:
    record = {"prompt": "a", "image_0": "0.jpg", "image_1": "1.jpg", "label_0": 10**400, "user_id": "\ud800"}
    (row,) = rows_of(write_json(tmp_path / "a.jsonl", [record]), "jsonl")
    assert (row.label_0, row.user_id) == (Reason.UNREADABLE_LABEL, "?")


def test_an_image_in_many_pairs_of_a_record_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    read = Cells.read
    monkeypatch.setattr(Cells, "read", lambda self, cell: asked.append(cell) or read(self, cell))
    record = {"prompt": "a", "prompt_id": "1", "image": PATHS, "rank": [1, 2, 3, 4]}
    rows = rows_of(write_json(folder / "a.json", [record]), "imagereward")
    assert (len(rows), asked) == (6, PATHS)
    assert {row.image_0 for row in rows} == set(IMAGES[:3])


def test_a_file_of_no_known_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prompt,chosen,rejected\n")
    with pytest.raises(SourceError, match=r"a\.txt has a type that mapo cannot read"):
        rows_of(tmp_path / "a.txt", "pairs")


@pytest.mark.parametrize(
    ("uri", "split"),
    [
        ("s3://b/train-00000-of-00645.parquet", "train"), ("s3://b/validation-00000-of-00014.parquet", "validation"),
        ("file:///d/validation_unique-00000-of-00001-33ead111.parquet", "validation"), ("x/test.json", "test"),
        ("x/test_unique-00000.parquet", "test"), ("x/val/0001.parquet", "validation"), ("x/dev.jsonl", "validation"),
        ("x/train_3.json", "train"), ("x/trainers.parquet", None), ("x/photos-00000-of-00004.parquet", None),
        ("x/testimony/a.parquet", None), ("x/test_aes.json", "test"), ("x/hpdv2_test.json", "test"),
        ("x/pickapic_validation-00001-of-00003.parquet", "validation"),
        ("x/flux-dev.parquet", None), ("x/Test/0.tar", "test"), ("x/latest.parquet", None),
    ],
)  # fmt: skip
def test_the_split_of_a_file_is_what_its_name_or_folder_says(uri: str, split: str | None) -> None:
    assert split_of_file(uri) == split


def test_the_configuration_may_say_the_split_or_leave_it_to_the_hash(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "test-0.parquet", photo_pairs(2))
    assert {row.split for row in rows_of(file, "pickapic")} == {"test"}
    assert {row.split for row in rows_of(file, "pickapic", split="hash")} == {None}
    assert {row.split for row in rows_of(file, "pickapic", split="validation")} == {"validation"}
    assert split_called(b"TRAIN ") == "train"


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6))
def test_ranks_give_every_two_images_once_and_the_smaller_rank_wins(ranks: list[int]) -> None:
    found = list(from_ranks(ranks, count=len(ranks)))
    assert [(i, j) for i, j, _ in found] == [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks))]
    for i, j, label in found:
        assert label == (0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]))
    assert [1 - label for _, _, label in found if isinstance(label, float)] == [  # the other way round
        label for _, _, label in from_ranks(ranks, count=len(ranks), best="largest")
    ]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_votes_are_a_share_and_no_votes_are_no_label(votes_0: int, votes_1: int) -> None:
    label = from_votes(votes_0, votes_1)
    assert label == (votes_0 / (votes_0 + votes_1) if votes_0 + votes_1 else Reason.MISSING_LABEL)


@pytest.mark.parametrize("label_0", [True, 1, "1", "1.0", b"1", np.float32(1), np.int64(1)], ids=repr)
def test_a_label_counts_by_its_value(label_0: object) -> None:
    assert from_labels(label_0, 0) == 1.0
