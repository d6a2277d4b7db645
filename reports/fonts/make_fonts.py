"""Makes the fonts of the PDF report from the Debian packages fonts-noto-core and fonts-noto-cjk.

`python -m reports.fonts.make_fonts`: needed again only when the catalogue gets characters that a font lacks, as a test
says.  Bold Chinese is for headings and names of things: the 3,755 common hanzi (level 1 of GB 2312) do for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

DEBIAN: Final = Path("/usr/share/fonts")
HERE: Final = Path(__file__).parent
CJK_SC: Final = 2  # the face for simplified Chinese in the collections
LATIN_GREEK_CYRILLIC: Final = {*range(0x20, 0x530), *range(0x1E00, 0x2400), 0xFFFD}
LEVEL_1, LEVEL_2 = 0xD7, 0xF7  # last rows of hanzi
SIGNS: Final = set(map(ord, "−×≤≥≈→□"))


def gb2312(last_row: int) -> set[int]:
    """The code points of GB 2312 up to a row: punctuation, kana, Greek, Cyrillic, then hanzi by falling frequency."""
    pairs = (bytes((row, cell)) for row in range(0xA1, last_row + 1) for cell in range(0xA1, 0xFF))
    return {ord(character) for pair in pairs for character in pair.decode("gb2312", "ignore")}


def make(source: Path, face: int, target: str, points: set[int]) -> None:
    """Writes the part of a font that has `points`; kerning and marks stay, hints and vertical writing go."""
    font = TTFont(source, fontNumber=face)
    options = Options(hinting=False, desubroutinize=False, notdef_outline=True, recalc_timestamp=False)
    options.layout_features = ["kern", "mark", "mkmk", "locl", "ccmp", "liga"]
    options.name_IDs = ["*"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=points)
    subsetter.subset(font)
    font.save(HERE / target)
    print(f"{target}: {len(font.getBestCmap()):,} characters, {(HERE / target).stat().st_size:,} bytes")


def main() -> None:
    latin, cjk = DEBIAN / "truetype/noto", DEBIAN / "opentype/noto"
    words = set(map(ord, (HERE.parent / "catalogue/zh-CN.toml").read_text("utf-8")))
    for weight in ("Regular", "Bold"):
        make(latin / f"NotoSans-{weight}.ttf", -1, f"NotoSans-{weight}.ttf", LATIN_GREEK_CYRILLIC)
    make(cjk / "NotoSansCJK-Regular.ttc", CJK_SC, "NotoSansSC-Regular.otf", gb2312(LEVEL_2) | words | SIGNS)
    make(cjk / "NotoSansCJK-Bold.ttc", CJK_SC, "NotoSansSC-Bold.otf", gb2312(LEVEL_1) | words | SIGNS)


if __name__ == "__main__":
    main()
