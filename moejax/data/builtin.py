"""The default corpus: real text that comes with Python and with moejax's requirements.

    code    Python: the standard library, without its tests
    prose   English: docstrings of the scientific packages, the language reference behind `help()`,
            package descriptions
    c       C and C++: headers and sources shipped by packages and by Python

Each file feeds one domain only, and a docstring that occurs in several files is used once, so text held out
of one domain does not occur in another. Files are sorted by a hash of their names, so a byte limit takes a
sample of everything instead of the first letters of the alphabet.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator

from moejax.data.sources import DataError, Document

# Each domain stops here so that it loads in seconds; parsing docstrings takes most of them.
MAX_BYTES = 6_000_000
# Shorter files (an empty __init__.py) hold no text worth reading.
MIN_CHARS = 200

_DOCSTRING_PACKAGES = ("numpy", "scipy", "matplotlib", "flax", "optax")
_C_PACKAGES = ("pyarrow", "numpy", "scipy", "jaxlib")
_DESCRIBED = (
    *("jax", "flax", "optax", "orbax-checkpoint", "chex", "ml-collections", "absl-py", "grain"),
    *("numpy", "scipy", "tokenizers", "safetensors", "matplotlib", "tqdm", "tensorboardX"),
    *("pyarrow", "zstandard", "pillow", "fonttools", "contourpy", "packaging", "python-dateutil"),
    *("etils", "rich", "msgpack", "PyYAML", "protobuf", "kiwisolver", "pip"),
)
_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "testing", "idle_test", "__pycache__")
    + ("site-packages", "dist-packages", "pydoc_data")
)
_C_SUFFIXES = (".h", ".hh", ".hpp", ".c", ".cc", ".cpp")


def domains() -> dict[str, Callable[[], Iterator[Document]]]:
    """Each domain's name and the function that streams its documents."""
    return {"code": _code, "prose": _prose, "c": _c}


def _code() -> Iterator[Document]:
    for label, path in _by_hash(_walk("stdlib", sysconfig.get_paths()["stdlib"], (".py",))):
        yield from _document(label, _read(path))


def _prose() -> Iterator[Document]:
    readers = {}
    for package in _DOCSTRING_PACKAGES:
        for label, path in _walk(package, _package_folder(package), (".py",)):
            readers[label] = functools.partial(_docstrings, path)
    for name in _DESCRIBED:
        readers[f"{name}/METADATA"] = functools.partial(_description, name)
    for topic, text in _help_topics().items():
        readers[f"stdlib/pydoc_data/topics.py#{topic}"] = functools.partial(list, [text])
    seen: set[str] = set()
    for label, reader in _by_hash(readers.items()):
        texts = []
        for text in reader():
            if text not in seen:
                seen.add(text)
                texts.append(text)
        yield from _document(label, "\n\n".join(texts))


def _c() -> Iterator[Document]:
    files = dict(_walk("include", sysconfig.get_paths()["include"], _C_SUFFIXES))
    for package in _C_PACKAGES:
        files |= _walk(package, _package_folder(package), _C_SUFFIXES)
    for label, path in _by_hash(files.items()):
        yield from _document(label, _without_license(_read(path)))


def _document(label: str, text: str) -> Iterator[Document]:
    if len(text) >= MIN_CHARS:
        yield Document(label, 0, text)


def _by_hash(items):
    return sorted(items, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _walk(label: str, root: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (label/relative/path, absolute path) of the files under root; nothing if root does not exist."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if d not in _SKIPPED_FOLDERS)
        for name in sorted(f for f in files if f.endswith(suffixes)):
            path = os.path.join(folder, name)
            yield f"{label}/{os.path.relpath(path, root).replace(os.sep, '/')}", path


def _package_folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"data.sources: 'builtin' reads the package {package}, which is not installed; "
            "pip install -r requirements.txt"
        )
    return spec.submodule_search_locations[0]


def _read(path: str) -> str:
    """The text of a file; empty if it cannot be read or is not UTF-8 (a few files have old encodings)."""
    try:
        with open(path, "rb") as f:
            return f.read().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _docstrings(path: str) -> list[str]:
    """The docstrings of a module, its classes and functions, in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's source
            tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return []
    texts: list[str] = []

    def collect(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            texts.append(text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                collect(child)

    collect(tree)
    return texts


def _description(name: str) -> list[str]:
    """The long description that a package was published with; nothing if it is not installed."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [metadata.json.get("description", "")]  # pyright: ignore[reportReturnType]


def _help_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _without_license(text: str) -> str:
    """C source without a leading licence comment, which hundreds of files repeat."""
    head = re.match(r"\s*(/\*.*?\*/|(//[^\n]*\n)+)", text, re.DOTALL)
    return text[head.end() :].lstrip() if head and re.search("licen[sc]e", head[0], re.I) else text
