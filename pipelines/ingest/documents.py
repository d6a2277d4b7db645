"""PDF and text files beside the images: their text is quoted as it stands, the pictures inside PDF pages are studies.

A document belongs to the images in its own folder; one that is called like one image belongs to that image alone.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Final, Literal

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from pipelines.ingest.files import FileRef
from pipelines.ingest.pictures import MAX_PIXELS, Decoded, decode, picture_study
from pipelines.ingest.refusals import Refusal
from pipelines.ingest.units import Unit
from pipelines.study import Document, ImageStudy, SourceFile, content_key

DocumentKind = Literal["request", "prior-report", "inspection-sheet", "text"]

MAX_PDF_BYTES: Final = 256 << 20
MAX_PDF_PAGES: Final = 500
MAX_PDF_PICTURES: Final = 200
MAX_TEXT_BYTES: Final = 1 << 20
MAX_QUOTED: Final = 20_000  # characters of one document
SCAN_SHARE: Final = 0.7  # of a page under one image, from which the image is the page
PICTURE_SHARE: Final = 0.04  # of a page: a smaller image is a logo, a bar code or a signature
PICTURE_SIDE: Final = 96  # pixels of its shorter side, likewise
TEXT_CHARACTERS: Final = 10  # letters and digits from which a page has a text layer: a scanner may stamp a page number
RENDER_DPI: Final = 200
RENDER_SIDE: Final = 4_000  # pixels, of a page that is drawn

# The kind of a document by the words in it and in its name; the kind with most of its words wins, "text" where two tie.
KIND_WORDS: Final[dict[DocumentKind, tuple[str, ...]]] = {
    "request": (
        *("request", "requisition", "referral", "clinical indication", "clinical question", "please assess"),
        *("reason for exam", "申请单", "检查申请", "送检", "临床诊断", "检查目的"),
    ),
    "prior-report": (
        *("impression", "findings", "radiology report", "previous report", "prior report", "compared with"),
        *("报告单", "诊断报告", "影像所见", "检查所见", "诊断意见", "印象"),
    ),
    "inspection-sheet": (
        *("inspection", "lot", "batch", "part no", "part number", "serial", "quality control", "work order"),
        *("检验", "质检", "批号", "批次", "料号", "序列号", "工单", "巡检"),
    ),
}

_PDFIUM: Final = threading.Lock()  # PDFium is not safe to use from several threads
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class PagePicture:
    """An image of a PDF page, or the whole page where `image` is None."""

    page: int  # 0-based
    image: int | None  # 0-based, among the images of the page
    fills_page: bool
    scanned: bool  # a page that has no text layer


@dataclass(frozen=True, slots=True)
class Contents:
    """What a document holds."""

    documents: tuple[Document, ...]  # a page with text each; empty where there is no text
    pictures: tuple[PagePicture, ...]
    flags: tuple[str, ...]  # as in `ImageStudy.quality_flags`


def read_document(ref: FileRef) -> Contents:
    """The text of a PDF or text file and the places of its pictures, which are not decoded. Raises Refusal.

    The document is read once for all studies that it belongs to, as long as it does not change.
    """
    return _read_document(ref, ref.state())


@functools.lru_cache(maxsize=64)
def _read_document(ref: FileRef, state: tuple[int, ...]) -> Contents:
    with ref.open() as stream:
        data = stream.read(MAX_PDF_BYTES + 1)
    digest = hashlib.sha256(data).hexdigest()
    if data.lstrip()[:4] == b"%PDF":
        pages, pictures = _read_pdf(data)
        media_type = "application/pdf"
    else:
        if len(data) > MAX_TEXT_BYTES:
            raise Refusal("too-large", f"The text is longer than {MAX_TEXT_BYTES >> 20} MiB.")
        pages, pictures, media_type = {None: tidy(decode_text(data))}, (), "text/plain"
    flags = {"scanned-page-without-text"} if any(each.scanned for each in pictures) else set()
    kind = kind_of(" ".join((PurePosixPath(ref.basename).stem, *pages.values())))
    documents, left = [], MAX_QUOTED
    for page, text in pages.items():
        if not text:
            continue
        if len(text) > left:
            flags.add("document-cut")
        if quoted := text[:left].rstrip():
            documents.append(Document(quoted, kind, SourceFile(ref.name, digest, media_type, page)))
        left -= len(quoted)
    return Contents(tuple(documents), pictures, tuple(sorted(flags)))


def load_page_picture(unit: Unit) -> ImageStudy:
    """Decode one image of a PDF page, or draw the page. Raises Refusal."""
    ref, page = unit.files[0], unit.page or 0
    with _opened(ref.read()) as pdf, contextlib.closing(pdf[page]) as opened:
        picture = _draw(opened) if unit.image is None else _extract(opened, unit.image)
    source = SourceFile(ref.name, ref.sha256(), "application/pdf", page)
    key = hashlib.sha256(f"{content_key((source,))} image {unit.image}".encode()).hexdigest()
    return picture_study(key, unit.name, replace(picture, spacing_mm=None), source)  # its size on paper is no scale


def kind_of(text: str) -> DocumentKind:
    """What kind of document has this text; "text" when unsure."""
    lowered = text.lower()
    scores = {
        kind: sum(bool(re.search(rf"\b{re.escape(word)}" if word.isascii() else word, lowered)) for word in words)
        for kind, words in KIND_WORDS.items()
    }
    best = max(scores.values())
    winners = [kind for kind, score in scores.items() if score == best]
    return winners[0] if best and len(winners) == 1 else "text"


# Text


def decode_text(data: bytes) -> str:
    """Bytes of a text file in UTF-8, UTF-16, GB 18030 or Latin-1. Raises Refusal for what is no text."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _decoded(data, encoding)
    if b"\0" in data[:4096]:  # UTF-16 without its mark: every other byte of most texts is 0
        zeros = data[:4096:2].count(0), data[1:4096:2].count(0)
        if max(zeros) < 4 * min(zeros) or max(zeros) * 8 < len(data[:4096]):
            raise Refusal("not-text", "It is called a text, but holds something else.")
        return _decoded(data, "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be")
    for encoding in ("utf-8", *(("gb18030",) if _looks_chinese(data) else ())):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    text = data.decode("latin-1")
    if len(re.findall("[\x00-\x08\x0e-\x1f]", text)) > len(text) / 100:
        raise Refusal("not-text", "It is called a text, but holds something else.")
    return text


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Refusal("not-text", "Its characters are damaged.") from error


def _looks_chinese(data: bytes) -> bool:
    """Whether most bytes above 127 are pairs of GB 2312's punctuation and common characters (rows 1-9 and 16-55).

    Accented letters of Latin-1 rarely are.
    """
    pairs = re.findall(rb"[\x81-\xfe][\x40-\xfe]", data)
    common = sum(pair[1] >= 0xA1 and (0xA1 <= pair[0] <= 0xA9 or 0xB0 <= pair[0] <= 0xD7) for pair in pairs)
    return bool(pairs) and common >= 0.7 * len(pairs)


def tidy(text: str) -> str:
    """The text without control characters, its line ends alike and blank lines at its ends gone."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n"))
    return text.encode("utf-8", "replace").decode().strip("\n").rstrip()


# PDF


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[pdfium.PdfDocument]:
    """The document, with PDFium locked. Raises Refusal for one that cannot be opened or read."""
    if len(data) > MAX_PDF_BYTES:
        raise Refusal("too-large", f"The PDF is larger than {MAX_PDF_BYTES >> 20} MiB.")
    with _PDFIUM:
        try:
            with contextlib.closing(pdfium.PdfDocument(data)) as pdf:
                yield pdf
        except pdfium.PdfiumError as error:
            if error.err_code == pdfium_c.FPDF_ERR_PASSWORD:
                raise Refusal("encrypted-document", "The PDF is locked with a password.") from error
            raise Refusal("damaged-document", "The PDF is damaged.") from error


def _read_pdf(data: bytes) -> tuple[dict[int | None, str], tuple[PagePicture, ...]]:
    """The text of each page, and the pictures of all pages."""
    texts: dict[int | None, str] = {}
    pictures: list[PagePicture] = []
    with _opened(data) as pdf:
        if len(pdf) > MAX_PDF_PAGES:
            raise Refusal("too-large", f"The PDF has {len(pdf):,} pages; the limit is {MAX_PDF_PAGES}.")
        for number in range(len(pdf)):
            with contextlib.closing(pdf[number]) as page:
                with contextlib.closing(page.get_textpage()) as layer:
                    texts[number] = tidy(layer.get_text_bounded())
                pictures += _pictures(page, number, has_text=_has_text(texts[number]))
    if len(pictures) > MAX_PDF_PICTURES:
        raise Refusal("too-large", f"The PDF holds {len(pictures):,} pictures; the limit is {MAX_PDF_PICTURES}.")
    return texts, tuple(pictures)


def _has_text(text: str) -> bool:
    return sum(map(str.isalnum, text)) >= TEXT_CHARACTERS


def _pictures(page: pdfium.PdfPage, number: int, *, has_text: bool) -> list[PagePicture]:
    width, height = page.get_size()
    area = max(width * height, 1e-6)
    images = _images(page)
    shares = []
    for each in images:
        left, bottom, right, top = each.get_bounds()
        shares.append(min((right - left) * (top - bottom) / area, 1.0))
    if not has_text and sum(shares) >= SCAN_SHARE:  # a scanner makes one image of a page, or several strips
        return [PagePicture(number, 0 if len(images) == 1 else None, True, True)]
    found = [
        PagePicture(number, index, share >= SCAN_SHARE, False)
        for index, (image, share) in enumerate(zip(images, shares, strict=True))
        if share >= PICTURE_SHARE and min(image.get_px_size()) >= PICTURE_SIDE
    ]
    if not (has_text or found) and any(True for _ in page.get_objects(max_depth=1)):  # drawn, or text as outlines
        return [PagePicture(number, None, True, True)]
    return found


def _images(page: pdfium.PdfPage) -> list[pdfium.PdfImage]:
    return list(page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_IMAGE], max_depth=4))


def _extract(page: pdfium.PdfPage, number: int) -> Decoded:
    """An image as it is stored, at its own size, turned with its page."""
    image = _images(page)[number]
    width, height = image.get_px_size()
    if width * height > MAX_PIXELS:
        raise Refusal("too-large", f"The image is {width:,} x {height:,} pixels; the limit is {MAX_PIXELS:,}.")
    picture = decode(image.get_bitmap().to_pil())
    return replace(picture, pixels=np.rot90(picture.pixels, -page.get_rotation() // 90))


def _draw(page: pdfium.PdfPage) -> Decoded:
    width, height = page.get_size()  # points, 72 an inch
    if not (math.isfinite(width * height) and min(width, height) > 0):
        raise Refusal("damaged-document", "The page has no size.")
    scale = min(RENDER_DPI / 72, RENDER_SIDE / max(width, height))
    return decode(page.render(scale=scale).to_pil())
