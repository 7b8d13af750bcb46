"""Runs exported students on onnxruntime. Never torch, never fastapi."""
