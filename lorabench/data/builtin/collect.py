"""Make the built-in data sets from the interpreter's own library: `python -m lorabench.data.builtin.collect`.

The shipped files come from CPython 3.11.7; another version gives other text and other fingerprints.
"""

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import tokenize
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.08
MIN_DOCSTRING_CHARS = 200
MIN_DOCUMENT_CHARS = 400
# A module whose long docstrings fill this share of it gives its prose, any other module its code, none both.
PROSE_SHARE = 0.10

# Test suites, tools with a text of their own, the topics' source, and tables written by a generator.
EXCLUDED = re.compile(
    r"""(site-packages|test|lib2to3|idlelib|encodings|pydoc_data|ensurepip|config-[^/]*)/
      | .*/tests?/
      | (_sysconfigdata.*|keyword|token|stringprep|this|html/entities|re/_casefix)\.py$""",
    re.VERBOSE,
)


class Document(NamedTuple):
    """One text and the name that places it in a split."""

    source: str
    text: str


class Module(NamedTuple):
    """One file of the standard library."""

    path: str
    text: str
    docstrings: list[str]

    @property
    def family(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")


def library_modules(root: Path) -> Iterator[Module]:
    """The modules under `root`, by path."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if not EXCLUDED.match(name):
            with tokenize.open(paths[name]) as file:
                text = file.read()
            yield Module(name, text, long_docstrings(text))


def documented_nodes(text: str) -> Iterator[tuple[Any, str]]:
    """The module, classes and functions that have a docstring, outer before inner, with it."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    waiting: deque[ast.AST] = deque([ast.parse(text)])
    while waiting:
        node = waiting.popleft()
        # ast.walk would also visit the expressions, which are most of the tree and hold no docstring.
        waiting.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node, clean=False)) is not None:
            yield node, docstring


def long_docstrings(text: str) -> list[str]:
    """The de-indented docstrings of a source text, without the short ones."""
    cleaned = (inspect.cleandoc(docstring) for _, docstring in documented_nodes(text))
    return [docstring for docstring in cleaned if len(docstring) >= MIN_DOCSTRING_CHARS]


def without_docstrings(text: str) -> str:
    """A source text without the docstrings that it can lose and stay valid."""
    lines = text.splitlines(keepends=True)
    for node, _ in documented_nodes(text):
        docstring, *rest = node.body
        stands_alone = rest and rest[0].lineno > docstring.end_lineno
        if stands_alone and docstring.lineno > getattr(node, "lineno", 0):
            for index in range(docstring.lineno - 1, docstring.end_lineno):
                lines[index] = ""
    return "".join(lines).lstrip("\n")


def prose_families(modules: Iterable[Module]) -> set[str]:
    """The top-level names whose long docstrings reach `PROSE_SHARE` of their text."""
    size: dict[str, int] = defaultdict(int)
    prose: dict[str, int] = defaultdict(int)
    for module in modules:
        size[module.family] += len(module.text)
        prose[module.family] += sum(map(len, module.docstrings))
    return {family for family in size if prose[family] >= PROSE_SHARE * size[family]}


def unique_paragraphs(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without doctests and without any paragraph that an earlier one had.

    The topics repeat one another and docstrings are copied between classes; kept, the repeats would
    put one text in two splits.
    """
    seen: set[str] = set()
    for source, text in documents:
        kept = []
        for paragraph in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
            key = " ".join(paragraph.split())
            if key and key not in seen and ">>>" not in key:
                seen.add(key)
                kept.append(paragraph.rstrip())
        yield Document(source, "\n\n".join(kept))


def english_documents(modules: list[Module], topics: dict[str, str]) -> list[Document]:
    """Documentation topics, the longest first so that they stay whole, then docstrings by module."""
    by_length = sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))
    documents = [Document(f"topic:{name}", text) for name, text in by_length]
    documents += [Document(f"docstrings:{m.path}", "\n\n".join(m.docstrings)) for m in modules]
    return long_enough(unique_paragraphs(documents))


def code_documents(modules: list[Module]) -> list[Document]:
    """Source files without their docstrings."""
    return long_enough(Document(f"code:{m.path}", without_docstrings(m.text)) for m in modules)


def long_enough(documents: Iterable[Document]) -> list[Document]:
    return [document for document in documents if len(document.text) >= MIN_DOCUMENT_CHARS]


def name_hash(document: Document) -> str:
    return hashlib.sha256(document.source.encode()).hexdigest()


def split(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Whole documents into splits, in the order of their names' hashes.

    Each kind of source (topic, docstrings, code) fills `HELD_OUT_SHARE` of its characters in
    validation, then in test: a hash alone put 73% topics in validation and 3% in test.
    """
    kinds: dict[str, list[Document]] = defaultdict(list)
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in sorted(documents, key=name_hash):
        kinds[document.source.split(":")[0]].append(document)
    for members in kinds.values():
        quota = HELD_OUT_SHARE * sum(len(document.text) for document in members)
        room = {"validation": quota, "test": quota}
        for document in members:
            held_out = [name for name in room if len(document.text) <= room[name]]
            name = held_out[0] if held_out else "train"
            parts[name].append(document)
            if held_out:
                room[name] -= len(document.text)
    return {name: sorted(part) for name, part in parts.items()}


def jsonl_gz(documents: Iterable[NamedTuple]) -> bytes:
    """The same documents give the same bytes: the header bears neither a time nor a name."""
    lines = (json.dumps(document._asdict(), ensure_ascii=False) for document in documents)
    return gzip.compress("".join(line + "\n" for line in lines).encode(), compresslevel=9, mtime=0)


def collect(library: Path, topics: dict[str, str]) -> dict[str, dict[str, list[Document]]]:
    """Both data sets: their name, split and documents."""
    modules = list(library_modules(library))
    prose = prose_families(modules)
    english = english_documents([m for m in modules if m.family in prose], topics)
    code = code_documents([m for m in modules if m.family not in prose])
    return {"english-docs": split(english), "python-code": split(code)}


def write(sets: dict[str, dict[str, list[Document]]], out: Path) -> None:
    """One file a split, and a line on its size."""
    for name, parts in sets.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, documents in parts.items():
            data = jsonl_gz(documents)
            (out / name / f"{part}.jsonl.gz").write_bytes(data)
            characters = sum(len(document.text) for document in documents)
            print(f"{name}/{part}: {len(documents)} documents, {characters} characters, {len(data)} bytes")


def fingerprints(root: Path = HERE) -> dict[str, str]:
    """SHA-256 of every data and model file under `root`, by path."""
    files = [*root.glob("*/*.jsonl.gz"), *(each for each in root.glob("tiny-*/**/*") if each.is_file())]
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


def write_fingerprints(root: Path = HERE) -> dict[str, str]:
    """Write `fingerprints.json` and return what it says."""
    found = fingerprints(root)
    (root / "fingerprints.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def write_made(name: str, parts: Mapping[str, Sequence[NamedTuple]], about: str) -> None:
    """The command line of a script that makes a set by itself: its files, and a line on the size of each."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=HERE, help=f"where the folder `{name}` goes")
    out = parser.parse_args().out

    (out / name).mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        data = jsonl_gz(rows)
        (out / name / f"{part}.jsonl.gz").write_bytes(data)
        print(f"{name}/{part}: {len(rows)} {name}, {len(data)} bytes")
    for path, digest in write_fingerprints(out).items():
        print(f"{digest}  {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the data sets go")
    out = parser.parse_args().out

    from pydoc_data.topics import topics

    write(collect(Path(sysconfig.get_path("stdlib")), topics), out)
    print(f"Python {platform.python_version()}")
    for path, digest in write_fingerprints(out).items():
        print(f"{digest}  {path}")


if __name__ == "__main__":
    main()
