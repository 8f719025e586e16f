"""Millions of photos: an Arrow table in, an Arrow table out, and jobs of resumable Parquet shards.

    table        photos in a table -> what the model says of them, row by row
    classifier   the same as a callable that engines send to their workers
    job          what a directory of shards was begun with: its photos and settings
    shards       the shards of a job, each whole or absent

Needs pyarrow, of the extra `parquet`.
"""

from microclip_deploy.errors import missing_package

try:
    from microclip_deploy.bulk.classifier import Classifier
    from microclip_deploy.bulk.table import classify_table
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    raise missing_package("pyarrow", "parquet") from error

__all__ = ["Classifier", "classify_table"]
