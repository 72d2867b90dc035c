"""ONNX-level programs as Relax modules of TVM, over symbolic sizes."""
