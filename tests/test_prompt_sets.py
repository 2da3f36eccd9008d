"""Prompt sets of the package, and prompts from files: construction, disjoint splits, formats, mistakes."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.models import brightness, tiny_model
from vdm_env import make
from vdm_env.prompt_sets import FROM_FILES, list_prompt_sets, prompt_set, prompts_from, read_prompts
from vdm_env.prompt_sets.files import split_of
from vdm_env.prompts import SPLITS
from vdm_env.rewards.action import KINETICS_PHRASES


def texts(name: str) -> dict[str, list[str]]:
    book = prompt_set(name)
    return {split: [book[i] for i in book.ids(split)] for split in SPLITS}


# ------------------------------------------------------------------------------------------------- the package's sets


@pytest.mark.parametrize("name", list(list_prompt_sets()))
def test_splits_are_disjoint_and_clean(name: str) -> None:
    splits = texts(name)
    every = [text for split in SPLITS for text in splits[split]]
    assert len({text.casefold() for text in every}) == len(every)  # PromptBook would allow repetitions in one split
    assert all(text == " ".join(text.split()) and text.isprintable() for text in every)
    assert len(splits["train"]) > 2 * len(splits["test"]) and min(len(s) for s in splits.values()) >= 9
    assert prompt_set(name) is not prompt_set(name)  # resets add texts to a book: none may be shared


def test_activities_are_45_animals_times_three() -> None:
    splits = texts("activities")
    pattern = re.compile(r"(a|an) (\w+) (riding a bike|playing chess|washing dishes)")
    animals: dict[str, set[str]] = {}
    for split, prompts in splits.items():
        parts = [pattern.fullmatch(prompt) for prompt in prompts]
        assert all(parts)
        animals[split] = {part[2] for part in parts if part}
        assert len(prompts) == 3 * len(animals[split])
        assert all((part[1] == "an") == (part[2][0] in "aeiou") for part in parts if part)
    assert [len(animals[split]) for split in SPLITS] == [35, 5, 5]
    assert len(set.union(*animals.values())) == 45  # so no animal is in two splits
    assert "an ant riding a bike" in splits["validation"] and "a wolf washing dishes" in splits["test"]


def test_actions_name_every_class_in_every_split() -> None:
    for prompts in texts("actions").values():
        named = [[phrase for phrase in KINETICS_PHRASES if phrase in prompt] for prompt in prompts]
        assert all(len({KINETICS_PHRASES[phrase] for phrase in found}) == 1 for found in named)
        counts = {phrase: sum(phrase in found for found in named) for phrase in KINETICS_PHRASES}
        assert len(set(counts.values())) == 1 and min(counts.values()) >= 2
    scenes = [{re.sub("|".join(KINETICS_PHRASES), "", p) for p in prompts} for prompts in texts("actions").values()]
    assert not scenes[0] & scenes[2] and not scenes[0] & scenes[1]


def test_objects_ask_for_a_book() -> None:
    assert all("book" in text for prompts in texts("objects").values() for text in prompts)


def test_make_takes_names_and_files(tmp_path: Path) -> None:
    env = make(model=tiny_model(), reward=brightness, prompts="activities", split="test")
    obs, _ = env.reset(seed=0)
    assert env.prompts[int(obs["prompt_id"])] in texts("activities")["test"]
    file = tmp_path / "own.txt"
    file.write_text("\n".join(f"video number {i}" for i in range(100)))
    for given in (str(file), file):
        env = make(model=tiny_model(), reward=brightness, prompts=given)
        assert sorted(env.prompts) == sorted(f"video number {i}" for i in range(100))
    with pytest.raises(ValueError, match="unknown prompt set 'a dog'; .*activities.*prompts=\\['a dog'\\]"):
        make(model=tiny_model(), reward=brightness, prompts="a dog")


@pytest.mark.parametrize("name", list(FROM_FILES))
def test_published_sets_say_how_to_bring_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} are not part of the package.*read_prompts"):
        prompts_from(name)


# ----------------------------------------------------------------------------------------------------------- splitting


MANY = [f"a clip of thing {i}" for i in range(2000)]


def written(tmp_path: Path, lines: list[str], name: str = "p.txt") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_text_keeps_its_split(tmp_path: Path) -> None:
    whole = read_prompts(written(tmp_path, MANY))
    assert sorted(sum(whole.values(), [])) == sorted(MANY)
    # 5 % of 2000 with a deviation of 9.7: four of them either way
    assert 61 <= len(whole["test"]) <= 139 and 61 <= len(whole["validation"]) <= 139
    assert whole["test"][:3] == ["a clip of thing 58", "a clip of thing 81", "a clip of thing 92"]  # as released
    backwards = read_prompts(written(tmp_path, MANY[::-1] + ["one more"]))
    some = read_prompts(written(tmp_path, MANY), limit=500)
    for split in SPLITS:
        assert set(backwards[split]) - {"one more"} == set(whole[split])
        assert set(some[split]) == set(whole[split]) & set(MANY[:500])
    wider = read_prompts(written(tmp_path, MANY), test=0.2, validation=0.0)
    assert set(whole["test"]) < set(wider["test"]) and "validation" not in wider


def test_repetitions_go_and_count_once(tmp_path: Path) -> None:
    lines = ["  A  dog\truns ", "a dog runs", "", "A DOG RUNS", "a cat sits"]
    got = read_prompts(written(tmp_path, lines), validation=0, test=0, limit=2)
    assert got == {"train": ["A dog runs", "a cat sits"]}
    for text in ("a dog runs", "A dog  runs"):  # spelling moves no text to another split
        assert split_of(text, validation=0.4, test=0.4) == split_of("A DOG RUNS", validation=0.4, test=0.4)


# ------------------------------------------------------------------------------------------------------------- formats

KEEP: dict[str, Any] = {"validation": 0, "test": 0}
THREE = ["a dog, running", 'a "quoted" cat', "un café à l'aube"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", 'a dog, running\r\na "quoted" cat\r\nun café à l\'aube\r\n'),
        ("p.csv", 'uuid,prompt\n1,"a dog, running"\n2,"a ""quoted"" cat"\n3,un café à l\'aube\n'),
        ("p.tsv", 'id\tcaption\n1\ta dog, running\n2\t"a ""quoted"" cat"\n3\tun café à l\'aube\n'),
        ("p.json", json.dumps(THREE)),
        ("P.JSONL", "\n".join(json.dumps({"prompt": text, "n": 1}) for text in THREE) + "\n\n"),
        ("q.jsonl", "\n".join(json.dumps(text) for text in THREE)),
    ],
)
def test_formats(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + content.encode())
        assert read_prompts(path, **KEEP) == {"train": THREE}


def test_columns_are_chosen(tmp_path: Path) -> None:
    webvid = written(tmp_path, ["videoid,contentUrl,name,text", "1,x,Sea at dawn,2018"], "webvid.csv")
    assert read_prompts(webvid, **KEEP) == read_prompts(webvid, source="WebVid", **KEEP) == {"train": ["Sea at dawn"]}
    assert read_prompts(webvid, column="text", **KEEP) == {"train": ["2018"]}
    with pytest.raises(ValueError, match="no column 'prompt'; it has 'videoid', 'contentUrl', 'name', 'text'"):
        read_prompts(webvid, source="VidProM")
    other = written(tmp_path, ["a,b", "1,2"], "other.csv")
    with pytest.raises(ValueError, match="no column called prompt, caption, name, text; it has 'a', 'b'"):
        read_prompts(other)
    long = written(tmp_path, ["text", "word " * 60_000], "long.csv")  # above the csv module's own limit
    assert len(read_prompts(long, **KEEP)["train"][0]) == 299_999


def test_parquet_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'vdm-env\[parquet\]'"):
        read_prompts(path)

    class Column:
        def to_pylist(self) -> list[str | None]:
            return [*THREE, None]

    class File:
        """The few methods that are used, as pyarrow documents them."""

        schema_arrow = types.SimpleNamespace(names=["uuid", "prompt"])

        def __init__(self, given: Path) -> None:
            if given.read_bytes() != b"PAR1":
                raise ValueError("magic bytes not found")

        def iter_batches(self, columns: list[str]) -> list[Any]:
            assert columns == ["prompt"]
            return [types.SimpleNamespace(column=lambda _: Column())] * 2

    fake = types.SimpleNamespace(ParquetFile=File)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=fake))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    assert read_prompts(path, **KEEP) == {"train": THREE}
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="is no parquet file"):
        read_prompts(path)


def test_parquet_as_it_is(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"id": [1, 2, 3, 4], "prompt": [*THREE, None]}), path, row_group_size=2)
    assert read_prompts(path, **KEEP) == {"train": THREE}
    with pytest.raises(ValueError, match="has '1' in 'id', which is no text; name another column"):
        read_prompts(path, column="id", **KEEP)
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])  # the pages, not the footer
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        read_prompts(path, **KEEP)


def test_a_file_may_name_its_splits(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"train": ["a dog", "a  dog", "a cat"], "test": [{"prompt": "a bear"}]}')
    assert read_prompts(path) == {"train": ["a dog", "a cat"], "test": ["a bear"]}
    assert read_prompts(path, limit=1) == {"train": ["a dog"], "test": ["a bear"]}
    path.write_text('{"train": ["a dog"], "test": ["A dog"]}')
    with pytest.raises(ValueError, match="'A dog' in its splits train and test"):
        read_prompts(path)
    path.write_text('{"train": "a dog"}')
    with pytest.raises(ValueError, match="holds str, expected a list"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("p.txt", b"\n \n", "has no prompt"),
        ("p.csv", b"", "it has none"),
        ("p.csv", b"prompt\n", "has no prompt"),
        ("p.txt", "un café".encode("latin-1"), "encoding='latin-1'"),
        ("p.json", b'{"a": 1}', "holds dict, expected a list"),
        ("p.json", b"[1]", "has '1' where a text is expected"),
        ("p.json", b"[]", "has no prompt"),
        ("p.jsonl", b'"fine"\n{', "line 2 of .* is no JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": null}', "an object with a text 'prompt' is expected"),
        ("p.docx", b"a", "ends in '.docx'"),
        ("p", b"a", "ends in 'nothing'"),
    ],
)
def test_mistakes_are_explained(name: str, content: bytes, mention: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=mention):
        read_prompts(path, **KEEP)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_prompts(tmp_path / "none.txt")


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = written(tmp_path, ["a dog"])
    for wrong in ({"limit": 0}, {"limit": True}, {"test": 1.0}, {"test": -0.1}, {"source": "Nothing"}):
        with pytest.raises(ValueError, match="expected"):
            read_prompts(path, **wrong)
    with pytest.raises(ValueError, match="encoding='latin-x' is not known"):
        read_prompts(path, encoding="latin-x")
    with pytest.raises(ValueError, match="for so few pass validation=0"):
        read_prompts(path, test=0.999, validation=0.0009)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("un café".encode("latin-1"))
    assert read_prompts(latin, encoding="latin-1", **KEEP) == {"train": ["un café"]}


def test_a_file_that_names_its_splits_is_told_to_name_the_one_that_lacks(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"test": ["x y", "z"]}))
    with pytest.raises(ValueError, match='give it a list "train"$'):
        read_prompts(path)


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{damaged')
    found = read_prompts(path, limit=2, validation=0.0, test=0.0)
    assert found == {"train": ["a", "b"]}


@pytest.mark.parametrize("encoding", ["base64", "nonsense"])
def test_an_encoding_that_is_none_of_text_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\n")
    with pytest.raises(ValueError, match="is not known"):
        read_prompts(path, encoding=encoding)
