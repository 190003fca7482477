"""Vigil trainer: fits PaDiM on fixed image features without torch, and writes an ONNX bundle."""
