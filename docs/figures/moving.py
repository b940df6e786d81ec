r"""Turn some seconds of a film into the moving picture of the README.

ncrl evaluate runs/MontezumaRevenge-1 --episodes 0 --video montezuma.mp4 --seed 26
python docs/figures/moving.py montezuma.mp4 docs/figures/montezuma.webp \
    --first 556 --pictures 95 --quality 18
"""

from __future__ import annotations

import argparse

import cv2
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("film")
    parser.add_argument("out")
    parser.add_argument("--first", type=int, default=0, help="picture to begin with")
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--quality", type=int, default=30, help="of WebP, up to 100")
    options = parser.parse_args()
    film = cv2.VideoCapture(options.film)
    rate = film.get(cv2.CAP_PROP_FPS)
    film.set(cv2.CAP_PROP_POS_FRAMES, options.first)
    pictures = []
    for _ in range(options.pictures):
        found, picture = film.read()
        if not found:
            break
        size = options.width, round(options.width * picture.shape[0] / picture.shape[1])
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        pictures.append(Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)))
    if not pictures:
        parser.error(f"no picture {options.first} in {options.film}")
    pictures[0].save(
        options.out,
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / rate),
        loop=0,
        quality=options.quality,
        method=6,
    )


if __name__ == "__main__":
    main()
