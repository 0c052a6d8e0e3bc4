"""The pictures of docs/concepts/geometry.md, made by the product's own functions: `python docs/images/geometry.py`.

The photos come with scikit-image; nothing is downloaded. The same Pillow gives the same bytes.
Sizes are height, width, as everywhere in the product; places on a canvas are x, y.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from orchestration.demo.scenes import photo_folder
from pipelines.encode.geometry import Bucket, Cover, Placed, bucket_list, choose_bucket, cover, open_image, place

RESOLUTION = 1024
OWN_LIST: tuple[Bucket, ...] = ((512, 512), (1024, 1024), (416, 608), (832, 1216), (608, 416), (1216, 832))
OWN_PAIR = ((480, 720), (800, 600))
"""Sizes of the two images that are put into the own list."""

WIDTH = 1160
SMOOTH = 3
"""Everything is drawn this much larger and then reduced."""

PAPER, PANEL, INK, GREY, RULE = (236, 239, 242), (248, 249, 250), (30, 35, 42), (95, 103, 112), (196, 202, 209)
BLUE, ORANGE, GREEN, RED = (0, 94, 162), (196, 84, 0), (0, 128, 92), (184, 36, 52)
Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Example:
    """One image of the page, from its bytes to its bucket."""

    name: str
    data: bytes
    placed: Placed

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image as it is meant to be seen."""
        return self.placed.time_ids[0], self.placed.time_ids[1]

    @property
    def bucket(self) -> Bucket:
        """Where it went."""
        return self.placed.time_ids[4], self.placed.time_ids[5]

    @property
    def covering(self) -> Cover:
        """How it covers its bucket."""
        return cover(*self.size, self.bucket)

    @property
    def pixels(self) -> Image.Image:
        """What is encoded."""
        return Image.fromarray(self.placed.pixels)

    @property
    def kept_ratio(self) -> float:
        """Share of the resized image that is inside the bucket."""
        return math.prod(self.bucket) / (self.covering.height * self.covering.width)


class Canvas:
    """A drawing in points of the finished picture; what is drawn is larger and is reduced at the end."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SMOOTH, height * SMOOTH), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, at: Point, text: str, *, size: int = 22, colour: Colour = INK, bold: bool = False, anchor: str = "lm"
    ) -> None:
        """One line of text; the anchor is Pillow's ("lm": the point is the middle of the left edge)."""
        font = ImageFont.load_default(size=size * SMOOTH)
        assert isinstance(font, ImageFont.FreeTypeFont)  # it is one whenever a size is given
        font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # the other engine is not in every Pillow
        weight = size * SMOOTH / 80 if bold else 0  # Pillow brings no bold font
        self.draw.text(_large(at), text, colour, font, anchor=anchor, stroke_width=weight)

    def photo(self, at: Point, size: Point, photo: Image.Image) -> None:
        """A photo in the rectangle at x, y of width, height."""
        width, height = (round(side * SMOOTH) for side in size)
        self.image.paste(photo.resize((width, height), Image.Resampling.BICUBIC), _large(at))

    def fade(self, at: Point, size: Point) -> None:
        """Blend a rectangle into the paper."""
        left, top = _large(at)
        box = (left, top, left + round(size[0] * SMOOTH), top + round(size[1] * SMOOTH))
        part = self.image.crop(box)
        self.image.paste(Image.blend(part, Image.new("RGB", part.size, PAPER), 0.62), box)

    def frame(self, at: Point, size: Point, colour: Colour, *, width: float = 3, fill: Colour | None = None) -> None:
        """The outline of a rectangle; it lies around the rectangle."""
        edge = round(width * SMOOTH)
        left, top = _large(at)
        right, bottom = left + round(size[0] * SMOOTH), top + round(size[1] * SMOOTH)
        self.draw.rectangle((left - edge, top - edge, right + edge - 1, bottom + edge - 1), fill, colour, edge)

    def line(self, points: Sequence[Point], colour: Colour, *, width: float = 2) -> None:
        """A line through points."""
        self.draw.line([_large(point) for point in points], colour, round(width * SMOOTH), joint="curve")

    def dot(self, at: Point, colour: Colour, *, radius: float = 6) -> None:
        """A filled circle with a thin light edge."""
        self.draw.circle(_large(at), (radius + 1.5) * SMOOTH, PANEL)
        self.draw.circle(_large(at), radius * SMOOTH, colour)

    def arrow(self, start: Point, end: Point, colour: Colour = GREY, *, width: float = 3) -> None:
        """A line with a head at its end."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        head = 5 * width
        neck = (end[0] - head * math.cos(angle), end[1] - head * math.sin(angle))
        self.line((start, neck), colour, width=width)
        side = (-math.sin(angle) * head / 2, math.cos(angle) * head / 2)
        corners = (end, (neck[0] + side[0], neck[1] + side[1]), (neck[0] - side[0], neck[1] - side[1]))
        self.draw.polygon([_large(corner) for corner in corners], colour)

    def finished(self) -> Image.Image:
        """The picture."""
        return self.image.reduce(SMOOTH)


def _large(point: Point) -> tuple[int, int]:
    return round(point[0] * SMOOTH), round(point[1] * SMOOTH)


def sides(size: tuple[int, int]) -> str:
    """A size as the pictures write it: the font has no multiplication sign."""
    return f"{size[0]} x {size[1]}"


def photo(name: str, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """A photo of scikit-image, or a part of it (left, top, right, bottom)."""
    with Image.open(photo_folder() / name) as image:
        return image.convert("RGB").crop(box or (0, 0, *image.size))


def png(image: Image.Image, orientation: int = 1) -> bytes:
    """A file of an image, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif, compress_level=1)
    return buffer.getvalue()


def cut_out() -> Image.Image:
    """The cup of coffee with everything around it and its saucer transparent."""
    cup = photo("coffee.png", (60, 0, 500, 400))
    mask = Image.new("L", (cup.width * SMOOTH, cup.height * SMOOTH), 0)
    for ellipse in ((18, 32, 420, 387), (113, 17, 347, 160)):  # the saucer, the rim of the cup
        ImageDraw.Draw(mask).ellipse([side * SMOOTH for side in ellipse], 255)
    cup.putalpha(mask.reduce(SMOOTH))
    return cup


def place_pair(data_0: bytes, data_1: bytes, buckets: Sequence[Bucket]) -> tuple[Bucket, Placed, Placed]:
    """Return both images of a pair in their common bucket."""
    image_0, image_1 = open_image(data_0), open_image(data_1)
    bucket = choose_bucket((image_0.height, image_0.width), (image_1.height, image_1.width), tuple(buckets))
    return bucket, place(image_0, bucket), place(image_1, bucket)


def examples() -> dict[str, Example]:
    """Every image of the page by its name; an image alone is a pair with itself."""
    cat = png(photo("chelsea.png", (0, 30, 451, 270)))
    astronaut = png(photo("astronaut.png"))
    sideways = png(photo("astronaut.png", (60, 0, 444, 512)).transpose(Image.Transpose.ROTATE_90), orientation=6)
    cup = png(cut_out())
    rocket = png(photo("rocket.jpg"))
    default, square = bucket_list(RESOLUTION, True), bucket_list(RESOLUTION, False)
    _, image_0, image_1 = place_pair(cat, astronaut, default)
    found = (
        Example("image_0", cat, image_0),
        Example("image_1", astronaut, image_1),
        Example("EXIF orientation", sideways, place_pair(sideways, sideways, default)[1]),
        Example("alpha", cup, place_pair(cup, cup, default)[1]),
        Example("buckets: true", rocket, place_pair(rocket, rocket, default)[1]),
        Example("buckets: false", rocket, place_pair(rocket, rocket, square)[1]),
    )
    return {example.name: example for example in found}


def _plane(canvas: Canvas, corner: Point, *, reach: int, ticks: Sequence[int]) -> Callable[[Point], Point]:
    """Axes from the corner (lower left) on; gives the function from a height and width to a place."""
    side = 450

    def at(size: Point) -> Point:
        return corner[0] + size[1] / reach * side, corner[1] - size[0] / reach * side

    canvas.frame((corner[0], corner[1] - side), (side, side), RULE, width=1, fill=PANEL)
    for tick in ticks:
        canvas.text((at((0, tick))[0], corner[1] + 20), str(tick), size=18, colour=GREY, anchor="mm")
        canvas.text((corner[0] - 10, at((tick, 0))[1]), str(tick), size=18, colour=GREY, anchor="rm")
    canvas.text((corner[0] + side, corner[1] + 46), "width", size=18, colour=GREY, anchor="rm")
    canvas.text((corner[0] - 10, corner[1] - side + 8), "height", size=18, colour=GREY, anchor="rm")
    return at


def draw_buckets() -> Image.Image:
    """Figure 1: the default list, and the choice among a list of one's own."""
    canvas = Canvas(630)
    _draw_default_list(canvas)
    _draw_own_list(canvas)
    return canvas.finished()


def _draw_default_list(canvas: Canvas) -> None:
    buckets = bucket_list(RESOLUTION, True)
    canvas.text((40, 34), "buckets: true", size=24, bold=True)
    canvas.text((40, 66), f"SDXL's own {len(buckets)} buckets, resolution {RESOLUTION}", size=20, colour=GREY)
    at = _plane(canvas, (104, 560), reach=2400, ticks=(512, 1024, 1536, 2048))
    for height, width in buckets:
        canvas.line((at((height, 0)), at((height, width)), at((0, width))), RULE, width=1)
    canvas.line([at((RESOLUTION**2 / width, width)) for width in range(470, 2391, 10)], GREY, width=1.5)
    for bucket in buckets:
        canvas.dot(at(bucket), BLUE, radius=4.5)
    for bucket in ((832, 1216), (1024, 1024), (1216, 832), (2048, 512)):
        canvas.text((at(bucket)[0] + 14, at(bucket)[1] - 9), sides(bucket), size=18)
    canvas.text((at((512, 2048))[0] + 6, at((512, 2048))[1] - 32), sides((512, 2048)), size=18, anchor="mm")
    canvas.text(at((1690, 700)), f"area {sides((RESOLUTION, RESOLUTION))}", size=18, colour=GREY)


def _draw_own_list(canvas: Canvas) -> None:
    chosen = choose_bucket(*OWN_PAIR, OWN_LIST)
    canvas.text((610, 34), "buckets: a list of your own", size=24, bold=True)
    canvas.text((610, 66), "The nearest aspect wins; of equals, the nearest area", size=20, colour=GREY)
    at = _plane(canvas, (674, 560), reach=1400, ticks=(256, 512, 768, 1024, 1280))
    for height, width in OWN_LIST:
        longest = 1400 / max(height, width)
        canvas.line((at((0, 0)), at((height * longest, width * longest))), RULE, width=1.5)
    mean = (math.sqrt(OWN_PAIR[0][0] * OWN_PAIR[1][0]), math.sqrt(OWN_PAIR[0][1] * OWN_PAIR[1][1]))
    for size, colour, name in zip(OWN_PAIR, (BLUE, ORANGE), ("image_0", "image_1"), strict=True):
        canvas.line((at(size), at(mean)), colour, width=2)
        canvas.dot(at(size), colour)
        canvas.text((at(size)[0] + 14, at(size)[1]), name, colour=colour, bold=True, size=20)
    start, end = at(mean), at(chosen)
    canvas.arrow(start, (start[0] + 0.78 * (end[0] - start[0]), start[1] + 0.78 * (end[1] - start[1])), GREEN)
    for bucket in bucket_list(RESOLUTION, OWN_LIST):
        colour = GREEN if bucket == chosen else GREY
        canvas.dot(at(bucket), colour)
        canvas.text((at(bucket)[0] - 14, at(bucket)[1] - 8), sides(bucket), size=18, colour=colour, anchor="rm")
    canvas.dot(at(mean), INK)
    canvas.text((at(mean)[0] + 14, at(mean)[1]), "mean", bold=True, size=20)


def _draw_covering(canvas: Canvas, at: Point, scale: float, example: Example) -> Point:
    """The image resized until it covers its bucket, the bucket outlined and the rest faded; gives the outline's place.

    Args:
        at: Upper left corner of the resized image.
        scale: Points of the picture for a pixel of the resized image.
    """
    covering, (height, width) = example.covering, example.bucket
    whole = (covering.width * scale, covering.height * scale)
    inside = (at[0] + covering.left * scale, at[1] + covering.top * scale)
    canvas.photo(at, whole, open_image(example.data))
    canvas.fade(at, whole)
    canvas.photo(inside, (width * scale, height * scale), example.pixels)
    canvas.frame(inside, (width * scale, height * scale), GREEN)
    return inside


def draw_pair(found: dict[str, Example]) -> Image.Image:
    """Figure 2: both images of a pair, covering their bucket, in it, and what stretching would have made of them."""
    canvas = Canvas(838)
    pair = (found["image_0"], found["image_1"])
    height, width = pair[0].bucket
    scale = 0.23
    shape = (width * scale, height * scale)
    widest = max(example.covering.width for example in pair) * scale
    left, middle, right = 40, 40 + widest + 84, WIDTH - 40 - shape[0]
    canvas.text((left, 34), "Resized to cover the bucket", size=24, bold=True)
    canvas.text((middle, 34), f"Encoded: {height} x {width}", size=24, bold=True, colour=GREEN)
    canvas.text((right, 34), "Not done: stretched", size=24, bold=True, colour=RED)
    y = 64.0
    for example, colour in zip(pair, (BLUE, ORANGE), strict=True):
        covering = example.covering
        _, top = _draw_covering(canvas, (left + (widest - covering.width * scale) / 2, y), scale, example)
        canvas.arrow((left + widest + 24, top + shape[1] / 2), (middle - 26, top + shape[1] / 2))
        y += covering.height * scale + 24
        canvas.text((left, y), example.name, bold=True, colour=colour)
        canvas.text((left + 96, y), f"{sides(example.size)}, resized to {covering.height} x {covering.width}")
        stretch = (width / example.size[1]) / (height / example.size[0])
        for x, picture, edge, note in (
            (middle, example.pixels, GREEN, f"crop at top {covering.top}, left {covering.left}"),
            (right, open_image(example.data), RED, f"{stretch:.2f} times as wide"),
        ):
            canvas.photo((x, top), shape, picture)
            canvas.frame((x, top), shape, edge)
            canvas.text((x, top + shape[1] + 24), note, colour=RED if edge == RED else INK)
        y += 40
    _draw_aspects(canvas, y + 102, pair)
    return canvas.finished()


def _draw_aspects(canvas: Canvas, y: float, pair: tuple[Example, Example]) -> None:
    """The buckets on an axis of log aspect, both images, their mean and the bucket that is nearest to it."""

    def at(aspect: float) -> float:
        return WIDTH / 2 + math.log(aspect) * 360

    canvas.text((40, y - 56), "Width : height of every bucket", size=20, colour=GREY)
    canvas.line(((at(1 / 4.4), y), (at(4.4), y)), RULE)
    for height, width in bucket_list(RESOLUTION, True):
        canvas.line(((at(width / height), y - 9), (at(width / height), y + 9)), GREY, width=1.5)
    for aspect, label in ((1 / 4, "1 : 4"), (1 / 2, "1 : 2"), (1, "1 : 1"), (2, "2 : 1"), (4, "4 : 1")):
        canvas.text((at(aspect), y + 28), label, size=18, colour=GREY, anchor="mm")
    bucket = pair[0].bucket
    chosen = at(bucket[1] / bucket[0])
    canvas.line(((chosen, y - 9), (chosen, y + 40)), GREEN, width=4)
    canvas.text((chosen, y + 56), f"bucket {sides(bucket)}", bold=True, colour=GREEN, anchor="mm", size=20)
    aspects = [example.size[1] / example.size[0] for example in pair]
    marks = (*aspects, math.sqrt(math.prod(aspects)))
    for aspect, colour, name in zip(marks, (BLUE, ORANGE, INK), ("image_0", "image_1", "mean"), strict=True):
        canvas.arrow((at(aspect), y - 42), (at(aspect), y - 13), colour)
        canvas.text((at(aspect), y - 56), name, bold=True, colour=colour, anchor="mm", size=20)


def _checkered(image: Image.Image) -> Image.Image:
    """An image with alpha on the usual squares."""
    squares = Image.new("RGBA", image.size, (255, 255, 255, 255))
    draw = ImageDraw.Draw(squares)
    for x in range(0, image.width, 20):
        for y in range(x // 20 % 2 * 20, image.height, 40):
            draw.rectangle((x, y, x + 19, y + 19), (196, 200, 206, 255))
    return Image.alpha_composite(squares, image).convert("RGB")


def draw_opening(found: dict[str, Example]) -> Image.Image:
    """Figure 3: what a file holds, and what is encoded of it."""
    canvas = Canvas(372)
    top, side = 70, 232
    x = 40.0
    for name, title in (("EXIF orientation", "EXIF orientation 6"), ("alpha", "Alpha")):
        example = found[name]
        with Image.open(io.BytesIO(example.data)) as file:
            stored = _checkered(file) if file.mode == "RGBA" else file.convert("RGB")
        canvas.text((x, 34), title, size=24, bold=True)
        for picture, colour, note in (
            (stored, GREY, f"The file: {stored.height} x {stored.width}"),
            (example.pixels, GREEN, f"Encoded: {sides(example.bucket)}"),
        ):
            scale = side / max(picture.size)
            size = (picture.width * scale, picture.height * scale)
            above = top + (side - size[1]) / 2
            canvas.photo((x, above), size, picture)
            canvas.frame((x, above), size, colour)
            canvas.text((x, top + side + 32), note, colour=colour, bold=colour == GREEN)
            x += size[0] + 56
            if colour == GREY:
                canvas.arrow((x - 44, top + side / 2), (x - 14, top + side / 2))
        x = WIDTH - 40 - 2 * side - 56
    return canvas.finished()


def draw_square(found: dict[str, Example]) -> Image.Image:
    """Figure 4: a wide photo in a bucket and in the official script's square, with the time ids of both."""
    canvas = Canvas(560)
    both = (found["buckets: true"], found["buckets: false"])
    original = open_image(both[0].data)
    wide, top, scale = 400, 70, 0.27
    canvas.text((40, 34), f"A photo of {sides(both[0].size)}", size=24, bold=True)
    canvas.photo((40, top), (wide, original.height * wide / original.width), original)
    lines = ("original height, width", "crop top, left", "target height, width", "Share of the photo")
    canvas.text((40, 380), "The six time ids", bold=True)
    for line, label in enumerate(lines):
        canvas.text((40, 420 + 34 * line), label, colour=GREY if line < 3 else INK, bold=line == 3)
        canvas.line(((40, 403 + 34 * line), (WIDTH - 40, 403 + 34 * line)), RULE, width=1)
    for x, example, colour in zip((478, WIDTH - 40 - RESOLUTION * scale), both, (GREEN, ORANGE), strict=True):
        covering, (height, width) = example.covering, example.bucket
        shrunk = wide / covering.width
        inside = (40 + covering.left * shrunk, top + covering.top * shrunk)
        canvas.frame(inside, (width * shrunk, height * shrunk), colour)
        canvas.text((x, 34), example.name, size=24, bold=True, colour=colour)
        canvas.photo((x, top), (width * scale, height * scale), example.pixels)
        canvas.frame((x, top), (width * scale, height * scale), colour)
        ids = example.placed.time_ids
        values = (*(f"{ids[at]}, {ids[at + 1]}" for at in (0, 2, 4)), f"{100 * example.kept_ratio:.0f} %")
        for line, value in enumerate(values):
            canvas.text((x, 420 + 34 * line), value, colour=colour if "%" in value else INK, bold="%" in value)
    return canvas.finished()


def write(folder: Path) -> list[Path]:
    """Draw every figure into a folder."""
    found = examples()
    figures = {
        "geometry-buckets.png": draw_buckets(),
        "geometry-pair.jpg": draw_pair(found),
        "geometry-opening.jpg": draw_opening(found),
        "geometry-square.jpg": draw_square(found),
    }
    for name, figure in figures.items():
        figure.save(folder / name, optimize=True, quality=78, progressive=True)  # PNG takes only the first of these
    return [folder / name for name in figures]


if __name__ == "__main__":
    for path in write(Path(__file__).parent):
        print(f"{path}  {path.stat().st_size:,} bytes")
