"""DICOM objects made from a report: they live in the study that the images came from and name what they refer to."""
