#!/usr/bin/env bash
# polars 2.1.0, duckdb 2.0.1: lists of float16 that pyarrow 26.0.1 wrote as Parquet can be read, and not worked with.
#
# What is done: a column list<halffloat> is written by pyarrow, plain and with BYTE_STREAM_SPLIT, which Parquet allows
# for it. Seen: polars reads both, and `list.mean()` panics ("not implemented"); duckdb reads the plain one, and refuses
# the other ("BYTE_STREAM_SPLIT encoding is only supported for FLOAT, DOUBLE, INT32 or INT64 data").
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check polars==2.1.0 duckdb==2.0.1 pyarrow==26.0.1 numpy
cat >halves.py <<'PY'
import sys

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

values = pa.array([np.array([-1.5, -2.0], np.float16)], pa.list_(pa.float16()))
table = pa.table({"a": values})
pq.write_table(table, "plain.parquet", use_dictionary=False)
pq.write_table(table, "split.parquet", use_dictionary=False, use_byte_stream_split=True)
seen = {}
for name in ("plain", "split"):
    frame = pl.read_parquet(f"{name}.parquet")
    seen[f"polars {name}"] = str(frame.schema["a"])
    try:
        frame.select(pl.col("a").list.mean())
        seen[f"mean {name}"] = "a number"
    except BaseException as error:  # a panic is no Exception
        seen[f"mean {name}"] = type(error).__name__
    try:
        rows = duckdb.sql(f"select list_avg(a) from '{name}.parquet'").fetchall()
        seen[f"duckdb {name}"] = str(rows[0][0])
    except duckdb.Error as error:
        seen[f"duckdb {name}"] = "refused" if "BYTE_STREAM_SPLIT" in str(error) else str(error)
sys.stdout.write(f"{seen}\n")
expected = {
    "polars plain": "List(Float16)", "mean plain": "PanicException", "duckdb plain": "-1.75",
    "polars split": "List(Float16)", "mean split": "PanicException", "duckdb split": "refused",
}
sys.exit(0 if seen == expected else 1)
PY
env/bin/python halves.py 2>/dev/null
