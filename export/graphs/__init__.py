"""The graphs of a bundle, one file a family of kinds: ONNX text, torch module and reference together.

``registry.py`` lists the families. A new kind is one file here and one line there.
"""
