class QtoolsError(Exception):
    pass
