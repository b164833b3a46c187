"""Definition files of model folders, read and checked without a manager. Pure: texts in, values out.

`model.py` reads `model-definition.yaml`, `service.py` reads `service-definition.toml`, `check.py` both of a
folder. `reader.py` walks YAML and collects what is wrong with it, for any format that is written by hand.
"""
