"""Tars: read back by others, placed by offsets, the same bytes every time."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset import storage
from pipelines.dataset.errors import ShardCorrupt
from pipelines.dataset.shard import BLOCK_BYTES, Member, ShardWriter, read_shard, write_shard
from pipelines.dataset.storage import Storage

Members = list[tuple[str, bytes]]

payloads = st.one_of(
    st.binary(max_size=64),
    st.integers(0, 3 * BLOCK_BYTES).map(lambda n: b"\xff" * n),  # either side of a block's border
)
keys = st.lists(st.text("0123456789abcdef", min_size=1, max_size=32), max_size=6, unique=True)


@st.composite
def member_lists(draw: st.DrawFn) -> Members:
    """Pairs of a shard: some parts of each key, one key after the other."""
    parts = st.lists(st.sampled_from(["0.jpg", "1.webp", "json", "safetensors"]), min_size=1, max_size=4, unique=True)
    return [(f"{key}.{part}", draw(payloads)) for key in draw(keys) for part in draw(parts)]


def written(folder: Path, members: Members) -> tuple[bytes, list[Member], str]:
    file = folder / "shard.tar"
    found, num_bytes, sha256 = write_shard(file, members)
    data = file.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (num_bytes, sha256)
    return data, found, sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@settings(deadline=None)
@given(members=member_lists())
def test_tarfile_reads_back_what_was_written(folder: Path, members: Members) -> None:
    data, _, _ = written(folder, members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == members  # type: ignore[union-attr]
    assert list(read_shard(data)) == members


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its stream to the garbage collector
@settings(deadline=None, max_examples=50)
@given(members=member_lists())
def test_webdataset_reads_back_every_key_with_its_parts(folder: Path, members: Members) -> None:
    written(folder, members)
    wanted: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        key, part = name.split(".", 1)
        wanted.setdefault(key, {})[part] = data
    shards = webdataset.WebDataset(str(folder / "shard.tar"), shardshuffle=False, empty_check=False)
    read = {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in shards}
    assert read == wanted


@settings(deadline=None)
@given(members=member_lists())
def test_offset_length_and_digest_point_at_the_payload(folder: Path, members: Members) -> None:
    data, found, _ = written(folder, members)
    places = [(m.name, data[m.offset : m.offset + m.length], m.sha256) for m in found]
    assert places == [(name, payload, hashlib.sha256(payload).hexdigest()) for name, payload in members]


@settings(deadline=None)
@given(members=member_lists())
def test_the_same_members_give_the_same_bytes(folder: Path, members: Members) -> None:
    assert written(folder, members) == written(folder, members)


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=120), st.binary(max_size=9))
def test_headers_are_those_of_tarfile(name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    out = io.BytesIO()
    try:
        wanted = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # too long a name
        with pytest.raises(ValueError):
            ShardWriter(out).add(name, data)
        return
    ShardWriter(out).add(name, data)
    assert out.getvalue()[:BLOCK_BYTES] == wanted


def test_the_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    # A retried unit of an older version overwrites its object: other bytes would break the committed digest.
    _, _, sha256 = written(tmp_path, [("00.0.jpg", b"one"), ("00.1.jpg", b"two" * 500), ("00.json", b"{}")])
    assert sha256 == "712a22635a87a8933fcab405e1d490edb31d8b0c58d94f54337370c14e54c1e0"


def test_a_cut_at_a_members_border_is_noticed_by_offset_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    members = [(f"{i:02d}.jpg", bytes([i]) * 700) for i in range(4)]
    data, found, sha256 = written(tmp_path, members)
    cut = data[: found[2].offset - BLOCK_BYTES]
    assert list(read_shard(cut)) == members[:2], "every tar iterator passes over the cut"
    (tmp_path / "cut.tar").write_bytes(cut)
    place = Storage(str(tmp_path))
    assert place.read_range("cut.tar", found[1].offset, found[1].length, found[1].sha256) == members[1][1]
    with pytest.raises(ShardCorrupt, match=r"0 of 700 bytes"):
        place.read_range("cut.tar", found[2].offset, found[2].length, found[2].sha256)
    assert hashlib.sha256(cut).hexdigest() != sha256
