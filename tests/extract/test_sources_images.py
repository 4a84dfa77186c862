"""Where images are, which file a name means, and that no path leaves the root."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmc.extract.sources import SourceOptions, read_source, resolve_image
from mmc.extract.sources.paths import safe_path
from mmc.store.errors import InputError


def table(tmp_path, names, files, header="image"):
    tmp_path.mkdir(exist_ok=True)
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    path = tmp_path / "t.csv"
    path.write_text(f"{header},text\n" + "".join(f'"{name}",x\n' for name in names))
    return str(path)


@pytest.mark.parametrize("folder", ["", "data/", "images/", "img/"])
def test_the_root_is_where_the_files_are(tmp_path, folder):
    path = table(tmp_path, ["a.jpg", "b/c.png"], [f"{folder}a.jpg", f"{folder}b/c.png"])
    samples = read_source(path)
    assert samples.source["image_root"] == str(tmp_path / folder).rstrip("/")
    assert samples.table["image"].to_pylist() == ["a.jpg", "b/c.png"]
    for name in samples.table["image"].to_pylist():
        assert resolve_image(samples.source, name).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("written", "file"),
    [
        ("a", "a.jpg"),
        ("a", "a.JPG"),
        ("0007", "0007.webp"),
        ("img\\a.png", "img/a.png"),
        ("./img//a.png", "img/a.png"),
        ("x/../a.png", "a.png"),
        ("back\\slash.jpg", "back\\slash.jpg"),
        ("with, comma.jpg", "with, comma.jpg"),
        ("%20.jpg", "%20.jpg"),
        ("~a.jpg", "~a.jpg"),
        ("..a.jpg", "..a.jpg"),
    ],
)
def test_a_name_means_the_file_that_is_there(tmp_path, written, file):
    samples = read_source(table(tmp_path, [written], [file]))
    assert samples.table["image"].to_pylist() == [file]
    assert resolve_image(samples.source, file).is_file()


def test_files_in_two_folders_share_a_root(tmp_path):
    for split in ("one", "two"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "images" / "a.jpg").write_bytes(split.encode())
        (tmp_path / split / "t.csv").write_text(f"id,image,text\n{split},a.jpg,x\n")
    samples = read_source(f"train={tmp_path}/one/t.csv,test={tmp_path}/two/t.csv")
    assert samples.source["image_root"] == str(tmp_path)
    (tmp_path / "two" / "t.csv").write_text("id,image,text\none,a.jpg,x\n")
    with pytest.raises(InputError, match=r"two/t\.csv:2 has the id 'one' of one/t\.csv:2"):
        read_source(samples.source["spec"], SourceOptions(image_column="image"))
    assert [
        resolve_image(samples.source, name).read_bytes()
        for name in samples.table["image"].to_pylist()
    ] == [b"one", b"two"]


def test_image_root_option(tmp_path):
    path = table(tmp_path, ["1", "2"], ["posters/1.jpg", "posters/2.jpg"], header="imdbId")
    samples = read_source(path, SourceOptions(image_root=str(tmp_path / "posters")))
    assert samples.table.select(["id", "image"]).to_pylist() == [
        {"id": "1", "image": "1.jpg"}, {"id": "2", "image": "2.jpg"},
    ]  # fmt: skip
    assert any("'1' is the file '1.jpg'" in note for note in samples.notes)
    with pytest.raises(InputError, match=r"nowhere is not a folder; correct --image-root"):
        read_source(path, SourceOptions(image_root=str(tmp_path / "nowhere")))


def test_missing_files_are_counted_and_named(tmp_path):
    samples = read_source(table(tmp_path, ["a.jpg", "b.jpg", "", "a.jpg"], ["a.jpg"]))
    assert "1 of 3 images are not there, first t.csv:3 'b.jpg'" in samples.warnings[0]
    assert samples.source["counts"]["missing_images"] == 1
    assert samples.table["image"].to_pylist() == ["a.jpg", "b.jpg", None, "a.jpg"]


def test_all_images_missing(tmp_path):
    path = table(tmp_path, ["a.jpg", "b.jpg"], [])
    with pytest.raises(InputError, match=r"none of the 2 images .*t\.csv:2 'a\.jpg'") as error:
        read_source(path)
    assert str(tmp_path) in str(error.value)
    # An id that might name images may as well be just an id.
    samples = read_source(table(tmp_path, ["a.jpg", "b.jpg"], [], header="ImageID"))
    assert samples.source["image_root"] is None
    assert samples.table["image"].null_count == 2
    assert "read as texts only" in samples.warnings[0]
    (tmp_path / "t.csv").write_text("ImageID,Labels\na.jpg,1\n")
    with pytest.raises(InputError, match="none of the 1 images"):
        read_source(str(tmp_path / "t.csv"))


ESCAPES = [
    "../secret.jpg",
    "a/../../secret.jpg",
    "..",
    "/etc/hostname",
    "..\\secret.jpg",
    "a\\..\\..\\secret.jpg",
    "\\etc\\hostname",
    "C:\\secret.jpg",
    "C:/secret.jpg",
    "http://example.com/a.jpg",
    "file:///etc/hostname",
    "file:/etc/hostname",
    "s3://bucket/a.jpg",
    "a\x00b.jpg",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_paths_that_leave_the_root_are_refused(tmp_path, escape):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    path = table(tmp_path / "set", ["ok.jpg", escape], ["ok.jpg"])
    with pytest.raises(InputError, match=r"t\.csv:3: image"):
        read_source(path)
    source = {"image_root": str(tmp_path / "set"), "options": {}}
    with pytest.raises(InputError):
        resolve_image(source, escape)


def test_absolute_paths_when_allowed(tmp_path):
    (tmp_path / "other").mkdir()
    outside = tmp_path / "other" / "x.jpg"
    outside.write_bytes(b"out")
    path = table(tmp_path / "set", ["ok.jpg", str(outside), "../other/x.jpg"], ["ok.jpg"])
    with pytest.raises(InputError, match="--allow-absolute-paths"):
        read_source(path)
    samples = read_source(path, SourceOptions(allow_absolute_paths=True, id_column="-"))
    images = samples.table["image"].to_pylist()
    assert images == ["ok.jpg", str(outside), str(outside)]
    assert resolve_image(samples.source, images[1]).read_bytes() == b"out"
    # Without the option in the recipe the same row is refused.
    with pytest.raises(InputError):
        resolve_image({**samples.source, "options": {}}, images[1])


def test_an_absolute_path_inside_the_root_is_fine(tmp_path):
    path = table(tmp_path, [f"{tmp_path}/a.jpg"], ["a.jpg"])
    assert read_source(path).table["image"].to_pylist() == ["a.jpg"]


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jpg").write_bytes(b"linked")
    path = table(tmp_path / "set", ["a.jpg"], [])
    os.symlink(tmp_path / "disk", tmp_path / "set" / "images")
    samples = read_source(path)
    assert resolve_image(samples.source, "a.jpg").read_bytes() == b"linked"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="./\\a:~C\x00", max_size=12))
def test_no_path_ever_leaves_the_root(image):
    try:
        path = safe_path(image, "/data/root")
    except InputError:
        return
    for form in (path, path.replace("\\", "/")):
        full = os.path.normpath(os.path.join("/data/root", form))
        assert full == "/data/root" or full.startswith("/data/root/")
