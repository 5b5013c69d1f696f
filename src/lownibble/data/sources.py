"""Load the training and evaluation data sets of a `DataConfig`.

An existing path is read here; a path that does not exist, or a folder without files named after the splits, goes to the
`datasets` library (imported lazily). Of such a folder it says which files are which split; CSV and JSON files are then read here
all the same, unless the folder declares how to read them (a README.md with features or a separator). Every row is checked when it
is loaded, so a bad row stops a run before a model is loaded.

The evaluation split is, in this order: `eval_path`; the source's own test split; `eval_fraction` of the training rows. The
last, and sampling by `max_rows` and `max_eval_rows`, hash each row's content:

- rows with the same prompt are never in both splits, whatever their other fields (see `Recipe.identity`);
- neither added rows nor another training seed move a row to the other split, so results of different runs stay comparable
  (unless the fraction holds none of the prompts, or all of them: one is then held out, or trained, all the same, and which one
  depends on the others);
- a limit takes a random sample, kept in file order: a file sorted by label still gives a mixed sample, and a smaller
  limit's sample is a subset of a larger one's.

A seeded shuffle, the usual way, has none of these properties. The cost: the fraction holds only on average.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lownibble.config import DataConfig
from lownibble.data.demo import load_demo
from lownibble.data.files import SUFFIXES, read_file
from lownibble.data.forms import Recipe, recipe_for
from lownibble.data.rows import Dataset, Row, canonical
from lownibble.errors import ConfigError, DataError

__all__ = ["Dataset", "Row", "load", "read", "read_sides"]

DEFAULT_SPLIT, DEFAULT_EVAL_SPLIT = (DataConfig.model_fields[name].default for name in ("split", "eval_split"))
EVAL_FALLBACKS = ("validation", "eval", "val", "valid", "dev")
"""Split names tried if the default evaluation split does not exist; a split named by the user is never replaced."""

Reader = Callable[[], Dataset]
"""Reads a split."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Read, check, split and sample the training and evaluation data sets of a configuration.

    `config.path` (and `eval_path`) is 'demo'; a .jsonl, .csv (both also .gz, .bz2) or .parquet file; a folder with files
    named after the splits (train.jsonl, test.jsonl; 'validation', 'eval', 'val', 'valid' or 'dev' if there is no 'test'; small
    letters or capitals); or a hub data set id,
    'owner/name' or 'owner/name:configuration'. Class ids of a hub data set become class names.

    Raises:
        DataError: the data does not exist, a file is damaged or empty, or rows are bad (with file and line).
        ConfigError: the options do not fit the data.
    """
    train, evaluation = read_sides(config)
    recipe = recipe_for(train, config)
    if evaluation is None:
        train, evaluation = _hold_out(train, recipe, config.eval_fraction)
    else:
        evaluation = replace(evaluation, prompt_template=train.prompt_template, completion_template=train.completion_template)
        other_form = recipe_for(evaluation, config).form
        if other_form != recipe.form:
            raise DataError(
                f"The training rows are {recipe.form} and the evaluation rows {other_form}. Give both the same fields."
            )
    return _sample(train, config.max_rows), _sample(evaluation, config.max_eval_rows)


def read_sides(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """Training rows and evaluation rows, as stored; None where the rows for evaluation are to be held out.

    Beside an `eval_path`, `split` is of `path`, and `eval_split` of `eval_path`.

    Raises:
        DataError, ConfigError: as `load`.
    """
    apart = config.eval_path is not None
    train, evaluation = _sides(config.path, config.split, DEFAULT_EVAL_SPLIT if apart else config.eval_split)
    if train is None:
        raise DataError(f"The data '{config.path}' has no '{config.split}' side. Name one that it has with 'split'.")
    if config.eval_path is not None:
        split = DEFAULT_SPLIT if _is_whole(config.eval_path) else config.split
        other, test_side = _sides(config.eval_path, split, config.eval_split)
        evaluation = test_side or other
    return train(), evaluation and evaluation()


def _is_whole(path: str) -> bool:
    """Whether a source has no named splits."""
    return path == "demo" or Path(path).expanduser().is_file()


def read(path: str, split: str = DEFAULT_SPLIT, eval_split: str = DEFAULT_EVAL_SPLIT) -> tuple[Dataset | None, Dataset | None]:
    """Read (training split, test split) of one source, as stored; a single file is a training split only.

    Raises:
        DataError, ConfigError: as `load`.
    """
    train, test = _sides(path, split, eval_split)
    return train and train(), test and test()


def _sides(path: str, split: str, eval_split: str) -> tuple[Reader | None, Reader | None]:
    """What reads the training split and the test split of one source: a damaged file that nobody asks for does not matter."""
    local = Path(path).expanduser()
    if _is_whole(path):
        for name, given, default in (("split", split, DEFAULT_SPLIT), ("eval_split", eval_split, DEFAULT_EVAL_SPLIT)):
            if given != default:
                raise ConfigError(f"The '{name}' of DataConfig does not apply to '{path}', which has no named splits. Unset it.")
        if path == "demo":
            train, test = load_demo()
            return lambda: train, lambda: test
        return lambda: Dataset(local.name, read_file(local)), None
    if local.is_dir():
        files = _split_files(local)
        if _named(split, files) or _named(eval_split, files):
            return _pick(path, files, lambda name: Dataset(f"{path}/{name}", read_file(files[name])), split, eval_split)
    elif path.lower().endswith(SUFFIXES) or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path):
        raise DataError(f"There is no data file or folder '{path}' (looked in '{Path.cwd()}'). Check the path.")
    splits = _load_hub(str(local) if local.is_dir() else path, local.is_dir())
    return _pick(path, splits, splits.__getitem__, split, eval_split)


def _split_files(folder: Path) -> dict[str, Path]:
    """The folder's data files by name without suffix: {'train': .../train.jsonl, ...}."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix and path.is_file():
            name = path.name[: -len(suffix)]
            if name in files:
                raise DataError(f"'{folder}' holds both {files[name].name} and {path.name}. Keep one of them.")
            files[name] = path
    return files


def _pick(
    path: str, available: Collection[str], read: Callable[[str], Dataset], split: str, eval_split: str
) -> tuple[Reader | None, Reader | None]:
    """What reads the requested splits among those available; the default evaluation split may be missing, then None."""
    candidates = (eval_split, *EVAL_FALLBACKS) if eval_split == DEFAULT_EVAL_SPLIT else (eval_split,)
    test = next((found for name in candidates if (found := _named(name, available))), None)
    train = _named(split, available)
    if test is None and eval_split != DEFAULT_EVAL_SPLIT:
        raise DataError(f"The data '{path}' has no '{eval_split}' side; it has {', '.join(available)}. Set 'eval_split' to one.")
    if train is None and test is None:
        raise DataError(f"The data '{path}' has no '{split}' side; it has {', '.join(available)}. Set 'split' to one of them.")
    reads, tests = (None if name is None else partial(read, name) for name in (train, test))
    return reads, tests


def _named(split: str, available: Collection[str]) -> str | None:
    """The name that a split has among those available: its own, or in other capitals."""
    alike = [name for name in available if name.lower() == split.lower()]
    return split if split in alike else next(iter(alike), None)


def _load_hub(path: str, is_folder: bool) -> dict[str, Dataset]:
    """Every split of a hub data set, or of a local folder in the hub's layout."""
    import datasets

    name, _, configuration = (path, "", "") if is_folder else path.partition(":")
    try:
        files = _text_files(datasets.load_dataset_builder(name)) if is_folder else {}
        loaded = {} if files else datasets.load_dataset(name, configuration or None)
    except Exception as error:  # anything a loader, a parser or the network raises: the reason is in the message
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if is_folder:
            looked = f"The folder '{path}' holds no train.* file that can be read ({', '.join(SUFFIXES)})"
            remedy = "Name its files train.jsonl and test.jsonl, or mend its hub layout."
        else:
            looked = f"There is no file or folder '{path}' in '{Path.cwd()}'"
            remedy = "Check the spelling (owner/name, or owner/name:configuration) and the network."
        raise DataError(f"{looked}, and the datasets library cannot load '{name}': {reason}. {remedy}") from error
    splits = {split: _read_all(Path(path), split, of_split) for split, of_split in files.items()}
    for split, table in loaded.items():
        names = {key: kind.names for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
        records = [{key: _class_name(value, names.get(key)) for key, value in record.items()} for record in table.to_list()]
        rows = [Row(fields, f"{path}/{split}:{number}") for number, fields in enumerate(records, 1)]
        if rows:
            splits[str(split)] = Dataset(f"{path}/{split}", rows)
    if not splits:
        raise DataError(f"The data '{path}' holds no rows. Check that it is the right one.")
    return splits


def _text_files(builder: Any) -> dict[str, list[Path]]:
    """CSV or JSON files by split, as the datasets library finds them in a folder; {} where others are among them or the folder
    declares how they are to be read."""
    config = builder.config
    found = ("name", "version", "data_dir", "data_files", "description")
    if builder.info.features is not None or config != type(config)(**{name: getattr(config, name) for name in found}):
        return {}
    files = {str(split): [Path(file) for file in of_split] for split, of_split in (config.data_files or {}).items()}
    texts = tuple(suffix for suffix in SUFFIXES if suffix != ".parquet")
    ours = all(file.name.lower().endswith(texts) and file.is_file() for of_split in files.values() for file in of_split)
    return files if ours else {}


def _read_all(folder: Path, split: str, files: list[Path]) -> Dataset:
    """The rows of a split's files, their origins below the folder."""
    below = {file: Path(os.path.relpath(file, folder.resolve())).parent for file in files}
    rows = [replace(row, origin=str(below[file] / row.origin)) for file in files for row in read_file(file)]
    return Dataset(f"{folder}/{split}", rows)


def _class_name(value: Any, names: list[str] | None) -> Any:
    """The name of a class id; None for -1, which the hub uses for hidden labels."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if value >= 0 else None


def _hold_out(dataset: Dataset, recipe: Recipe, fraction: float) -> tuple[Dataset, Dataset]:
    keys = [_hash("split", recipe.identity(row)) for row in dataset.rows]
    if len(set(keys)) < 2:
        alike = len({canonical(row.fields) for row in dataset.rows}) == 1
        what = "no two different rows" if alike else "one prompt only, and rows of one prompt stay on one side: there is nothing"
        raise DataError(f"'{dataset.name}' has {what} to split. Add rows, or give the evaluation rows with eval_path.")
    limit = int(fraction * 2**64)
    held = {key for key in keys if key < limit} or {min(keys)}
    if len(held) == len(set(keys)):
        held.remove(max(keys))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for key, row in zip(keys, dataset.rows, strict=True):
        sides[key in held].append(row)
    return replace(dataset, rows=sides[0]), replace(dataset, name=f"{dataset.name} (held out)", rows=sides[1])


def _sample(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or len(dataset.rows) <= limit:
        return dataset
    order = sorted(range(len(dataset.rows)), key=lambda index: (_hash("sample", canonical(dataset.rows[index].fields)), index))
    return replace(dataset, rows=[dataset.rows[index] for index in sorted(order[:limit])])


def _hash(salt: str, content: bytes) -> int:
    """A hash in [0, 2^64) of salt and content."""
    return int.from_bytes(hashlib.sha256(salt.encode() + b"\0" + content).digest()[:8], "big")
