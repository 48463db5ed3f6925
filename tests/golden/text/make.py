"""Makes the Parquet files beside it, with pyarrow, and checks them: python3 make.py."""

from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

FOLDER = Path(__file__).parent
TEXTS = [
    "A river ran past the mill .\nNobody knew its name .\n",
    "Caf\u00e9 \u65e5\u672c \U0001f680",
    None,
    "",
    "The last of them .",
]

table = pyarrow.table(
    {
        "id": pyarrow.array(range(len(TEXTS)), pyarrow.int64()),
        "text": pyarrow.array(TEXTS, pyarrow.string()),
        "title": pyarrow.array([f"Title {n}" for n in range(len(TEXTS))], pyarrow.large_string()),
        "tags": pyarrow.array([["a", "b"]] * len(TEXTS), pyarrow.list_(pyarrow.string())),
    }
)
for compression in ["none", "snappy", "gzip", "zstd", "lz4"]:
    path = FOLDER / f"{compression}.parquet"
    # Two rows a group; a dictionary in some of them.
    parquet.write_table(
        table, path, compression=compression, row_group_size=2, use_dictionary=compression != "zstd"
    )
    assert parquet.read_table(path).column("text").to_pylist() == TEXTS
print(pyarrow.__version__)
