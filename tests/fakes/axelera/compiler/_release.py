from importlib.metadata import version

RELEASE = tuple(int(part) for part in version("axelera-devkit").split(".")[:2])
