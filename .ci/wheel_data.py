"""Write a tiny Kaggle-form set and a tiny saved backbone: ``wheel_data.py REPOSITORY FOLDER``."""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(repository: Path, folder: Path) -> None:
    sys.path.insert(0, str(repository / "tests" / "extract"))
    from tiny_models import tiny_open_clip

    (folder / "data").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 8)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageID", "Labels", "Caption"])
            for index in range(count):
                red = int(draw.integers(0, 2))
                pixels = draw.integers(0, 80, (48, 64, 3)).astype(np.uint8)
                pixels[..., 0 if red else 2] += 120
                image = f"{name}{index}.jpg"
                Image.fromarray(pixels).save(folder / "data" / image)
                rows.writerow([image, f"{red} 2" if index % 3 else str(red), f"picture {index}"])
    (folder / "backbone.txt").write_text(tiny_open_clip(folder / "backbone"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
