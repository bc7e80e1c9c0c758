"""Times our preprocessing against Pillow and against transformers' image processor.

    python -m benchmarks.preprocess [--kind tiles|pad|stretch] [--tile 512|384]
        [--rounds N] [--size WIDTHxHEIGHT ...] [--json]

`tiles` is SmolVLM's way, `pad` MobileVLM's with its 336 pixels and `stretch` OmniVLM's with 384.

Three comparisons a picture, each timed in turns so that a busy machine slows both sides alike;
medians, and reference time over ours (above 1: ours is faster):

* `resize`: the resizes alone. Ours makes the tiles of them as well; Pillow's start and end as
  Pillow pictures, with no array made.
* `first`: the same with no coefficients kept, as for the first picture of a size.
* `values`: picture to normalised float32, against the processor's whole call.

The answers are compared before anything is timed. Set OMP_NUM_THREADS=1 for one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lorgnette.runtime import resample
from lorgnette.runtime.preprocess import pixel_values, prepare, resize_steps
from lorgnette.spec import Preprocess, SquarePreprocess, TilePreprocess

SIZES = ("640x427", "3000x2000", "448x172")
Pair = tuple[Callable[[], object], Callable[[], object]]


def spec_for(kind: str, tile: int) -> Preprocess:
    """The published preprocessing; SmolVLM's of the models with tiles of that size."""
    half = (0.5, 0.5, 0.5)
    if kind == "pad":
        return SquarePreprocess(
            tile_size=336,
            fit="pad",
            background=(122, 116, 104),
            resample="bicubic",
            rescale=1 / 255,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        )
    if kind == "stretch":
        return SquarePreprocess(
            tile_size=384,
            fit="stretch",
            background=(0, 0, 0),
            resample="bicubic",
            rescale=1 / 255,
            mean=half,
            std=half,
        )
    return TilePreprocess(
        tile_size=tile,
        longest_edge=4 * tile,
        split=True,
        resample="lanczos",
        rescale=1 / 255,
        mean=half,
        std=half,
    )


def picture(width: int, height: int) -> resample.Pixels:
    """Smooth colours with noise: neither flat nor only noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)], axis=-1) * 100 + 128
    noise = np.random.default_rng(0).normal(0, 20, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def squared(image: Image.Image, spec: SquarePreprocess) -> Image.Image:
    """The picture on its square background, by Pillow alone; itself where it is stretched."""
    if spec.fit == "stretch":
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), spec.background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pillow_resizes(image: Image.Image, spec: Preprocess) -> Image.Image:
    """The resizes of the reference, by Pillow alone."""
    tile = (spec.tile_size, spec.tile_size)
    if isinstance(spec, SquarePreprocess):
        return squared(image, spec).resize(tile, Image.Resampling.BICUBIC)
    for height, width in [*resize_steps(image.height, image.width, spec), tile]:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def reference_for(image: Image.Image, spec: Preprocess) -> Callable[[], object]:
    """The whole way to normalised numbers, by transformers."""
    side = spec.tile_size
    numbers = {"image_mean": list(spec.mean), "image_std": list(spec.std)}
    if isinstance(spec, TilePreprocess):
        tiles = Idefics3ImageProcessorPil(
            size={"longest_edge": spec.longest_edge},
            max_image_size={"longest_edge": side},
            **numbers,
        )
        return lambda: tiles(images=[image], return_tensors="np").pixel_values[0]
    size = {"height": side, "width": side}
    if spec.fit == "stretch":
        stretch = SiglipImageProcessorPil(size=size, **numbers)
        return lambda: stretch(images=image, return_tensors="np").pixel_values
    pad = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size, **numbers)
    return lambda: pad(images=squared(image, spec), return_tensors="np").pixel_values


def pairs_for(pixels: resample.Pixels, spec: Preprocess) -> dict[str, Pair]:
    """What is timed: ours and the reference, by name."""
    image = Image.fromarray(pixels)
    reference = reference_for(image, spec)

    def first() -> object:
        resample._blocks.cache_clear()
        return prepare(pixels, spec)

    def values() -> object:
        return pixel_values(prepare(pixels, spec).pixels, spec)

    if not np.array_equal(np.asarray(values()), np.asarray(reference())):
        raise SystemExit("ours and the reference differ: nothing to time")

    def pillow() -> object:
        return pillow_resizes(image, spec)

    return {
        "resize": (lambda: prepare(pixels, spec), pillow),
        "first": (first, pillow),
        "values": (values, reference),
    }


def time_in_turns(pair: Pair, rounds: int) -> tuple[float, float]:
    """Median milliseconds of both, one after the other in each round, first each warmed up once."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for call, kept in zip(pair, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                kept.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Prints one line a picture and comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", nargs="*", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--kind", choices=["tiles", "pad", "stretch"], default="tiles")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spec = spec_for(options.kind, options.tile)
    results: list[tuple[str, str, float, float]] = []
    for size in options.size:
        width, height = map(int, size.split("x"))
        for name, pair in pairs_for(picture(width, height), spec).items():
            results.append((size, name, *time_in_turns(pair, options.rounds)))
    if options.json:
        keys = ("size", "what", "ours_ms", "reference_ms")
        rows = [dict(zip(keys, row, strict=True)) for row in results]
        print(json.dumps({"threads": os.environ.get("OMP_NUM_THREADS"), "results": rows}))
        return
    print(f"{'picture':>10} {'what':>7} {'ours ms':>9} {'reference ms':>13} {'ratio':>6}")
    for size, name, ours, reference in results:
        print(f"{size:>10} {name:>7} {ours:9.1f} {reference:13.1f} {reference / ours:6.2f}")


if __name__ == "__main__":
    main()
