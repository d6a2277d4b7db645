"""From manifests to weights. `python -m pipelines.training --help`, or `scanscribe train`."""
