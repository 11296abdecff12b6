"""Preference examples as text: read, validate, normalise, mix, split.

    files.py     bytes of a local file          (line, row) with the line numbers a user can look up
    compressed.py what .gz and .zst hold        bytes
    csv_rows.py  CSV                            (line, row)
    mapping.py   columns by other names         under the names they are read under
    published.py rows of well-known sets        as rows of many completions
    columns.py   the columns of a row           each checked, and in one form
    unread.py    text in columns nobody reads   refused, where there is no prompt
    meter.py     how far the reading has come   a share
    values.py    what is inside of them         text, token ids, no nulls
    json_columns.py columns that hold JSON      their values
    arrow_arrays.py numpy arrays                in Arrow
    arrow_checks.py a damaged Arrow file        an error, not a signal
    saved.py     a folder of save_to_disk       its files
    labels.py    the numbers of a row           weight, margin, probability, scores, ranks
    ranked.py    rows of many completions       which are compared
    demonstrations.py rows of a supervised run  one completion
    rows.py      one row, of any accepted shape PreferenceExample or RowFault
    held_out.py  prompts kept out of training   by their own hash
    sources.py   one entry of data.train        file, folder of splits, or hub data set
    folders.py   a folder                       the files of a split
    remote.py    a URL                          copies of its files on this machine
    remote_file.py a file on another machine    what can be asked of it: web.py, stores.py (fsspec)
    hub.py       a hub data set               by the library datasets, which nothing else imports

A *file fault* hides the rows behind it (a cut .gz or Parquet file, a JSON array that breaks off) and is always a
DataError. A *row fault* is all that is wrong with one row, whatever it is (a line that is no JSON, a column that is
missing or of the wrong type, equal or empty completions), and is returned: `data.on_bad_row` decides. Nothing here
knows tokens.
"""

from dpo_dist.data.example import Message, Pair, PreferenceExample, RowFault
from dpo_dist.data.sources import Source, open_source

__all__ = ["Message", "Pair", "PreferenceExample", "RowFault", "Source", "open_source"]
