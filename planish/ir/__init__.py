"""The intermediate representation: programs of ONNX graphs, the planish dialect, analyses. Imports no other room."""
