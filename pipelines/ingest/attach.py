"""Which documents belong to which images, and what a study takes from them.

A document belongs to all images in its own folder (or folder of an archive); one that is called like a picture beside
it belongs to that picture alone. Folders above and below do not count: a request form must not reach another patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pipelines.ingest.documents import Contents, read_document
from pipelines.ingest.files import FileRef, Found, PassedOver
from pipelines.ingest.identifiers import Patterns, default_patterns
from pipelines.ingest.refusals import Refusal, rejected
from pipelines.ingest.units import Unit
from pipelines.study import ImageStudy, Rejection


@dataclass(frozen=True, slots=True)
class Attached:
    """The units with their documents and those that pictures inside PDF files add; what is refused or left alone."""

    units: tuple[Unit, ...]
    rejections: tuple[Rejection, ...]
    passed_over: tuple[PassedOver, ...]


def attach(units: Sequence[Unit], documents: Sequence[Found]) -> Attached:
    """Give the documents to the images that they belong to. Never raises for bad input."""
    folders = {file.parent for unit in units for file in unit.files}
    names = {place for unit in units for file in unit.files for place in _own_places(file)}
    at: dict[tuple[str, str], list[FileRef]] = {}  # (folder, name of the one image or "") -> documents
    added: list[Unit] = []
    rejections: list[Rejection] = []
    passed_over: list[PassedOver] = []
    for found in documents:
        ref = found.ref
        try:
            contents = read_document(ref)
            alone = ref.parent not in folders
            pictures = _units_in(ref, contents, alone=alone)
            if alone and not pictures:
                raise Refusal("document-alone", "It is a document without pictures, and no image lies in its folder.")
        except Exception as error:  # nothing that a file holds may stop the run
            refusal = rejected(ref.name, error)
            if found.format == "text" and not found.named:
                passed_over.append(PassedOver(ref.name, f"a companion file: {refusal.reason}"))
            else:
                rejections.append(refusal)
            continue
        added += pictures
        place = (ref.parent, PurePosixPath(ref.basename).stem)
        at.setdefault(place if place in names else (ref.parent, ""), []).append(ref)
    with_theirs = [replace(unit, documents=_documents_of(unit, at)) for unit in (*units, *added)]
    return Attached(tuple(with_theirs), tuple(rejections), tuple(passed_over))


def _units_in(ref: FileRef, contents: Contents, *, alone: bool) -> list[Unit]:
    """The pictures of a PDF. Beside images, a page that is one picture is the document itself: it is not inspected."""
    units = []
    for picture in contents.pictures:
        if alone or not picture.fills_page:
            image = "" if picture.image is None else f" image {picture.image + 1}"
            name = f"{ref.basename} page {picture.page + 1}{image}"
            units.append(Unit(name, "pdf", (ref,), page=picture.page, image=picture.image))
    return units


def _documents_of(unit: Unit, at: dict[tuple[str, str], list[FileRef]]) -> tuple[FileRef, ...]:
    places = [place for file in unit.files for place in ((file.parent, ""), *_own_places(file))]
    mine = dict.fromkeys(ref for place in places for ref in at.get(place, ()))
    if unit.kind == "pdf":  # other PDF files speak of their own pictures
        return tuple(ref for ref in mine if ref in unit.files or not ref.basename.lower().endswith(".pdf"))
    return tuple(mine)


def _own_places(file: FileRef) -> tuple[tuple[str, str], tuple[str, str]]:
    """Folder and name, without its own ending, of a document for this file alone."""
    return (file.parent, file.basename), (file.parent, PurePosixPath(file.basename).stem)


def with_documents(study: ImageStudy, unit: Unit, patterns: Patterns | None) -> ImageStudy:
    """The study with its documents' text and the numbers found there and in names. The header's own numbers stand."""
    contents = [read_document(ref) for ref in unit.documents]
    documents = tuple(page for each in contents for page in each.documents)
    found = (patterns or default_patterns()).search(documents, unit.files)
    flags = [*study.quality_flags, *(flag for each in contents for flag in each.flags), *found.flags]
    if any(study.identifiers.get(name, value) != value for name, value in found.values.items()):
        flags.append("conflicting-identifiers")
    places = {name: place for name, place in found.places.items() if name not in study.identifiers}
    return replace(
        study,
        documents=documents,
        identifiers={**found.values, **study.identifiers},
        identifiers_from={**places, **study.identifiers_from},
        quality_flags=tuple(dict.fromkeys(flags)),
    )
