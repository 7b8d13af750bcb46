"""Triton loads this file; everything it does is in server/engine/triton_model.py."""

from server.engine.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
