"""The formats of an export, a module for each.

Each module has `write(module, path, metadata)`, with `calibration` where the format has INT8, and, where the file can
be run on this machine, `open_model(path)`.
"""
