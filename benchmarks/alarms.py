"""Alarms of runs that were made without one, from their evaluations.

    python -m benchmarks.alarms runs/mine/vader/MovingShapes-HPS/seed_0

Writes alarms.jsonl as `algos.run` would have done with a watching `algos.alarm.Alarm`; a report shows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: folders of runs. Returns the exit code: 0; 2, and nothing is written, where one is no run."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    wrong = [folder for folder in folders if not (folder / "run.json").exists()]
    if wrong or not folders:
        problem = f"{wrong[0]} holds no run.json" if wrong else "give the folders of one run or several"
        print(f"alarms: {problem}", file=sys.stderr)
        return 2
    from algos.alarm import ALARMS, Alarm, alarms, message
    from algos.run_files import read_json, read_rows, replace_file, rows_as_bytes

    for folder in folders:
        split = read_json(folder / "run.json").get("task", {}).get("eval_split")
        rows = [row for row in read_rows(folder / "eval.jsonl") if split in (None, row["split"])]
        found = alarms(rows, Alarm())
        replace_file(folder / ALARMS, rows_as_bytes(found))
        print(f"{folder}: {'; '.join(map(message, found)) or 'no alarm'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
