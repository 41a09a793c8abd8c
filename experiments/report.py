"""One self-contained page about a run: ``python -m experiments.report FOLDER [FOLDER]``.

Made from the files of the run alone, so it can be made at any time, also while it goes on.
"""

import pathlib
import sys

from absl import app

from experiments.engine import files, page, settings


def main(argv: list[str]) -> None:
    """Writes FOLDER/report.html for each folder given."""
    if len(argv) < 2:
        sys.exit("error: name the folders of runs, as in runs/digits-lenet_300_100-granet-0.98-0.")
    for folder in map(pathlib.Path, argv[1:]):
        with settings.errors_in_one_line():
            if not any("epoch" in record for record in files.read_history(folder)):
                raise ValueError(f"{folder} holds no run that has finished an epoch.")
            method = files.read_json(folder, "settings.json")["method"]
            page.write(folder / "report.html", {method: [folder]})
            print(f"written: {folder}/report.html")


if __name__ == "__main__":
    app.run(main)
