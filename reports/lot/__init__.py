"""Lots: acceptance by ISO 2859-1, the p-chart, the Pareto and the defect map over the reports of a run."""
