"""What can be measured without a model: of a CT study as a whole, and of each finding inside its evidence box.

Nothing is stated that did not pass its own checks: what could not be measured stands in `not_assessed` with the reason.
docs/measurements.md lists every measurement with its method, source and limits.
"""

from __future__ import annotations

from pipelines.measures.findings import measure_defect, measure_lesion
from pipelines.measures.study import NOT_MEASURED, StudyMeasures, measure_study, region_fits

__all__ = ["NOT_MEASURED", "StudyMeasures", "measure_defect", "measure_lesion", "measure_study", "region_fits"]
