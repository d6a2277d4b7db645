"""Quality flags in words: what each tells the reader of a report. The codes are set where the fault is seen."""

from __future__ import annotations

from typing import Final

FLAGS: Final = {
    "missing-slices": "Slices are missing: there are gaps of whole multiples of the usual spacing.",
    "irregular-spacing": "The slices lie at uneven distances.",
    "missing-geometry": "The files give no usable position: slices are in the order of their numbers.",
    "gantry-tilt": "The gantry was tilted: slices are sheared against their normal.",
    "duplicate-slices": "Copies of slices at the same position were left out.",
    "unreadable-slices": "Files of the series could not be read and were left out.",
    "mixed-orientation": "Slices of another orientation were left out.",
    "padding-masked": "Pixels outside the scanned field were set to air.",
    "lossy-compression": "The pixels went through lossy compression.",
    "coarse-hu": "Neighbouring stored values are more than 4 HU apart.",
    "unspecified-rescale-type": "The header does not name HU as the unit of its pixels; they are taken as HU.",
    "kind-uncertain": "The model was not sure what kind of image this is.",
    "product-line-undetermined": "The product could not be told.",
    "no-reference": "No golden sample was given to compare with.",
    "reference-size-differs": "The golden sample has another size and was stretched over the picture.",
}


def explain(flag: str) -> str:
    """The flag's sentence; an unknown code is put in plain words."""
    return FLAGS.get(flag) or flag.replace("-", " ").capitalize() + "."
