"""Recipes without mmc's own steps: YAML with places, `--set`, typed keys, and what runs when."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmc.store.chain import (
    Node,
    Result,
    Section,
    Start,
    Step,
    given,
    open_recipe,
    path_state,
    run_steps,
)
from mmc.store.chain.document import override, parse
from mmc.store.errors import InputError, MmcError


def test_values_know_their_lines_and_are_those_of_safe_load():
    text = "a: 1\nb:\n  - x\n  - {c: 1.5, d: 'no', e: no, f: null}\n"
    root = parse(text, "r.yaml")
    assert root.plain() == {"a": 1, "b": ["x", {"c": 1.5, "d": "no", "e": False, "f": None}]}
    assert root.value["a"].where == "r.yaml:1"
    assert root.value["b"].where == "r.yaml:2"
    assert root.value["b"].value[1].value["d"].where == "r.yaml:4"


def test_anchors_and_merges():
    text = "base: &base {lr: 1, epochs: 3}\none: {<<: *base, lr: 2}\ntwo: *base\n"
    assert parse(text, "r").plain() == {
        "base": {"lr": 1, "epochs": 3},
        "one": {"lr": 2, "epochs": 3},
        "two": {"lr": 1, "epochs": 3},
    }
    twice = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b}\nd: *b\n"
    assert parse(twice, "r").plain()["d"] == {"x": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "r.yaml is empty"),
        ("# nothing\n", "r.yaml is empty"),
        ("a: 1\na: 2\n", "r.yaml:2: 'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  c: {d: 1,\n      d: 2}\n", "r.yaml:4: 'd' is given twice, first in line 3"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2: not YAML: "),
        ("a:\n\tb: 1\n", "r.yaml:2: not YAML: found character '\\t'"),
        ("a: &a [*a]\n", "r.yaml:1: an alias stands inside"),
        ("a: *b\n", "r.yaml:1: not YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not YAML: but found another document"),
        ("a: 1\n2: b\n", "r.yaml:2: the key 2 is no text"),
        ("a: 1\nyes: b\n", "r.yaml:2: the key yes is no text"),
        ("a: 1\n? [b, c]\n: d\n", "r.yaml:2: "),
        ("a: 12:30:00\nb: 2024-01-01\n", "r.yaml:2: 2024-01-01 is read as a date"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: the tag tag:yaml.org"),
        ("a: \x00\n", "r.yaml: not YAML: "),
    ],
)
def test_what_is_not_a_recipe(text, says):
    with pytest.raises(InputError) as error:
        parse(text, "r.yaml")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_set_reaches_into_a_copy():
    root = parse("a: &a {x: 1}\nb: *a\nlist: [{y: 1}, {y: 2}]\nh: {set: {q.r: 1}}\n", "r.yaml")
    pairs = ["b.x=2", "list.1.y=[3, 4]", "new.deep=v", "h.set.head.width=8", "h.set.q.r="]
    found = override(root, pairs)
    assert found.plain() == {
        "a": {"x": 1},
        "b": {"x": 2},
        "list": [{"y": 1}, {"y": [3, 4]}],
        "new": {"deep": "v"},
        "h": {"set": {"q.r": None, "head.width": 8}},
    }
    assert root.plain()["b"] == {"x": 1}
    assert found.value["b"].value["x"].where == "--set b.x=2"
    dotted = parse("names: {ViT-1.5: a, ViT-1: {5: b}}".replace("5: b", "'5': b"), "r.yaml")
    assert override(dotted, ["names.ViT-1.5=c"]).plain()["names"]["ViT-1.5"] == "c"
    assert override(dotted, ["source=a=b,c=d"]).plain()["source"] == "a=b,c=d"


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("a", "write key.key=value"),
        ("=1", "write key.key=value"),
        ("a.b=1", "r.yaml:1 holds 'text', which has no keys"),
        ("list.7=1", "r.yaml:2 is a list of 1; say which, from 0"),
        ("a=[1", "--set a=[1:1: not YAML"),
    ],
)
def test_what_cannot_be_set(pair, says):
    root = parse("a: text\nlist: [1]\n", "r.yaml")
    with pytest.raises(InputError) as error:
        override(root, [pair])
    assert says in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    count: int = 1
    rate: float | None = None
    parts: tuple[str, ...] = ()
    fast: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError("count must be 1 or more")
        if self.fast and self.count > 5:
            raise InputError("fast goes up to 5")


def section(text: str) -> Section:
    return Section(parse(text, "r.yaml"), "part")


def test_a_section_becomes_a_config():
    part = section("count: 3\nrate: 1e-4\nparts: a, b\nown: 5\n")
    assert part.node("own") == Node(5, "r.yaml:4")
    config, values = part.config(Config, name="n")
    part.finish()
    assert (config.count, config.rate) == (3, 1e-4)
    assert given(Config, {**values, "fast": False}) == {
        "count": 3,
        "rate": 1e-4,
        "parts": ["a", " b"],
    }
    whole, _ = section("parts: a, b").config(Config, name="n", whole=("parts",))
    assert whole.parts == ("a, b",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("count: 0", "r.yaml:1: part.count: count must be 1 or more"),
        ("a: 1\ncount: x", "r.yaml:2: part setting count='x' is not a whole number"),
        ("count: true", "part setting count=True is not a whole number"),
        ("parts: {a: b}", "part setting parts={'a': 'b'} is not"),
        ("parts: 3", "part setting parts=3 is not"),
        ("rate: fast", "part setting rate='fast' is not"),
        ("count: ''", "r.yaml:1: part.count is empty"),
        ("count: 7\nfast: true", "r.yaml:1: part: fast goes up to 5"),
        ("cuont: 7", "r.yaml:1: part has no key 'cuont'; did you mean count?"),
        ("name: x", "r.yaml:1: part has no key 'name'"),
        ("[1]", "r.yaml:1: part must hold keys and values, got [1]"),
    ],
)
def test_a_section_that_is_wrong(text, says):
    def read() -> None:
        part = section(text)
        part.node("a")
        part.config(Config, name="n")
        part.finish()

    with pytest.raises(InputError) as error:
        read()
    assert says in str(error.value)


def test_a_number_that_is_none_is_told_in_our_words():
    with pytest.raises(InputError, match=r"setting count='x' is not a whole number$"):
        section("count: x").config(Config, name="n")


class Bench:
    """Two steps: `double` reads a file, `copy` reads what `double` made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[tuple[str, bool]] = []
        self.broken: set[str] = set()
        self.settings: dict[str, dict[str, object]] = {"double": {"times": 2}, "copy": {}}
        (folder / "in").write_text("ab", encoding="utf-8")
        (folder / "r.yaml").write_text("a: 1", encoding="utf-8")

    def step(self, name: str, source: str, after: tuple[str, ...]) -> Step:
        out = self.folder / name

        def run(start: Start) -> Result:
            self.ran.append((name, start.replace))
            if name in self.broken:
                raise MmcError("no")
            text = (self.folder / source).read_text(encoding="utf-8")
            out.write_text(text * int(str(self.settings[name].get("times", 1))), encoding="utf-8")
            return Result(text=f"{name} done", data=len(text))

        def made() -> str | None:
            return out.read_text(encoding="utf-8") if out.exists() else None

        return Step(
            name=name,
            kind="work",
            settings=self.settings[name],
            inputs={"the file": lambda: (self.folder / source).read_text(encoding="utf-8")},
            run=run,
            made=made,
            after=after,
            owns=str(out),
        )

    def __call__(self, **options) -> list[tuple[str, str, str]]:
        steps = [self.step("double", "in", ()), self.step("copy", "double", ("double",))]
        with open_recipe(self.folder / "r.yaml") as recipe:
            found = run_steps(recipe, steps, report=print, show=print, **options)
        return [(one.step, one.state, one.reason) for one in found]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


SAME = [("double", "unchanged", ""), ("copy", "unchanged", "")]


def test_a_step_runs_when_it_is_new_and_when_something_changed(bench, capsys):
    assert bench() == [("double", "ran", "new"), ("copy", "ran", "new")]
    assert capsys.readouterr().out.splitlines()[:2] == ["double: new", "double done"]
    assert bench() == SAME
    (bench.folder / "in").write_text("cd", encoding="utf-8")
    changed = "changed (the file)"
    assert bench() == [("double", "ran", changed), ("copy", "ran", changed)]
    bench.settings["copy"]["times"] = 3
    assert bench()[1] == ("copy", "ran", "changed (times default -> 3)")
    assert bench.ran[-1] == ("copy", True)
    assert bench() == SAME


def test_what_comes_out_the_same_changes_nothing_after_it(bench):
    bench()
    bench.settings["double"] = {"times": "2", "note": [1, 2]}
    reason = "changed (times 2 -> 2, note default -> 1,2)"
    assert bench() == [("double", "ran", reason), ("copy", "unchanged", "")]
    assert bench(force=["double"])[0] == ("double", "ran", "forced")
    assert [state for _, state, _ in bench(force=["work"])] == ["ran", "ran"]


def test_a_step_that_failed_goes_on_and_a_changed_one_starts_anew(bench):
    bench.broken.add("double")
    with pytest.raises(MmcError, match="no"):
        bench()
    with pytest.raises(MmcError, match="no"):
        bench()
    assert bench.ran == [("double", False), ("double", False)]
    bench.settings["double"]["times"] = 4
    bench.broken.clear()
    assert bench()[0][1:] == ("ran", "changed (times 2 -> 4)")
    assert bench.ran[2] == ("double", True)
    assert (bench.folder / "copy").read_text(encoding="utf-8") == "abababab"


def test_what_was_edited_or_lost_is_made_anew(bench):
    bench()
    (bench.folder / "copy").write_text("mine", encoding="utf-8")
    assert bench()[1] == ("copy", "ran", "what it made was changed")
    (bench.folder / "copy").unlink()
    assert bench()[1] == ("copy", "ran", "what it made is gone")


def test_dry_run_says_what_would_run_and_does_nothing(bench):
    before = sorted(bench.folder.iterdir())
    new = [("double", "would run", "new"), ("copy", "would run", "new")]
    (bench.folder / "double").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="has not made it"):
        bench(dry_run=True)
    (bench.folder / "double").unlink()
    bench.step = with_missing(bench.step)
    assert bench(dry_run=True) == new
    assert sorted(bench.folder.iterdir()) == before
    bench()
    bench.settings["double"]["times"] = 4
    waits = "if double makes something else than before"
    assert bench(dry_run=True)[1] == ("copy", "waits", waits)


def with_missing(make):
    """Steps whose input may not be there yet, as those of recipes."""

    def step(name: str, source: str, after: tuple[str, ...]) -> Step:
        from dataclasses import replace

        found = make(name, source, after)
        state = found.inputs["the file"]

        def safe() -> str:
            with contextlib.suppress(FileNotFoundError):
                return state()
            return "absent"

        return replace(found, inputs={"the file": safe})

    return step


def test_a_file_of_others_stops_all_before_anything_runs(bench):
    (bench.folder / "copy").write_text("theirs", encoding="utf-8")
    with pytest.raises(InputError, match="copy is there, and this recipe has not made it"):
        bench()
    assert bench.ran == []
    assert sorted(path.name for path in bench.folder.iterdir()) == ["copy", "in", "r.yaml"]


def test_the_record_is_of_one_recipe_and_damage_is_said(bench):
    bench()
    record = bench.folder / "r" / ".mmc-recipe.json"
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["steps"]["copy"]["output"] == "abab"
    for text, says in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(found | {"format": 2}), "newer mmc"),
        (json.dumps(found | {"recipe": "other.yaml"}), "holds what other.yaml made"),
    ):
        record.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=says):
            bench()


def test_the_folder_is_where_the_recipe_says(tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "r.yaml"
    file.write_text("out: ../elsewhere\n", encoding="utf-8")
    before = Path.cwd()
    with open_recipe(file, ["x=1"]) as recipe:
        assert Path.cwd() == tmp_path / "deep"
        assert recipe.path("store") == "../elsewhere/store"
        assert recipe.kept == "# as run: mmc run r.yaml --set=x=1\nout: ../elsewhere\n"
    assert Path.cwd() == before
    for text, says in ((b"\xff\xfe", "not UTF-8"), (None, "No such file"), (b"out: 3", "r.yaml:1")):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(InputError, match=says), open_recipe(file):
            pass
    assert Path.cwd() == before


def test_state_of_a_path(tmp_path):
    folder = tmp_path / "a"
    assert path_state(folder) == "absent"
    folder.mkdir()
    (folder / "x").write_text("1", encoding="utf-8")
    first = path_state(folder)
    assert path_state(folder) == first
    (folder / "x").write_text("22", encoding="utf-8")
    second = path_state(folder)
    (folder / "x").rename(folder / "y")
    assert len({first, second, path_state(folder)}) == 3
