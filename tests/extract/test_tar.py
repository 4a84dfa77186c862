"""Reading tar headers: the same members as Python's tarfile, and no trust in any byte."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.extract.sources.tar import Tar
from mmc.store.errors import InputError


def members(path):
    with Tar(str(path)) as tar:
        return list(tar.members()), dict(tar.skipped), tar.problem


def reference(path):
    with tarfile.open(path) as tar:
        return [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]


NAMES = [
    "a.txt", "folder/b.jpg", "x" * 99 + ".txt", "y" * 150 + "/" + "z" * 90 + ".jpg",
    "long/" * 60 + "end.json", "猫🐈.jpg", "../../up.jpg", "/abs.jpg",
]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_members_of_tarfile(tmp_path, form):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for at, name in enumerate(NAMES):
            info = tarfile.TarInfo(name)
            info.size = 700 * at
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    found, skipped, problem = members(path)
    assert found == reference(path)
    assert [name for name, _, _ in found] == NAMES
    assert (skipped, problem) == ({}, None)


def test_ustar_prefix_and_v7(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ["p" * 90 + "/" + "n" * 60 + ".txt", "b.txt"]:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert members(path)[0] == reference(path)
    data = bytearray(path.read_bytes())
    # The old form has neither magic nor prefix; its checksum is all there is.
    header = bytearray(data[1024:1536])
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + data[1536:])
    assert members(path)[0] == [("b.txt", 512, 3)]
    header[0] ^= 1
    path.write_bytes(bytes(header) + data[1536:])
    with pytest.raises(InputError, match="not a tar"):
        members(path)


def test_what_is_no_file_is_counted(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
        for at, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"m{at}")
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("last.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    found, skipped, problem = members(path)
    assert [name for name, _, _ in found] == ["last.jpg"]
    assert (skipped, problem) == ({"link": 2, "special file": 1}, None)


def test_sparse_members_are_refused_and_what_follows_is_read(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("holes.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        info.size = 512
        tar.addfile(info, io.BytesIO(b"0\n" + bytes(510)))
        info = tarfile.TarInfo("b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    found, skipped, _ = members(path)
    assert ([name for name, _, _ in found], skipped) == (["b.jpg"], {"sparse file": 1})
    with tarfile.open(path) as tar:
        assert found[0][1] == tar.getmember("b.jpg").offset_data
    # GNU's old form: the kind is S and the map goes on in further blocks.
    data = bytearray(path.read_bytes())
    start = data.index(b"b.jpg\0")
    header = data[start : start + 512]
    old = bytearray(header)
    old[156:157], old[482] = b"S", 1
    first = bytearray(512)
    first[504] = 1
    path.write_bytes(bytes(old) + bytes(first) + bytes(512) + bytes(512) + bytes(data[start:]))
    found, skipped, problem = members(path)
    assert ([name for name, _, _ in found], skipped) == (["b.jpg"], {"sparse file": 1})
    assert problem is None


def test_sizes_beyond_octal(tmp_path):
    path = tmp_path / "t.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    path.write_bytes(info.tobuf(format=tarfile.GNU_FORMAT))
    _, _, problem = members(path)
    assert "member 'big.jpg' is not whole" in problem
    with path.open("r+b") as file:  # a file with a hole: nothing of that size is written
        file.truncate(512 + (9 << 30) + 1024)
    assert members(path) == ([("big.jpg", 512, 9 << 30)], {}, None)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "good.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ["a.jpg", "é" * 80 + ".txt", "b.json"]:
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(range(200)) * 3))
    return path


def test_a_tar_that_is_cut_gives_what_is_whole(good, tmp_path):
    data = good.read_bytes()
    whole, _, _ = members(good)
    path = tmp_path / "cut.tar"
    end = whole[-1][1] + 1024
    for length in (*range(600, end, 97), end, end + 100):
        path.write_bytes(data[:length])
        found, _, problem = members(path)
        assert found == [one for one in whole if one[1] + one[2] <= length]
        assert f"cut off after {length:,} bytes" in problem
    path.write_bytes(data[: end + 512])
    assert members(path) == (whole, {}, None)


def test_a_tar_behind_a_tar_is_noticed(good, tmp_path):
    path = tmp_path / "two.tar"
    path.write_bytes(good.read_bytes() * 2)
    assert "more follows its end mark" in members(path)[2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is an empty file"),
        (b"<html>404</html>", "is not a tar .it begins with b'<html>404"),
        (b"\x1f\x8b" + bytes(600), "packed with gzip.*unpack it first .gunzip"),
        (b"BZh9" + bytes(600), "packed with bzip2"),
        (b"\xff" * 2048, "is not a tar"),
    ],
)
def test_what_is_no_tar(tmp_path, data, message):
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        members(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "records", [b"17 size=-99999999\n", b"-6 a\n", b"0 a=b\n", b"9" * 5000 + b" a=b\n", b"6 a=b"]
)
def test_records_that_lead_back_or_nowhere_end_the_reading(tmp_path, records):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    member = tarfile.TarInfo("a.jpg")
    padded = records + bytes(-len(records) % 512)
    path = tmp_path / "t.tar"
    path.write_bytes(info.tobuf() + padded + member.tobuf() + bytes(1024))
    found, _, problem = members(path)
    assert found == []
    assert "it is damaged at byte" in problem


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 6000), value=st.binary(min_size=1, max_size=12))
def test_no_byte_is_trusted(good, tmp_path_factory, at, value):
    data = bytearray(good.read_bytes())
    data[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(data)
    try:
        found, _, _ = members(path)
    except InputError:
        return
    for name, offset, size in found:
        name.encode()
        assert 0 <= offset <= offset + size <= len(data)
