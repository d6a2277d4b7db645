"""PDF and text files beside images: what is quoted, what is inspected, what is refused, which numbers are found."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pytest
import typst
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_doors import read, refusal
from PIL import Image
from tiny_reader import TinyReader

from pipelines.ingest import documents, load, plan
from pipelines.ingest.documents import decode_text, kind_of, read_document
from pipelines.ingest.files import FileRef
from pipelines.ingest.identifiers import PatternError, default_patterns, load_patterns
from pipelines.ingest.refusals import Refusal
from pipelines.run import Job, execute
from pipelines.study import Document, ImageStudy, SourceFile

PHOTO = np.random.RandomState(5).randint(0, 255, (200, 300, 3), np.uint8)
SHEET = """= Inspection sheet
Lot: L-4711 #linebreak() Part no. 77-1234 #linebreak() Serial: SN0042"""


def pdf(path: Path, source: str, **images: np.ndarray) -> Path:
    """A PDF typeset by typst; `images` are files that the source can name."""
    for name, pixels in images.items():
        Image.fromarray(pixels).save(path.parent / f"{name}.png")
    text = f'#set page(paper: "a5")\n#set text(font: "Libertinus Serif")\n{source}'
    path.with_suffix(".typ").write_text(text)
    path.write_bytes(typst.compile(path.with_suffix(".typ")))
    for each in (path.with_suffix(".typ"), *(path.parent / f"{name}.png" for name in images)):
        each.unlink()
    return path


def photo(path: Path, pixels: np.ndarray = PHOTO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def studies(*paths: Path) -> dict[str, ImageStudy]:
    planned = plan(paths)
    assert planned.rejections == ()
    loaded = {unit.name: load(unit) for unit in planned.units}
    assert all(isinstance(study, ImageStudy) for study in loaded.values()), loaded
    return loaded  # type: ignore[return-value]


# ---------------------------------------------------------------- which document belongs where


def test_the_text_beside_an_image_is_quoted_with_its_source(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "order.txt").write_text("Request: please assess the weld.\r\n\r\n", encoding="utf-8")
    pdf(tmp_path / "sheet.pdf", SHEET)
    study = read(tmp_path)
    quoted = {(Path(d.source.path).name, d.kind, d.source.page): d.text for d in study.documents}
    assert quoted.keys() == {("order.txt", "request", None), ("sheet.pdf", "inspection-sheet", 0)}
    assert quoted["order.txt", "request", None] == "Request: please assess the weld."
    assert "Lot: L-4711" in quoted["sheet.pdf", "inspection-sheet", 0]


def test_folders_above_and_below_do_not_count(tmp_path: Path) -> None:
    photo(tmp_path / "one" / "a.png")
    photo(tmp_path / "two" / "b.png", PHOTO[::-1])
    (tmp_path / "one" / "order.txt").write_text("Request for one.")
    (tmp_path / "above.txt").write_text("Of nobody.")
    planned = plan([tmp_path])
    assert [[d.basename for d in unit.documents] for unit in planned.units] == [["order.txt"], []]
    [left] = planned.passed_over
    assert left.path.endswith("above.txt")


def test_a_text_called_like_an_image_belongs_to_that_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        photo(tmp_path / f"{name}.png")
    for name in ("a.txt", "b.png.txt", "all.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    beside = {unit.name: [d.basename for d in unit.documents] for unit in plan([tmp_path]).units}
    assert beside == {"a.png": ["all.txt", "a.txt"], "b.png": ["all.txt", "b.png.txt"]}


def test_documents_in_an_archive_go_by_its_folders(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, "PNG")
    pdf(tmp_path / "sheet.pdf", SHEET)
    with zipfile.ZipFile(tmp_path / "lot.zip", "w") as archive:
        archive.writestr("one/a.png", stream.getvalue())
        archive.writestr("two/a.png", stream.getvalue())
        archive.write(tmp_path / "sheet.pdf", "one/sheet.pdf")
    (tmp_path / "sheet.pdf").unlink()
    planned = plan([tmp_path])
    assert [len(unit.documents) for unit in planned.units] == [1, 0]
    study = load(planned.units[0])
    assert isinstance(study, ImageStudy)
    assert study.documents[0].source.path.endswith("lot.zip!one/sheet.pdf")


def test_a_series_takes_the_request_of_its_folder(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "examples" / "ct" / "phantom-series"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "request.txt").write_text("Clinical indication: cough.\nAccession number: A100200")
    study = read(tmp_path)
    assert [d.kind for d in study.documents] == ["request"]


def test_what_is_no_document_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "README.md").write_text("How to use this.")
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "long.txt").write_text("x" * (documents.MAX_TEXT_BYTES + 1))
    planned = plan([tmp_path])
    assert planned.rejections == ()
    assert {Path(each.path).name for each in planned.passed_over} == {
        "README.md",
        "labels.csv",
        "binary.txt",
        "long.txt",
    }
    assert planned.units[0].documents == ()


def test_a_document_alone_is_refused_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text("Request.")
    assert refusal(tmp_path / "order.txt").code == "document-alone"
    assert refusal(pdf(tmp_path / "sheet.pdf", SHEET)).code == "document-alone"


# ---------------------------------------------------------------- pictures in PDF files


def test_pictures_of_a_pdf_are_inspected_with_its_text(tmp_path: Path) -> None:
    source = (
        f'{SHEET}\n#pagebreak()\nSecond page with a photo: #image("p.png", width: 60%)\n#image("q.png", width: 50%)'
    )
    pdf(tmp_path / "sheet.pdf", source, p=PHOTO, q=PHOTO[:, :, 0])
    found = studies(tmp_path / "sheet.pdf")
    assert list(found) == ["sheet.pdf page 2 image 1", "sheet.pdf page 2 image 2"]
    first, second = found.values()
    np.testing.assert_array_equal(first.pixels[0], PHOTO)
    np.testing.assert_array_equal(second.pixels[0], PHOTO[:, :, 0])
    assert first.key != second.key
    assert [d.source.page for d in first.documents] == [0, 1]
    assert (first.sources[0].media_type, first.sources[0].page) == ("application/pdf", 1)
    assert first.identifiers["lot"] == "L-4711"


def test_a_logo_is_not_inspected(tmp_path: Path) -> None:
    logo = f'#image("p.png", width: 12%)\n{SHEET}'
    assert refusal(pdf(tmp_path / "sheet.pdf", logo, p=PHOTO)).code == "document-alone"


def test_a_scanned_page_is_inspected_and_flagged(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "scan.pdf")
    [(name, study)] = studies(tmp_path / "scan.pdf").items()
    assert name == "scan.pdf page 1 image 1"
    assert "scanned-page-without-text" in study.quality_flags
    assert study.documents == ()
    assert study.pixels.shape == (1, *PHOTO.shape)


def test_a_scan_is_turned_with_its_page(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "flat.pdf", quality=95)
    made = pdfium.PdfDocument(tmp_path / "flat.pdf")
    made[0].set_rotation(90)
    made.save(tmp_path / "turned.pdf")
    made.close()
    flat, turned = (read(tmp_path / f"{name}.pdf").pixels[0] for name in ("flat", "turned"))
    np.testing.assert_array_equal(turned, np.rot90(flat, -1))


def test_a_drawn_page_without_text_is_rendered(tmp_path: Path) -> None:
    pdf(tmp_path / "drawn.pdf", "#rect(width: 4cm, height: 3cm, fill: blue)\n#circle(radius: 1cm)")
    [(name, study)] = studies(tmp_path / "drawn.pdf").items()
    assert name == "drawn.pdf page 1"
    assert "scanned-page-without-text" in study.quality_flags
    width_inch, height_inch = 148 / 25.4, 210 / 25.4  # A5
    assert study.pixels.shape[1:3] == pytest.approx((height_inch * 200, width_inch * 200), abs=2)


def test_a_scanned_form_beside_images_is_flagged_but_not_inspected(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", PHOTO[::-1])
    Image.fromarray(PHOTO).save(tmp_path / "form.pdf")
    study = read(tmp_path)
    assert study.name == "a.png"
    assert "scanned-page-without-text" in study.quality_flags


def test_photos_in_a_sheet_beside_images_are_inspected_too(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", PHOTO[::-1])
    pdf(tmp_path / "sheet.pdf", f'{SHEET}\n#image("p.png", width: 60%)', p=PHOTO)
    assert set(studies(tmp_path)) == {"a.png", "sheet.pdf page 1 image 1"}


# ---------------------------------------------------------------- PDF files that cannot be used


def encrypted() -> bytes:
    """A PDF that asks for a password."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] >>",
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b"> >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    ids = b"[<" + b"00" * 16 + b"> <" + b"00" * 16 + b">]"
    trailer = b"trailer << /Size 5 /Root 1 0 R /Encrypt 4 0 R /ID %s >>\nstartxref\n%d\n%%%%EOF\n" % (ids, len(data))
    return data + table + trailer


def many_pages(count: int, size: float = 100) -> bytes:
    made = pdfium.PdfDocument.new()
    for _ in range(count):
        made.new_page(size, size).close()
    stream = io.BytesIO()
    made.save(stream)
    made.close()
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encrypted(), "encrypted-document"),
        (b"%PDF-1.7\n" + b"\0\xff" * 500, "damaged-document"),
        (many_pages(1)[:200], "damaged-document"),
        (many_pages(1), "document-alone"),
        (many_pages(10_000), "too-large"),
    ],
)
def test_a_pdf_that_cannot_be_used_is_refused(tmp_path: Path, data: bytes, code: str) -> None:
    (tmp_path / "a.pdf").write_bytes(data)
    began = time.process_time()
    assert refusal(tmp_path / "a.pdf").code == code
    assert time.process_time() - began < 5


def test_the_images_beside_a_bad_pdf_are_still_read(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "form.pdf").write_bytes(encrypted())
    planned = plan([tmp_path])
    assert [each.code for each in planned.rejections] == ["encrypted-document"]
    assert isinstance(load(planned.units[0]), ImageStudy)


def test_a_huge_page_is_drawn_within_bounds(tmp_path: Path) -> None:
    made = pdfium.PdfDocument(many_pages(1, 14_000))
    page = made[0]
    photo_object = pdfium.PdfImage.new(made)
    bitmap = pdfium.PdfBitmap.from_pil(Image.fromarray(PHOTO))
    photo_object.set_bitmap(bitmap)
    for corner in (1000, 7000):
        copy = pdfium.PdfImage.new(made)
        copy.set_bitmap(bitmap)
        copy.set_matrix(pdfium.PdfMatrix().scale(6000, 14_000).translate(corner, 0))
        page.insert_obj(copy)
    page.gen_content()
    made.save(str(tmp_path / "wall.pdf"))
    made.close()
    [(name, study)] = studies(tmp_path / "wall.pdf").items()
    assert name == "wall.pdf page 1"  # two strips of one scan
    assert max(study.pixels.shape) == documents.RENDER_SIDE


def test_threads_take_turns_with_pdfium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [pdf(tmp_path / f"{n}.pdf", f"Inspection {n}, lot: X{n}00") for n in range(4)]
    inside, most = [], []

    class Watched(pdfium.PdfDocument):
        def __init__(self, data: bytes) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            super().__init__(data)

        def close(self, _by_parent: bool = False) -> bool:
            inside.pop()
            return super().close(_by_parent)

    monkeypatch.setattr(documents.pdfium, "PdfDocument", Watched)
    threads = [threading.Thread(target=read_document, args=(FileRef(str(path)),)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert [f"X{n}00" in read_document(FileRef(str(path))).documents[0].text for n, path in enumerate(paths)] == [
        True
    ] * 4


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"])
@pytest.mark.parametrize("text", ["检查申请单\n患者咳嗽两周，请排除肺炎。", "批号：L4711，外观检验合格 OK"])
def test_chinese_text_in_any_encoding(encoding: str, text: str) -> None:
    if encoding in ("utf-16-le", "utf-16-be") and "OK" not in text:
        pytest.skip("without a mark, UTF-16 is told by the zeros of its ASCII part")
    if encoding in ("utf-16-le", "utf-16-be"):
        text = "Lot: L4711, inspected 2026-01-02 by line 4. " + text
    assert decode_text(text.encode(encoding)) == text


@pytest.mark.parametrize(
    "text", ["Größe der Läsion: 5 mm, Übersicht schräg", "Lésion évidente à l'œil".replace("œ", "oe")]
)
def test_western_text_in_latin_1(text: str) -> None:
    assert decode_text(text.encode("latin-1")) == text


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_utf_8_is_never_taken_for_anything_else(text: str) -> None:
    assert decode_text(text.encode()) == text.removeprefix("\ufeff")


@given(st.binary(max_size=2000))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_text_or_refused(data: bytes) -> None:
    with contextlib.suppress(Refusal):
        documents.tidy(decode_text(data)).encode()


def test_a_long_text_is_cut_and_said(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "order.txt").write_text("word " * 10_000)
    study = read(tmp_path)
    assert len(study.documents[0].text) == documents.MAX_QUOTED - 1  # the last blank is gone
    assert "document-cut" in study.quality_flags


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Referral. Clinical indication: cough", "request"),
        ("检查申请单 临床诊断：肺炎", "request"),
        ("FINDINGS: clear. IMPRESSION: normal.", "prior-report"),
        ("影像所见：未见异常。诊断意见：", "prior-report"),
        ("Inspection sheet, lot 3, serial 5", "inspection-sheet"),
        ("外观检验记录 批号 A1", "inspection-sheet"),
        ("Shopping list: milk", "text"),
        ("", "text"),
        ("A request with an impression", "text"),  # one word each: unsure
    ],
)
def test_the_kind_of_a_document_is_told_by_its_words(text: str, kind: str) -> None:
    assert kind_of(text) == kind


# ---------------------------------------------------------------- numbers


def found_in(text: str = "", *, file: str = "in/a.png", kind: str = "inspection-sheet") -> dict[str, str]:
    source = SourceFile("in/sheet.pdf", "0" * 64, "application/pdf", 0)
    pages = (Document(text, kind, source),) if text else ()  # type: ignore[arg-type]
    return dict(default_patterns().search(pages, [FileRef(file)]).values)


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        ("Lot: L-4711", {"lot": "L-4711"}),
        ("LOT NO. 2024/11-A", {"lot": "2024/11-A"}),
        ("Batch number 0815.", {"lot": "0815"}),
        ("生产批号：B20240115", {"lot": "B20240115"}),
        ("P/N 77-1234, S/N 0042", {"part": "77-1234", "serial": "0042"}),
        ("Part Number: AX.12", {"part": "AX.12"}),
        ("料号:A-100 序列号：Z9", {"part": "A-100", "serial": "Z9"}),
        ("Serial number SN0042", {"serial": "SN0042"}),
        ("Accession No.: CT2024001", {"accession": "CT2024001"}),
        ("检查号：CT00123", {"accession": "CT00123"}),
        ("A lot of 12 parts was seen in a serial process", {}),
        ("Lot: see label", {}),
        ("part of the lung, 3 cm", {}),
    ],
)
def test_numbers_in_documents(line: str, numbers: dict[str, str]) -> None:
    assert found_in(line) == numbers


@pytest.mark.parametrize(
    ("file", "numbers"),
    [
        ("in/lot-4711_sn0042.png", {"lot": "4711", "serial": "0042"}),
        ("in/Batch 12/part_77-1234/a.png", {"lot": "12", "part": "77-1234"}),
        ("lot9/lot-12/a.png", {"lot": "12"}),
        ("in/pilot-project/slot-4711/departure-300.png", {}),
        ("in/part 1/a.png", {}),
        ("in/series 3 part 2.png", {}),
    ],
)
def test_numbers_in_names(file: str, numbers: dict[str, str]) -> None:
    assert found_in(file=file) == numbers


def test_a_prior_report_has_numbers_of_its_own_examination() -> None:
    assert found_in("Accession: A123456", kind="prior-report") == {}


def test_where_places_disagree_the_number_is_left_out(tmp_path: Path) -> None:
    photo(tmp_path / "lot-1" / "a.png")
    (tmp_path / "lot-1" / "sheet.txt").write_text("Inspection. Lot: 2\nSerial: S7")
    study = read(tmp_path)
    assert study.identifiers == {"serial": "S7"}
    assert study.identifiers_from == {"serial": "sheet.txt"}
    assert "conflicting-identifiers" in study.quality_flags


@pytest.mark.parametrize(
    ("toml", "fault"),
    [
        ("[document]\nlot = ['(?P<value>']", "no regular expression"),
        ("[document]\nlot = ['Lot (.*)']", "lacks a group"),
        ("[document]\nlot = ['(?P<value>(a|aa)+)\\s?c']", "takes too long"),
        ("[document]\ncolour = []", "accession, lot, part, serial"),
        ("[elsewhere]\nlot = []", "document, name"),
        ("[document]\nlot = 'x'", "must be a list"),
        ("[document", "not valid TOML"),
    ],
)
def test_patterns_that_cannot_work_are_refused_with_the_place(tmp_path: Path, toml: str, fault: str) -> None:
    (tmp_path / "p.toml").write_text(toml)
    with pytest.raises(PatternError, match=fault):
        load_patterns(tmp_path / "p.toml")


def test_a_slow_pattern_costs_a_moment_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[document]\nlot = ['Lot (?P<value>(y|yy)+)\\s?c']")
    source = SourceFile("sheet.txt", "0" * 64, "text/plain")
    pages = (Document("Lot " + "y" * 300, "text", source),)
    began = time.process_time()
    found = load_patterns(tmp_path / "p.toml").search(pages, [FileRef(Path("a.png"))])
    assert time.process_time() - began < 2
    assert found.flags == ("identifier-search-cut",)


# ---------------------------------------------------------------- in the report


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> TinyReader:
    tiny = TinyReader()
    tiny.install(monkeypatch)
    return tiny


def reports(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    return [json.loads((out / line["id"] / "report.json").read_text()) for line in lines]


def test_the_report_quotes_the_documents_and_names_the_numbers(tmp_path: Path, reader: TinyReader) -> None:
    photo(tmp_path / "in" / "a_lot-5.png")
    (tmp_path / "in" / "sheet.txt").write_text("Inspection sheet. <b>Serial: S7</b>")
    execute(Job((tmp_path / "in",), tmp_path / "out", mm_per_pixel=0.05))
    [report] = reports(tmp_path / "out")
    assert report["source"]["lot"] == "5"
    assert report["source"]["serial"] == "S7"
    assert report["source"]["read_from"] == {"lot": "a_lot-5.png", "serial": "sheet.txt"}
    assert report["context"][0]["text"] == "Inspection sheet. <b>Serial: S7</b>"
    assert report["technique"]["spacing_mm"] == [0.05, 0.05]
    assert report["technique"]["read_from"]["spacing_mm"] == "user"
    page = (tmp_path / "out" / report["id"] / "report.html").read_text()
    assert "&lt;b&gt;Serial: S7&lt;/b&gt;" in page
    assert "sheet.txt" in page
    assert "as the user gave it" in page


def test_a_changed_document_makes_another_report(tmp_path: Path, reader: TinyReader) -> None:
    photo(tmp_path / "in" / "a.png")
    job = Job((tmp_path / "in",), tmp_path / "out")
    first = execute(job).reported[0]
    assert execute(job).reported == ()
    (tmp_path / "in" / "order.txt").write_text("Request.")
    second = execute(job).reported[0]
    (tmp_path / "in" / "order.txt").write_text("Request!")
    third = execute(job).reported[0]
    assert len({first.id, second.id, third.id}) == 3
    assert execute(job).reported == ()
    scaled = Job((tmp_path / "in",), tmp_path / "out", mm_per_pixel=0.1)
    assert execute(scaled).reported[0].id not in {first.id, second.id, third.id}


def test_the_same_picture_of_two_lots_gives_two_reports(tmp_path: Path, reader: TinyReader) -> None:
    photo(tmp_path / "in" / "lot-1" / "a.png")
    photo(tmp_path / "in" / "lot-2" / "a.png")
    execute(Job((tmp_path / "in",), tmp_path / "out"))
    assert sorted(report["source"]["lot"] for report in reports(tmp_path / "out")) == ["1", "2"]
