"""Inference: one model version, ONNX Runtime or OpenVINO, judging frames from the stream or directly."""
