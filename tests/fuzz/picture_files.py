"""Small intact pictures of the less plain kinds, and PDF files, for the harness in `fuzzing.py` to damage."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pypdfium2 as pdfium
import tifffile
from PIL import Image, ImageCms

KINDS = (
    *(
        "png-deep",
        "png-palette",
        "png-icc",
        "apng",
        "jpeg-cmyk",
        "jpeg-progressive",
        "tiff-deep",
        "tiff-lzw",
        "tiff-jpeg",
    ),
    *("tiff-pages", "webp-film", "gif-film", "bmp-palette", "pdf-text", "pdf-photo", "pdf-scan"),
)
COLOUR = np.random.RandomState(0).randint(0, 255, (32, 40, 3), np.uint8)


def whole(kind: str) -> bytes:
    """An intact file of that kind."""
    stream = io.BytesIO()
    image = Image.fromarray(COLOUR)
    film = {"save_all": True, "append_images": [image.rotate(180), image.rotate(90)]}
    match kind:
        case "png-deep":
            return _png(COLOUR.astype(np.uint16) * 257)
        case "png-palette":
            image.quantize(16).save(stream, "png", transparency=3, dpi=(300, 300))
        case "png-icc":
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
            image.save(stream, "png", icc_profile=profile)
        case "apng":
            image.save(stream, "png", **film)
        case "jpeg-cmyk":
            image.convert("CMYK").save(stream, "jpeg", dpi=(300, 300))
        case "jpeg-progressive":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(stream, "jpeg", progressive=True, exif=exif)
        case "tiff-deep":
            tifffile.imwrite(stream, COLOUR.astype(np.uint16) * 257, photometric="rgb")
        case "tiff-lzw" | "tiff-jpeg":
            image.save(stream, "tiff", compression=kind.replace("-", "_").replace("tiff_jpeg", "jpeg"))
        case "tiff-pages":
            image.save(stream, "tiff", **film)
        case "webp-film":
            image.save(stream, "webp", **film)
        case "gif-film":
            image.save(stream, "gif", **film)
        case "bmp-palette":
            image.quantize(16).save(stream, "bmp")
        case "pdf-scan":
            image.resize((200, 160)).save(stream, "pdf")
        case _:
            return _pdf(photo=kind == "pdf-photo")
    return stream.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    """16-bit RGB, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _pdf(*, photo: bool) -> bytes:
    """A page with a line of text, and a photo on it or none."""
    text = b"BT /F1 12 Tf 20 180 Td (Inspection sheet, lot: A4711) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(text), text),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    plain = data + table + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(data)
    if not photo:
        return plain
    document, stream = pdfium.PdfDocument(plain), io.BytesIO()
    page = document[0]
    image = pdfium.PdfImage.new(document)
    image.set_bitmap(pdfium.PdfBitmap.from_pil(Image.fromarray(COLOUR).resize((120, 100))))
    image.set_matrix(pdfium.PdfMatrix().scale(120, 100).translate(20, 20))
    page.insert_obj(image)
    page.gen_content()
    document.save(stream)
    document.close()
    return stream.getvalue()
