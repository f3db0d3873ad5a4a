"""Grids of small pictures with labels one can read: originals beside reconstructions, samples by caption.

Labels stand in a margin, never on a picture, so a 64x64 picture stays whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Row = Sequence[np.ndarray] | np.ndarray
"""Pictures, each uint8 RGB (H, W, 3)."""
GAP = 4
PAPER = (255, 255, 255)
INK = (45, 50, 58)
MARK = (214, 92, 22)
FONT_SIZE = 12


def grid(
    pictures: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    marked: Collection[int] = (),
    title: str = "",
) -> Image.Image:
    """Pictures in rows, left to right, top to bottom, all in cells of the largest one's size.

    Args:
        pictures: uint8 RGB, each (H, W, 3); or one array (N, H, W, 3).
        captions: text below each picture, wrapped to its cell.
        scale: how many pixels, each way, one pixel of a picture takes.
        title: one line above everything, cut where the sheet ends.
        marked: positions that get a coloured frame, such as the combinations never seen in training.

    Raises ValueError for no pictures, another type than uint8, or a count of labels that does not fit.
    """
    if len(pictures) == 0 or columns < 1 or scale < 1:
        raise ValueError(f"a grid takes pictures, columns >= 1 and scale >= 1: {len(pictures)}, {columns}, {scale}")
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a picture is uint8 (H, W, 3), not {picture.dtype} {picture.shape}")
    rows = math.ceil(len(pictures) / columns)
    for labels, wanted, what in (
        (captions, len(pictures), "captions"),
        (row_labels, rows, "row labels"),
        (column_labels, columns, "column labels"),
    ):
        if labels is not None and len(labels) != wanted:
            raise ValueError(f"{len(labels)} {what} for {wanted}")

    font = label_font(FONT_SIZE)
    line = FONT_SIZE + 3
    cell_h = scale * max(p.shape[0] for p in pictures)
    cell_w = scale * max(p.shape[1] for p in pictures)
    if column_labels:
        cell_w = max(cell_w, *(_width(font, label) for label in column_labels))
    if captions:  # a cell grows by half at most, so that an ordinary word stands whole
        words = {word for text in captions for word in text.split()}
        cell_w = max(cell_w, min(max((_width(font, word) for word in words), default=0), cell_w * 3 // 2))
    wrapped = [_wrap(font, text, cell_w) for text in captions or [""] * len(pictures)]
    below = [line * max(len(lines) for lines in wrapped[i : i + columns]) for i in range(0, len(pictures), columns)]
    left = 2 * GAP + max(_width(font, label) for label in row_labels) if row_labels else GAP
    heading = GAP + line if title else 0
    top = heading + (2 * GAP + line if column_labels else GAP)

    tops = [top + row * (cell_h + GAP) + sum(below[:row]) for row in range(rows + 1)]
    sheet = Image.new("RGB", (left + columns * (cell_w + GAP), tops[-1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, font)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        x, y = left + column * (cell_w + GAP), tops[row]
        image = Image.fromarray(picture)
        if scale > 1:
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(image, (x + (cell_w - image.width) // 2, y))
        if index in marked:
            offset = (cell_w - image.width) // 2
            box = (x + offset - 3, y - 3, x + offset + image.width + 2, y + image.height + 2)
            draw.rectangle(box, outline=MARK, width=2)
        for number, text in enumerate(wrapped[index]):
            draw.text((x + cell_w / 2, y + cell_h + 1 + number * line), text, INK, font, anchor="ma")
    for row, label in enumerate(row_labels or ()):
        draw.text((left - GAP, tops[row] + cell_h / 2), label, INK, font, anchor="rm")
    for column, label in enumerate(column_labels or ()):
        draw.text((left + column * (cell_w + GAP) + cell_w / 2, heading + GAP), label, INK, font, anchor="ma")
    return sheet


def pairs(
    originals: Sequence[np.ndarray] | np.ndarray,
    reconstructions: Sequence[np.ndarray] | np.ndarray,
    columns: int = 8,
    scale: int = 1,
) -> Image.Image:
    """Originals in one row, their reconstructions in the row below, `columns` pairs wide, as often as needed."""
    return stacked({"original": originals, "reconstruction": reconstructions}, columns, scale)


def stacked(
    rows: Mapping[str, Row],
    columns: int = 8,
    scale: int = 1,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """A row of each name, one below another, `columns` pictures wide, as often as needed; captions stand below the last.

    Raises ValueError for no pictures, or another number of captions or of pictures in one row than in another.
    """
    counts = {name: len(row) for name, row in rows.items()} | ({} if captions is None else {"captions": len(captions)})
    count = max(counts.values(), default=0)
    if not count or set(counts.values()) != {count}:
        raise ValueError(f"as many are wanted of each: {counts}")
    columns = min(columns, count)
    *_, last = rows
    blank = np.full_like(np.asarray(rows[last][0]), 255)
    cells: list[np.ndarray] = []
    texts: list[str] = []
    for start in range(0, count, columns):
        for name, row in rows.items():
            shown = [np.asarray(p) for p in row[start : start + columns]]
            told = list(captions[start : start + columns]) if captions is not None and name == last else []
            cells += shown + [blank] * (columns - len(shown))
            texts += told + [""] * (columns - len(told))
    labels = [*rows] * (len(cells) // columns // len(rows))
    return grid(cells, columns, captions=texts, scale=scale, row_labels=labels)


def veiled(picture_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """A picture with a chequerboard where its mask is set, as editors show what is not there."""
    rows, columns = np.indices(mask_HW.shape) // max(1, min(mask_HW.shape) // 16)
    board = np.where((rows + columns) % 2, 205, 240).astype(np.uint8)
    return np.where(np.asarray(mask_HW)[..., None] > 0, board[..., None], picture_HWC)


def enlarged(picture_HWC: np.ndarray, factor: int) -> np.ndarray:
    """A picture, each of its pixels repeated."""
    return picture_HWC.repeat(factor, axis=0).repeat(factor, axis=1)


def filmstrips(clips: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, scale: int = 1) -> Image.Image:
    """A contact sheet of clips, uint8 (T, H, W, 3): each a row of at most `columns` of its frames, evenly spread in time."""
    count = len(clips[0])
    shown = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    return grid(
        [clip[t] for clip in clips for t in shown],
        columns=len(shown),
        scale=scale,
        row_labels=captions,
        column_labels=[f"frame {t}" for t in shown],
    )


def save_png(image: Image.Image | np.ndarray, path: Path | str, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with `text` (how the picture was made: seed, steps, caption) in its text chunks."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)  # iTXt: UTF-8, as captions need
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, format="PNG", pnginfo=chunks)


@functools.cache
def label_font(size: int) -> FreeTypeFont:
    """DejaVu Sans out of matplotlib's package data: the same letters on every machine, fonts installed or not."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _width(font: FreeTypeFont, text: str) -> int:
    return math.ceil(font.getlength(text))


def _wrap(font: FreeTypeFont, text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a word that is too long gets an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(font, f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while _width(font, word) > width and len(word) > 1:
            word = word[:-2] + "…"
        lines.append(word)
    return lines
