"""Runs the file of an experiment: `get_config()` and `get_sweep()`. What is wrong with it is a ConfigError that
names file and line, and what would work.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

import moejax
from moejax.config import ConfigError
from moejax.text import shown


def get_config(given: str) -> ConfigDict:
    """What get_config() gives of `FILE.py[:ARGUMENT]`. Raises ConfigError for any error in it."""
    name, colon, argument = given.partition(":")
    path = pathlib.Path(name)
    arguments = [argument] if colon else []
    function = _function(path, "get_config", "returns its ConfigDict")
    signature = _call(lambda: inspect.signature(function), path)
    try:
        signature.bind(*arguments)
    except TypeError as e:
        takes = "takes no" if colon else "needs an"
        raise ConfigError(f"get_config{signature} {takes} argument after ':'") from e
    values = _call(lambda: function(*arguments), path)
    if not isinstance(values, ConfigDict):
        raise ConfigError(
            f"get_config() returned {shown(values)}; it must return a ConfigDict, "
            "such as config_io.to_config_dict(ExperimentConfig(..))"
        )
    return values


def get_sweep(path: pathlib.Path) -> typing.Any:
    """What get_sweep() of the file of an experiment returns. Raises ConfigError for any error in it."""
    function = _function(path, "get_sweep", "returns its variants and seeds")
    return _call(function, path)


def _function(path: pathlib.Path, name: str, purpose: str) -> Callable:
    """The function of that name in the file `path`."""
    if not path.is_file():
        raise ConfigError(_no_file(path))
    function = getattr(_call(lambda: _module(path), path), name, None)
    if not callable(function):
        raise ConfigError(f"the file has no {name}(), the function that {purpose}")
    return function


def _module(path: pathlib.Path) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"config_{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look up their own module there
    with _importing_from(path.resolve().parent):
        loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    """As for a Python script, the files beside it can be imported. They are forgotten at the end: in another
    folder, another file may have the name."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and pathlib.Path(file).parent == folder:
                del sys.modules[name]


def _call(code: Callable, path: pathlib.Path) -> typing.Any:
    """Run `code` of the config file. Any error in it becomes a ConfigError with file and line."""
    try:
        return code()
    except ConfigError:
        raise
    except SyntaxError as e:
        line = f", line {e.lineno}" if e.lineno else ""
        raise ConfigError(f"{e.filename or path}{line}: not Python: {e.msg}") from e
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        at = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"{at}: {type(e).__name__}: {e}") from e


def _no_file(path: pathlib.Path) -> str:
    """The error text for a path that is not a file: names the configs nearest to it."""
    here, project = pathlib.Path.cwd(), pathlib.Path(moejax.__file__).parent.parent
    folders = [path, path.parent, here, here / "experiments"]
    folders += [project / path.parent, project / "experiments"]
    if any(map(_is_config, path.glob("*.py"))):  # a folder of configs: one of these is meant
        folders = [path]
    files = {}
    for folder in folders:
        for file in filter(_is_config, sorted(folder.glob("*.py"))):
            near_by = file.is_relative_to(here)
            files.setdefault(file.resolve(), file.relative_to(here) if near_by else file)
    # 'experiments/x', 'experiments.x' and 'experiments/x.py' mean the same.
    stem = path.name.removesuffix(".py").rpartition(".")[2]
    near = difflib.get_close_matches(stem, [f.stem for f in files], n=1)
    found = [str(f) for f in files.values() if not near or f.stem == near[0]][:5]
    what = "a folder" if path.is_dir() else f"no such file (relative to {here})"
    return f"{what}; {' or '.join(found) + ' would work' if found else 'name a Python file'}"


def _is_config(file: pathlib.Path) -> bool:
    try:
        return "def get_config" in file.read_text("utf-8", errors="ignore")
    except OSError:
        return False
