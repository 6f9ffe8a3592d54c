"""Documentation says what the code does: tables, examples, links, settings."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from tersor import formats
from tersor.cli import main
from tersor.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
NARROW = 6
"""Floats of at most this many bits have their magnitudes listed."""


def shown_name(path: Path) -> str:
    """Return what a document is called in the name of a test."""
    return path.relative_to(ROOT).as_posix()


def read(name: str) -> str:
    """Return a document's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Return Markdown without fenced and indented code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown_name)
def test_links_resolve(document: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown_name)
def test_lines_are_short_and_plain(document: Path) -> None:
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        assert line.isascii(), f"line {number}"
        assert line == line.rstrip(), f"line {number} ends in blanks"
        assert len(line) <= 125 or line.startswith("|"), f"line {number} has {len(line)} characters"


def commands(text: str) -> list[list[str]]:
    """Return the words behind `tersor` of every command that stands on lines of its own."""
    joined = re.sub(r" \\\n *", " ", text)
    lines = re.findall(r"^(?: {4}| {0,2})tersor (.*)$", joined, re.MULTILINE)
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] in main.VERBS]


def test_every_command_has_a_verb_and_options_that_there_are() -> None:
    """Words alone, since most stand for files and GPUs; those of the README are run (`test_readme.py`)."""
    count = 0
    for document in sorted((ROOT / "docs").rglob("*.md")):
        for words in commands(document.read_text(encoding="utf-8")):
            command, context, count = typer.main.get_command(main.app), None, count + 1
            rest = ["tersor", *words]
            while True:
                try:
                    context = command.make_context(rest[0], rest[1:], parent=context)
                except Exception as error:  # typer carries a click of its own, whose errors are known by their shape
                    said = getattr(error, "format_message", lambda error=error: repr(error))()
                    pytest.fail(f"{document.name}: tersor {shlex.join(words)}: {said}")
                if not hasattr(command, "resolve_command"):
                    break
                rest = [*context._protected_args, *context.args]
                _, command, _ = command.resolve_command(context, rest)
    assert count > 40


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.parent != ROOT], ids=shown_name)
def test_examples_give_what_they_show(document: Path) -> None:
    text = re.sub(r"^```.*$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, document.name, str(document), 0)
    shown: list[str] = []
    doctest.DocTestRunner().run(test, out=shown.append)
    assert not shown, "".join(shown)


def test_the_examples_are_found() -> None:
    assert len(doctest.DocTestParser().get_examples(read("docs/formats.md"))) >= 8


def power(value: float) -> str:
    """Write a number as it is when that is short, as a power of two otherwise."""
    if value >= 2.0**-6:
        return f"{value:g}"
    exponent = torch.frexp(torch.tensor(value))[1].item() - 1
    assert value == 2.0**exponent
    return f"2^{exponent}"


def float_rows() -> list[str]:
    """The table of named float formats, as formats.md has it."""
    rows = ["| name | bits | bias | largest | smallest normal | smallest |", "|---|---|---|---|---|---|"]
    for name in formats.names():
        fmt = formats.get(name)
        if fmt.kind == "float":
            cells = (f"`{name}`", fmt.bits, fmt.bias, f"{fmt.max:g}", power(fmt.min_normal), power(fmt.smallest))
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def value_rows() -> list[str]:
    """The table of magnitudes of narrow float formats."""
    rows = ["| name | magnitudes |", "|---|---|"]
    for name in formats.names():
        fmt = formats.get(name)
        if fmt.kind == "float" and fmt.bits <= NARROW:
            magnitudes = fmt.values()[: 1 << (fmt.bits - 1)].tolist()
            rows.append(f"| `{name}` | " + " ".join(f"{value:g}" for value in magnitudes) + " |")
    return rows


def bits_rows() -> list[str]:
    """The table of stored bits for a few schemes."""
    rows = ["| scheme | bits a weight |", "|---|---|"]
    for name, group in (
        ("fp6_e3m2", None),
        ("fp6_e3m2", 128),
        ("fp6_e3m2", 64),
        ("mxfp6_e3m2", None),
        ("fp5_e2m2", None),
        ("fp4_e2m1", 64),
        ("int4", 128),
        ("uint4", 128),
        ("int8", None),
        ("lut3", None),
    ):
        scheme = formats.get_scheme(name, group)
        shared = "a row" if scheme.group_size is None else f"a group of {scheme.group_size}"
        what = "table" if scheme.has_table else "scale"
        rows.append(f"| {name}, one {scheme.scale_dtype} {what} {shared} | {scheme.bits_per_weight(4096):.3f} |")
    return rows


@pytest.mark.parametrize(
    ("marker", "rows"), [("floats", float_rows()), ("values", value_rows()), ("bits", bits_rows())]
)
def test_tables_of_formats_are_those_of_the_code(marker: str, rows: list[str]) -> None:
    wanted = f"<!-- {marker} -->\n" + "\n".join(rows) + "\n\n"
    assert wanted in read("docs/formats.md"), f"docs/formats.md should hold:\n{wanted}"


def test_scale_dtypes_are_those_of_the_code() -> None:
    text = read("docs/formats.md")
    for name, dtype in formats.SCALE_DTYPES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{8 * dtype.itemsize} bits" in row
        if dtype.is_floating_point:
            info = torch.finfo(dtype)
            exponent = int(torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64).log2())
            assert f"2^{exponent} " in row
            assert f"{info.max:.3g}".replace("+", "").replace("6.55e04", "65504") in row


def test_every_format_is_named() -> None:
    text = read("docs/formats.md")
    for name in (*formats.names(), *formats.LUTS):
        known = name if name.startswith(("fp", "lut")) else re.sub(r"\d", "", name)
        assert known in text, name


def test_settings_are_those_of_the_code() -> None:
    rows = [line.strip("| ").split(" | ") for line in read("docs/settings.md").splitlines() if line.startswith("| `")]
    assert [name.strip("`") for name, *_ in rows] == list(SETTINGS)
    home = str(Path.home())
    for name, expects, default, meaning in rows:
        setting = SETTINGS[name.strip("`")]
        assert expects == setting.expects
        assert meaning == setting.meaning
        if name != "`TERSOR_JIT_JOBS`":  # its default is a property of the machine
            assert default == f"`{str(setting.default).replace(home, '~')}`"


def test_structure_names_every_room_in_the_order_of_imports() -> None:
    text = read("docs/structure.md")
    table = text[text.index("## Rooms") :]
    shown = re.findall(r"^\| \[?`(\w+)(?:/|\.py)`", table, re.MULTILINE)
    tree = ast.parse(read("tests/unit/test_structure.py"))
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    rooms = ast.literal_eval(named["ROOMS"])
    assert shown == [room for room in rooms if room != "version"]


def test_every_verb_is_in_the_readme() -> None:
    readme = read("README.md")
    for verb in main.VERBS:
        assert f"tersor {verb}" in readme, verb


def test_the_log_lists_every_round_newest_first() -> None:
    rounds = sorted((path.name for path in (ROOT / "docs" / "log").glob("[0-9]*.md")), reverse=True)
    titles = [read(f"docs/log/{name}").splitlines()[0] for name in rounds]
    listed = re.findall(r"^\| \[(.+)\]\((.+)\) \|", read("docs/log/README.md"), re.MULTILINE)
    assert listed == [(title.removeprefix("# "), name) for title, name in zip(titles, rounds, strict=True)]


def test_adding_says_how_to_add_each_thing_and_names_tests_that_exist() -> None:
    text = read("docs/adding.md")
    things = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert things == [
        "A format",
        "A kernel",
        "A kind of weight",
        "A recipe",
        "A transform",
        "A pruning algorithm",
        "A method that others compress by",
        "An architecture of the engine",
        "A search of the planner",
        "A verb",
        "A room",
        "Always",
    ]
    named = set(re.findall(r"tests/\w+/test_\w+\.py", text))
    assert named and all((ROOT / name).is_file() for name in named), named
