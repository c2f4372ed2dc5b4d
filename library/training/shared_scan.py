"""One look at the data for all processes: what they see must be the same, and one of each machine looks."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from library.data.config import DatasetConfig
from library.data.records import RecordTable, scan
from library.errors import UserError
from library.training import together


def scan_together(datasets: Sequence[DatasetConfig], accelerator: Accelerator) -> RecordTable:
    """The table of all images, scanned by the first process of each machine and shared by the others there.

    UserError if machines see different images: their processes would wait for each other for ever.
    """
    if accelerator.num_processes == 1:
        return scan(datasets)
    table = scan(datasets) if accelerator.is_local_main_process else None
    seen = [(platform.node(), str(table.folder), digest(table))] if table is not None else []
    found = [one for each in together.gather(seen) for one in each]
    if len({columns for _, _, columns in found}) > 1:
        raise UserError(
            "the machines do not see the same images: compare the folders of the datasets, and start again when "
            "nothing is being copied into them"
        )
    if table is None:
        table = RecordTable(Path(next(folder for machine, folder, _ in found if machine == platform.node())))
    return table


def digest(table: RecordTable) -> str:
    """What tells tables apart that make different plans."""
    columns = (table.sizes, table.buckets, table.subsets, table.repeats)
    sums = hashlib.blake2b(b"".join(hashlib.blake2b(column.tobytes()).digest() for column in columns))
    for index in range(len(table)):
        sums.update(table.key(index).encode())
    return sums.hexdigest()
