"""Figures in words, for people: the terminal, the page and the model card."""

from __future__ import annotations

from typing import Final

from reports.taxonomy import title

_NAMES: Final = {
    "kind_accuracy": "Kind of image, accuracy",
    "product_line_accuracy": "Product line, accuracy",
    "map_33": "mAP at IoU 0.33",
    "map_50": "mAP at IoU 0.5",
    "map_50_95": "mAP at IoU 0.5 to 0.95",
    "f1_reported": "F1 at IoU 0.5, as reported",
    "f1_best": "F1 at IoU 0.5, evidence at its best threshold",
    "f1_reported_minus_best": "F1 as reported less the evidence's best",
    "image_type_accuracy": "Image type, accuracy",
    "image_type_macro_f1": "Image type, macro F1",
    "defect_type_accuracy": "Type of the defect where there is one, accuracy",
    "presence_auroc": "Defect present, AUROC",
    "laterality_answered": "Laterality, share answered",
    "laterality_accuracy_answered": "Laterality where answered, accuracy",
    "covid19_accuracy": "COVID-19, accuracy",
    "covid19_auroc": "COVID-19, AUROC",
    "covid19_f1": "COVID-19, F1",
    "finding_auroc_macro": "Findings, macro AUROC",
    "finding_f1_macro": "Findings as reported, macro F1",
    "narrative_bleu_4": "Impression against caption, BLEU-4",
    "narrative_rouge_l": "Impression against caption, ROUGE-L",
    "report_types_match": "Reports with just the labelled finding types",
    "report_exact_match": "Reports right in all finding types and fields",
    "decoder_contradicts_findings": "Reports in which the decoder's impression contradicts the findings",
    "report_contradicts_findings": "... after the language check",
    "adaptive": "equally filled bins",
    "uncalibrated": "before calibration",
}
BASELINES: Final = {"majority": "majority", "normal": "always normal", "nearest": "nearest neighbour"}
ABOUT_BASELINES: Final = (
    "Baselines answer without a model: with the majority of the training split, always normal, or with the labels of "
    "the training image whose 32 by 32 pixel thumbnail is most similar (cosine)."
)
ABOUT_INTERVALS: Final = (
    "Intervals are 95 % percentile intervals of a bootstrap over groups (patients, parts) with 1,000 resamples. "
    "Resamples repeat cases, which favours AP and the best F1 and widens calibration gaps: the intervals of those "
    "figures lie somewhat high."
)
ABOUT_ECE: Final = (
    "ECE, the expected calibration error, is the mean gap between confidence and share that is right, over 15 bins of "
    "equal width; also over 15 bins with equally many statements."
)
ABOUT_TEXT: Final = (
    "BLEU-4 and ROUGE-L measure how much wording a report shares with the caption, not whether it is true: captions "
    "know the history and say the same in many ways."
)


def name_of(figure: str) -> str:
    """`map_50` -> `mAP at IoU 0.5`; `ece_fields_adaptive` -> `ECE of fields, equally filled bins`."""
    if figure in _NAMES:
        return _NAMES[figure]
    if figure.startswith("ece_"):
        _, what, *how = figure.split("_")
        return ", ".join([f"ECE of {what}", *(_NAMES[each] for each in how)])
    return title(figure.removesuffix("_accuracy").capitalize()) + ", accuracy"
