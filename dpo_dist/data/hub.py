"""A hub data set, by the library `datasets`: the only file that imports it, and only loaded where one is named."""

from pathlib import Path

import datasets

from dpo_dist.config import DataSource
from dpo_dist.errors import DataError


def load_split(source: DataSource, key: str) -> datasets.Dataset:
    """One split of a hub data set, downloaded or from the library's cache.

    Args:
        source: path, name, revision and split.
        key: the entry's place in the configuration, for messages.
    Raises:
        DataError: it cannot be loaded, or is empty.
    """
    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    # The library raises anything from ConnectionError to pickle errors, depending on network, cache and data set.
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else "no details"
        raise DataError(
            f"{key}.path={source.path} is not a local file or folder ({Path(source.path).absolute()} does not exist), "
            f"and split {source.split} of the hub data set cannot be loaded ({type(error).__name__}: {detail}); "
            "correct path, name, revision or split, go online, or download the data set and give the local path"
        ) from error
    if not isinstance(dataset, datasets.Dataset) or len(dataset) == 0:
        raise DataError(f"{key}.path={source.path} has no rows in split {source.split}; set another split")
    return dataset
