"""Vigil trainer: fits PaDiM on fixed image features without torch, and writes an ONNX bundle."""

from vigil_trainer.importer import import_export
from vigil_trainer.train import TrainResult, train
from vigil_trainer.with_anomalib import train_anomalib

__all__ = ["TrainResult", "import_export", "train", "train_anomalib"]
