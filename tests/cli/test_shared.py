"""What all commands share: the frame, values of options, what is printed, and one line for what is wrong."""

import errno
import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from tests.calling import Command

from longmem import __main__ as frame
from longmem.cli.common import at_least, duration, expiry, moment, show, tokens

# what is wrong is one line: the value, the rule, the way out

NO_EVE = "memory: no namespace 'eve'; there are: ada, bob"
TAKEN = "/notes/one.txt is not such a folder; name a folder that can be written in, or a new one"
WRONG = "wrong: a tokenizer of 300 tokens, the model knows 260: it is another model's; name the right one with"
OTHER = "keys of one mean nothing to the other"
ODD = b"caf\xe9".decode(errors="surrogateescape")  # what Python makes of bytes that are not UTF-8
ALREADY = "namespace 'ada' has a document 'one.txt' already; choose another name for --keep"

REFUSED = {  # what is typed where there is a store, and a part of what is said; a wrong name shows before a wrong model
    "memory list --store nowhere": "/nowhere: no memory store here; check the path",
    "memory list -n eve": NO_EVE,
    "memory stats -n eve": NO_EVE,
    "memory forget -n eve --everything": NO_EVE,
    "memory search x -n eve --model nowhere": NO_EVE,
    "generate nowhere x --memory memory -n eve": NO_EVE,
    "generate nowhere x --memory memory -n ada --keep one.txt": ALREADY,
    "generate nowhere x --keep talk": "--keep and --recall need a store; name it with --memory",
    "generate {models}/nowhere x": "/nowhere: no such",
    "generate nowhere x --set stride=1": "'stride=1' is not a setting that may change",
    "generate nowhere x --file notes/one.txt": "the prompt is given twice",
    "generate nowhere ''": "the prompt is empty; give it as an argument, in --file, or on standard input",
    "generate nowhere --file nowhere.txt": "nowhere.txt: no such file or folder",
    f"generate nowhere {ODD}": "'caf\\udce9' is not UTF-8 text; convert it",
    "generate {models}/side x --tokenizer {models}/wrong": WRONG,
    "memory add notes --model ./none": "no such folder; name a checkpoint folder",
    "memory add notes --model {models}/backbone --backbone x": "/backbone is a causal language model by itself",
    "memory add notes --model {models}/other": OTHER,
    "memory search x -n ada --device cuda:99": "try --device cpu",
    "memory search x -n ada --tokenizer {models}/wrong": WRONG,
    "memory add notes --tokenizer {models}/wrong": WRONG,
    "layers {models}/backbone --data {models}/wrong --tokenizer {models}/wrong": WRONG,
    "calibrate {models}/backbone --data {models}/wrong --tokenizer {models}/wrong --out x --memory 8 --window 8": WRONG,
    "memory add nothing.txt --model nowhere": "nothing.txt: no such file or folder (looked from ",
    "memory add notes --include *.none": "no document matches *.none; there are inner",
    "memory add notes --name p": "--name (p) is for one text, and more came; leave it out, or add them one by one",
    "memory add -": "a text from standard input needs a --name (or --jsonl",
    f"memory add notes --metadata a={ODD}": "'a=caf\\udce9' is not UTF-8 text",
    "memory add notes --metadata author": "'author' is neither KEY=VALUE nor a JSON object; try author=Ada",
    "memory add notes --metadata {{a=1": "'{a=1' is neither KEY=VALUE nor a JSON object; try author=Ada",
    "memory add notes --expires soon": "'soon' is no time to come; try 30d, 12h or 2099-12-31",
    "memory add notes --expires 2001-01-01": "'2001-01-01' is no time to come",
    "memory add notes --time 30d": "'30d' is no date; try 2026-01-31",
    "memory list --older-than 1": "'1' is no duration; try 30d, 12h or 1.5y",
    "memory list --namespaces --where a=1": "--namespaces lists whole namespaces; leave out --where, --older-than and",
    "memory list --namespaces --before 2999-01-01": "--namespaces lists whole namespaces; leave out",
    f"memory search {ODD}": "'caf\\udce9' is not UTF-8 text; convert it",
    "memory search ' '": "the text to search for is empty; say something",
    "memory size --heads-kv 1 --head-dim 1 --tokens 1e999": "'1e999' is not a list of counts; try 65536,1M,10M",
    "generate nowhere x --recall-tokens 0": "'0' is no token count of at least 1; try 8192 or 8k",
    "eval perplexity --windows 8k,0": "'8k,0' is not a list of token counts; try 1024,8k,64k",
    "eval perplexity --out notes/one.txt/x": TAKEN,
    "report --out notes/one.txt/x": TAKEN,
    "layers --out notes/one.txt/x": TAKEN,
    "calibrate --out notes/one.txt/x": TAKEN,
    "demo --out notes/one.txt/x": TAKEN,
}


@pytest.mark.parametrize("typed", REFUSED)
@pytest.mark.usefixtures("filled")
def test_what_cannot_be_done_is_one_line_and_nothing_is_changed(
    typed: str, command: Command, models: Path, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if "catalog" not in path.name}
    done = command(*shlex.split(typed.format(models=models)))
    line = done.error if done.status == 1 else done.err.rpartition("Error: ")[2]
    assert done.status in (1, 2) and not done.out
    assert REFUSED[typed] in " ".join(line.split())
    assert {path for path in tmp_path.rglob("*") if "catalog" not in path.name} == before


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space", "x.json"), 1, "error: x.json: No space; check the path, its permissions"),
        (OSError(), None, ""),
        (ZeroDivisionError(), None, ""),
    ],
    ids=repr,
)
def test_an_expected_error_is_one_line_on_stderr_and_a_bug_is_not_hidden(
    error: BaseException, status: int | None, line: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setitem(frame.cli.commands, "demo", click.Command("act", callback=fail))
    if status is None:
        with pytest.raises(type(error)):
            frame.main(["demo"])
        return
    done = command("demo")
    assert (done.status, done.out) == (status, "")
    assert done.err.strip().startswith(line) and "\n" not in done.err.strip()


# the values of options


def test_what_the_value_of_an_option_means() -> None:
    assert [duration(f"1{unit}") for unit in "smhdwY"] == [1, 60, 3600, 86400, 604800, 31536000]
    assert duration(" 1.5d ") == 129600
    assert moment("2026-01-31T12:00:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert expiry("2026-01-31") == moment("2026-01-31") == datetime(2026, 1, 31).timestamp()  # local time
    assert moment("1700000000") == moment(1700000000) == 1700000000.0
    assert [tokens(said) for said in ("8192", " 8k ", "2M")] == [8192, 8192, 2 << 20]


@pytest.mark.parametrize(
    ("read", "said"),
    [(duration, said) for said in ("d", "30", "-1d", "3 months")]
    + [(moment, said) for said in ("yesterday", "12", True, None, float("nan"))]
    + [(tokens, "8q"), (tokens, "k"), (at_least(2), "1"), (at_least(2, float), "nan")],
)
def test_what_is_no_value_is_refused(read: Callable[[Any], float], said: object) -> None:
    with pytest.raises(ValueError):
        read(said)


# what is printed


def test_a_result_is_lines_and_tables_or_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a" * 30, "tokens": 5, "x": 0}, {"name": "two\nlines \x1b[31m\x07", "tokens": 12345, "x": 1}]
    said = {"path": Path("a/b"), "said": {"k": 1}, "long": {"k": "x" * 900}, "expires": None, "share": 0.123456}
    show(False, {**said, "rows": rows}, ("name", "tokens"))
    assert capsys.readouterr().out.splitlines() == [
        "path            a/b",
        "said            k=1",
        f"long            k={'x' * 198} ...",  # JSON has all of it
        "expires         -",
        "share           0.1235",
        "name                            tokens",
        f"{'a' * 30}       5",
        f"{'two lines ·[31m·':<30}  12,345",  # text from a store cannot command a terminal
    ]
    show(True, {**said, "rows": rows})
    assert json.loads(capsys.readouterr().out) == {**said, "path": "a/b", "rows": rows}
