"""The paper's printed Tables 1 to 4, as files, misprints too."""

import csv
from pathlib import Path


def table(number):
    """Table 1, 2, 3 or 4 as printed: a dict for each line of table<number>.csv, accuracies in percent."""
    with open(Path(__file__).with_name(f"table{number}.csv"), newline="", encoding="utf-8") as file:
        return [{name: cell if name in ("dataset", "method") else float(cell) for name, cell in line.items()}
                for line in csv.DictReader(file)]
