"""How good is the model? Answers on a labelled data set, scored per data set with intervals and trivial baselines.

`evaluate` reads a manifest's images with a model, `rescore` scores saved answers again, `score` is the pure part.
"""

from pipelines.evaluation.predictions import PredictionsError, read_predictions
from pipelines.evaluation.runner import evaluate, rescore
from pipelines.evaluation.scoring import score

__all__ = ["PredictionsError", "evaluate", "read_predictions", "rescore", "score"]
